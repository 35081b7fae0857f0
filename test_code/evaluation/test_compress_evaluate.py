"""A whole job with `--evaluate`: the scores are those of its files; it resumes, and `--redo evaluate` scores again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_modelopt_cli.compress import stages
from test_code.evaluation import local
from test_code.support import jobs_compress

pytestmark = pytest.mark.evaluation

ROOT = Path(__file__).resolve().parents[2]


def _run(work: Path, *more: str) -> subprocess.CompletedProcess:
    flags = {
        "--teacher": "checkpoint",
        "--train-text": "train.jsonl",
        "--heldout-text": "heldout.jsonl",
        "--output": "run",
        "--seq-length": "32",
        "--target-ffn-hidden-size": "64",
        "--prune-samples": "8",
        "--distill-steps": "4",
        "--distill-global-batch-size": "4",
        "--distill-micro-batch-size": "2",
        "--distill-warmup-steps": "1",
        "--calibration-size": "4",
        "--calibration-batch-size": "2",
        "--calibration-seq-len": "32",
        "--hf-layout": "compressed-tensors",
        "--evaluate": "tasks",
        "--evaluate-model-args": "dtype=float32",
    }
    words = [word for pair in flags.items() for word in pair]
    command = [sys.executable, str(ROOT / "scripts" / "compress.py"), "--cpu", "--formats", "nemo", "hf", *words, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": local.PATH}
    return subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def work(ranks_factory, tmp_path_factory) -> Path:
    """Write a teacher and tasks, and run the job on them."""
    assert local.PATH, "run these tests with make test-eval"
    folder = tmp_path_factory.mktemp("evaluate")
    ranks_factory(1).run(jobs_compress.make_teacher, str(folder), llama=True, timeout=240)
    local.write(folder)
    done = _run(folder)
    assert done.returncode == 0, done.stderr + _log(folder)
    assert "Scores of lm-eval" in done.stdout and "tiny_choice" in done.stdout
    return folder


def _log(work: Path) -> str:
    path = work / "run" / "log" / "rank0.txt"
    return path.read_text()[-3000:] if path.exists() else ""


def _scores(work: Path) -> dict[str, dict[tuple[str, str], float]]:
    report = json.loads((work / "run" / "report.json").read_text())["evaluation"]
    return {
        model["model"]: {(one["task"], one["metric"]): one["value"] for one in model["scores"]}
        for model in report["models"]
    }


def test_the_scores_of_the_exported_files_are_those_of_direct_forward_passes(work):
    found, expected = _scores(work)["hf files"], local.directly(work / "run" / "export" / "hf")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # A batch with padding sums in another order. FP8 inputs on the edge of a code may then take the next one.
        assert found[key] == pytest.approx(value, rel=1e-3), key


def test_the_teacher_is_scored_as_it_is(work):
    """The converted files were removed; those of `ptq -algo no_quant` are the same model in the same type."""
    found = _scores(work)["teacher"]
    words = ["-nc", "checkpoint", "-algo", "no_quant", "--export_format", "hf", "-out", "teacher_hf", "--no_report"]
    subprocess.run([sys.executable, ROOT / "scripts" / "ptq.py", "--cpu", *words], cwd=work, check=True, timeout=300)
    expected = local.directly(work / "teacher_hf")
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key  # fp32, sums in another order
    assert not (work / "run" / "evaluate" / "hf").exists()


def test_redo_evaluate_scores_again_and_runs_nothing_else(work):
    before = {name: stages.read_record(work / "run" / name) for name in ("export", "evaluate")}
    refused = _run(work, "--evaluate-limit", "2")
    assert refused.returncode == 2
    assert "evaluate (finished): limit was null and is now 2" in refused.stderr
    done = _run(work, "--evaluate-limit", "2", "--redo", "evaluate")
    assert done.returncode == 0, done.stderr + _log(work)
    after = {name: stages.read_record(work / "run" / name) for name in ("export", "evaluate")}
    assert after["export"] == before["export"] and not (work / "run" / "evaluate.new").exists()
    assert after["evaluate"] is not None and after["evaluate"] != before["evaluate"]
    assert {one["rows"] for model in after["evaluate"].result["models"] for one in model["scores"]} == {2}
    again = _run(work, "--evaluate-limit", "2")
    assert again.returncode == 0 and "evaluate  finished before, kept" in again.stderr


def test_models_that_were_scored_before_an_interruption_are_kept(work):
    """An interrupted step leaves `working.json` and the scores of the first models."""
    place = work / "run" / "evaluate"
    record = stages.read_record(place)
    assert record is not None
    settings = {"fingerprint": record.fingerprint, "attempts": 1, "settings": record.settings}
    (place / stages.DONE).unlink()
    (place / "exported.json").unlink()
    (place / stages.WORKING).write_text(json.dumps(settings))
    kept = (place / "teacher.json").stat().st_mtime_ns
    limit = [] if record.settings["limit"] is None else ["--evaluate-limit", str(record.settings["limit"])]
    done = _run(work, *limit)
    assert done.returncode == 0, done.stderr + _log(work)
    assert "was interrupted, running again" in done.stderr
    assert (place / "teacher.json").stat().st_mtime_ns == kept and (place / "exported.json").exists()
    found = stages.read_record(place)
    assert found is not None and found.result["models"][0] == record.result["models"][0]


def test_the_command_scores_a_quantized_checkpoint_as_its_export(work):
    command = [
        sys.executable,
        "-m",
        "nemo_modelopt_cli",
        "evaluate",
        "run/export/hf",
        "run/quantize/checkpoint",
        "--cpu",
    ]
    command += ["--tasks", "tasks/tiny_text.yaml", "--model-args", "dtype=float32", "--output", "scores"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{local.PATH}"}
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    export, checkpoint = json.loads((work / "scores" / "evaluation.json").read_text())["models"]
    assert (export["model"], checkpoint["model"]) == ("hf", "checkpoint")
    values = [[one["value"] for one in model["scores"]] for model in (export, checkpoint)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)  # the same files, on the same machine
    assert not (work / "scores" / "converted").exists()

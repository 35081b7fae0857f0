"""Output folders: what would overwrite or mix files there raises an error before anything is loaded."""

from __future__ import annotations

import pytest

from nemo_modelopt_cli import run_script
from nemo_modelopt_cli.process import signals
from nemo_modelopt_dropin import files
from nemo_modelopt_dropin.preflight import output_checks

FILES = {
    "nemo": ["context/model.yaml", "weights/metadata.json"],
    "hf": ["config.json", "model.safetensors"],
    "sharded hf": ["config.json", "model-00001-of-00002.safetensors"],
    "trtllm": ["config.json", "rank0.safetensors"],
    "notes": ["readme.txt"],
    "empty": [],
}


def _fill(folder, files):
    folder.mkdir()
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("")
    return folder


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("nemo", ["nemo"]), ("hf", ["hf"]), ("sharded hf", ["hf"]), ("trtllm", ["trtllm"]), ("notes", []), ("empty", [])],
)
def test_formats_are_told_by_their_files(tmp_path, kind, expected):
    assert output_checks.formats_in(_fill(tmp_path / "x", FILES[kind])) == expected


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("model", "is --in itself, which would be overwritten"),
        ("./model/", "is --in itself"),
        ("link", "is --in itself"),
        ("model/inside", "lies inside --in model"),
        ("file", "file is a file; use another folder"),
        ("file/below", "file is a file; use another folder"),
        ("/proc/nowhere", "cannot be written"),
        ("new/folder", None),
        (".", "--in model lies inside --out ., which this command writes"),
        (None, None),
    ],
)
def test_places(tmp_path, monkeypatch, output, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    found = output_checks.place_problems("--out", output, {"--in": "model", "--other": None, "--missing": "none"})
    assert (problem in " ".join(found)) if problem else found == []
    assert sorted(tmp_path.rglob("*")) == before, "a check leaves nothing"


@pytest.mark.parametrize(
    ("kind", "ours", "wanted", "problem"),
    [
        ("empty", False, "hf", None),
        ("nemo", True, "nemo", None),
        ("nemo", True, "hf", "holds a checkpoint of format nemo already"),
        ("hf", True, "trtllm", "holds a checkpoint of format hf already"),
        ("hf", False, "hf", "holds config.json, model.safetensors, which this package did not write"),
        ("notes", False, "nemo", "holds readme.txt, which this package did not write"),
    ],
)
def test_contents(tmp_path, kind, ours, wanted, problem):
    folder = _fill(tmp_path / "x", FILES[kind])
    if ours:
        (folder / "run.yaml").write_text("")
        files.mark(folder, files.checkpoint(kind))
    found = output_checks.content_problems("--out", str(folder), wanted)
    assert (problem in " ".join(found)) if problem else found == []
    assert output_checks.content_problems("--out", str(tmp_path / "none"), wanted) == []


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("texts", "--text texts/a.jsonl lies inside --out texts, which this command writes"),
        ("link", "lies inside --out link"),
        (".", "lies inside --out ."),
        ("tokens", r"--data_paths tokens/corpus lies inside --out tokens"),
        ("globbed", "--dataset globbed/one.jsonl lies inside --out globbed"),
        ("configs", "--config configs/mine.yaml lies inside --out configs"),
        ("run", None),
        ("elsewhere", None),
    ],
)
def test_no_input_lies_inside_of_what_is_written(tmp_path, monkeypatch, output, problem):
    monkeypatch.chdir(tmp_path)
    for name in ("texts/a.jsonl", "tokens/corpus.bin", "globbed/one.jsonl", "configs/mine.yaml", "run/run.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "link").symlink_to("texts")
    config = "run/run.yaml" if output == "run" else "configs/mine.yaml"
    inputs = {
        "--text": "texts/a.jsonl",
        **output_checks.input_paths("--data_paths", ["0.3", "tokens/corpus"]),
        **output_checks.input_paths("--dataset", "globbed/*.jsonl"),
        **output_checks.config_paths(config, output),
    }
    inputs = {name.removesuffix(" (2)"): path for name, path in inputs.items()}
    found = output_checks.place_problems("--out", output, inputs)
    assert (problem in " ".join(found)) if problem else found == []


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ("out", "--state out lies inside --out out, or is the same"),
        ("out/state", "--state out/state lies inside --out out"),
        ("thesis", "--state: .*thesis holds chapter.tex, which this package did not write"),
        ("out.state", None),
        (None, None),
    ],
)
def test_folders_beside_the_output(tmp_path, monkeypatch, state, problem):
    import re

    monkeypatch.chdir(tmp_path)
    _fill(tmp_path / "thesis", ["chapter.tex"])
    found = output_checks.state_problems("--state", state, files.CALIBRATION_STATE, {"--out": "out", "--none": None})
    assert re.search(problem, " ".join(found)) if problem else found == []


@pytest.mark.parametrize("name", ["report.json", "figures", "report.html"])
def test_a_report_does_not_replace_a_users_file(tmp_path, name):
    (tmp_path / name).mkdir()
    assert f"holds {name}, which this package did not write" in output_checks.report_problems("--r", str(tmp_path))[0]
    (tmp_path / name).rename(tmp_path / "notes")
    assert output_checks.report_problems("--r", str(tmp_path)) == []


def test_a_report_lies_beside_the_checkpoint(tmp_path):
    outputs = {"--out": str(tmp_path / "out")}
    for folder in ("out", "out/report"):
        (found,) = output_checks.report_problems("--report", str(tmp_path / folder), outputs)
        assert f"--report {tmp_path / folder} lies inside --out" in found
    assert output_checks.report_problems("--report", str(tmp_path / "out.report"), outputs) == []


def test_an_interruption_names_the_calibrated_state_that_is_there(tmp_path):
    state = tmp_path / "state"
    message = run_script._Interrupted(run_script.Script("ptq", tmp_path / "out", (), state=state))
    assert str(message) == signals.NOTHING_WRITTEN
    state.mkdir()
    assert str(message) == signals.NOTHING_WRITTEN
    files.mark(state, files.CALIBRATION_STATE)
    assert f"the calibrated state is kept in {state}" in str(message)
    resumable = run_script.Script("distill", tmp_path / "out", (), keeps_progress=True)
    assert str(run_script._Interrupted(resumable)) == signals.RESUMABLE

"""The stages' state machine, the launcher, the job's parts, and the whole job on a tiny model, killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_modelopt_dropin.compress import corpus, launch, plan, stages
from nemo_modelopt_dropin.compress import settings as job_settings
from nemo_modelopt_dropin.compress.stages import Stage, StageError
from test_code import jobs_compress

ROOT = Path(__file__).resolve().parent.parent


class Log:
    """Stages that write down that they ran."""

    def __init__(self):
        self.ran: list[str] = []

    def stage(self, name, after=(), keeps_progress=False, fails=False, **stage_settings) -> Stage:
        def run(folder, records):
            self.ran.append(name)
            (folder / "half.txt").write_text("x")
            if fails:
                raise OSError("disk full")
            return {"left": sorted(p.name for p in folder.iterdir()), "from": [records[a].run_id for a in after]}

        return Stage(name, run, stage_settings, after, keeps_progress)


# --- stages -----------------------------------------------------------------------------------------------------------


def test_finished_stages_are_not_run_again(tmp_path):
    log = Log()
    chain = [log.stage("a"), log.stage("b", ("a",)), log.stage("c", ("b",))]
    first = stages.run_stages(chain, tmp_path)
    again = stages.run_stages(chain, tmp_path)
    assert log.ran == ["a", "b", "c"]
    assert again == first
    assert stages.pending(chain, tmp_path) == []


def test_a_stage_gets_the_records_of_those_before(tmp_path):
    log = Log()
    records = stages.run_stages([log.stage("a"), log.stage("b", ("a",))], tmp_path)
    assert records["b"].result["from"] == [records["a"].run_id]


@pytest.mark.parametrize(("changed", "runs_again"), [("a", "abcd"), ("b", "bc"), ("c", "c"), ("d", "d")])
def test_changed_settings_undo_the_stage_and_those_after_it(tmp_path, changed, runs_again):
    def chain(log, lr):
        def make(name, after=()):
            return log.stage(name, after, lr=lr if name == changed else 1)

        return [make("a"), make("b", ("a",)), make("c", ("b",)), make("d", ("a",))]

    stages.run_stages(chain(Log(), 1), tmp_path)
    log = Log()
    assert stages.pending(chain(log, 2), tmp_path) == list(runs_again)
    stages.run_stages(chain(log, 2), tmp_path)
    assert log.ran == list(runs_again)


def test_a_stage_that_lost_its_record_undoes_those_after_it(tmp_path):
    log = Log()
    chain = [log.stage("a"), log.stage("b", ("a",))]
    stages.run_stages(chain, tmp_path)
    (tmp_path / "a" / stages.DONE).unlink()
    stages.run_stages(chain, tmp_path)
    assert log.ran == ["a", "b", "a", "b"]


@pytest.mark.parametrize("keeps_progress", [False, True])
def test_an_interrupted_stage_starts_clean_unless_it_keeps_progress(tmp_path, keeps_progress):
    log = Log()
    with pytest.raises(OSError, match="disk full"):
        stages.run_stages([log.stage("a", keeps_progress=keeps_progress, fails=True)], tmp_path)
    (tmp_path / "a" / "checkpoint").write_text("step 3")
    record = stages.run_stages([log.stage("a", keeps_progress=keeps_progress)], tmp_path)["a"]
    assert ("checkpoint" in record.result["left"]) is keeps_progress
    assert record.attempts == 2
    assert not (tmp_path / "a" / stages.WORKING).exists()


def test_progress_under_other_settings_is_not_kept(tmp_path):
    log = Log()
    with pytest.raises(OSError, match="disk full"):
        stages.run_stages([log.stage("a", keeps_progress=True, fails=True, lr=1)], tmp_path)
    (tmp_path / "a" / "checkpoint").write_text("step 3")
    record = stages.run_stages([log.stage("a", keeps_progress=True, lr=2)], tmp_path)["a"]
    assert "checkpoint" not in record.result["left"]
    assert record.attempts == 1


@pytest.mark.parametrize("content", ["", "{", '{"name": "a"}', "[]"])
def test_an_unreadable_record_is_no_record(tmp_path, content):
    log = Log()
    stages.run_stages([log.stage("a")], tmp_path)
    (tmp_path / "a" / stages.DONE).write_text(content)
    stages.run_stages([log.stage("a")], tmp_path)
    assert log.ran == ["a", "a"]


def test_a_stage_must_come_after_what_it_builds_on(tmp_path):
    log = Log()
    with pytest.raises(StageError, match=r"'b' builds on \['a'\]"):
        stages.run_stages([log.stage("b", ("a",)), log.stage("a")], tmp_path)


def test_events_tell_what_happens(tmp_path):
    log, events = Log(), []

    def tell(event, stage, record):
        events.append((event, stage.name, record is not None))

    with pytest.raises(OSError, match="disk full"):
        stages.run_stages([log.stage("a"), log.stage("b", fails=True)], tmp_path, tell=tell)
    stages.run_stages([log.stage("a"), log.stage("b")], tmp_path, tell=tell)
    assert events == [
        ("start", "a", False),
        ("done", "a", True),
        ("start", "b", False),
        ("kept", "a", True),
        ("again", "b", False),
        ("done", "b", True),
    ]


_KILLED = """
    import sys, time
    from pathlib import Path
    from nemo_modelopt_dropin.compress.stages import Stage, lock, run_stages
    root = Path(sys.argv[1])
    def work(name, steps):
        def run(folder, records):
            progress = folder / "steps.txt"
            done = len(progress.read_text()) if progress.exists() else 0
            for step in range(done, steps):
                with open(progress, "a") as file:
                    file.write(name)
                time.sleep(0.02)
            return {"steps": progress.read_text(), "went on from": done}
        return run
    with lock(root):
        run_stages([Stage("a", work("a", 1)), Stage("b", work("b", 60), {}, ("a",), True)], root)
"""


def test_kill_9_in_the_middle_and_the_next_run_goes_on(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(_KILLED), str(tmp_path)]
    steps = tmp_path / "b" / "steps.txt"
    with subprocess.Popen(command, cwd=ROOT) as process:
        _wait_for(lambda: steps.exists() and len(steps.read_text()) >= 5, 30)
        process.kill()
    first = stages.read_record(tmp_path / "a")
    assert first is not None
    assert stages.read_record(tmp_path / "b") is None
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    assert stages.read_record(tmp_path / "a") == first
    second = stages.read_record(tmp_path / "b")
    assert second is not None
    assert second.result["steps"] == "b" * 60
    assert second.result["went on from"] >= 5
    assert second.attempts == 2


def test_two_runs_cannot_share_a_folder(tmp_path):
    held = "import sys, time; from pathlib import Path; from nemo_modelopt_dropin.compress.stages import lock\n"
    held += "with lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", held, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(StageError, match="in use by another run"), stages.lock(tmp_path, patience_s=0.1):
            pass
        process.kill()
    with stages.lock(tmp_path, patience_s=5):
        pass  # the lock died with its holder


def _wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


# --- launcher ---------------------------------------------------------------------------------------------------------


def test_ranks_get_their_places(tmp_path):
    code = "import os, pathlib, sys; pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(os.environ['WORLD_SIZE'])"
    assert launch.run_ranks(3, ["-c", code, str(tmp_path)]) == 0
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"0": "3", "1": "3", "2": "3"}


def test_one_failing_rank_ends_the_others():
    code = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)"
    started = time.monotonic()
    assert launch.run_ranks(2, ["-c", code]) == 3
    assert time.monotonic() - started < 20


def test_killing_the_launcher_kills_the_ranks(tmp_path):
    rank = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], str(os.getpid())).touch(); time.sleep(60)"
    parent = "import sys; from nemo_modelopt_dropin.compress.launch import run_ranks; run_ranks(2, sys.argv[1:])"
    command = [sys.executable, "-c", parent, "-c", rank, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT) as process:
        _wait_for(lambda: len(list(tmp_path.iterdir())) == 2, 30)
        process.send_signal(signal.SIGKILL)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    _wait_for(lambda: not any(_runs(pid) for pid in pids), 10)


def _runs(pid: int) -> bool:
    """Return whether a process runs; one that ended and waits to be noticed does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- settings ---------------------------------------------------------------------------------------------------------


def test_every_problem_is_reported_at_once(tmp_path):
    job = job_settings.Job(
        teacher=str(tmp_path / "none"),
        train_text=str(tmp_path / "a"),
        heldout_text=str(tmp_path / "b"),
        layout=job_settings.Layout(devices=3, tp=2),
        pruning=job_settings.Pruning(target_num_attention_heads=2),
        quantization=job_settings.Quantization(algorithm="fp9", formats=("hff",)),
    )
    with pytest.raises(job_settings.SettingsError) as caught:
        job.check()
    lines = str(caught.value).splitlines()
    assert len(lines) == 8
    for part in ("3 ranks cannot", "go together", "did you mean fp8?", "did you mean hf?", "none is not a folder"):
        assert any(part in line for line in lines), part


@pytest.mark.parametrize(
    ("pruning", "problem"),
    [
        ({}, "nothing to prune"),
        ({"target_num_layers": 0}, "target_num_layers must be positive"),
        ({"target_num_layers": 2, "drop_layers": (1,)}, "cannot be combined"),
        ({"target_num_layers": 2, "num_samples": 2, "micro_batch_size": 4}, "less than one batch"),
    ],
)
def test_pruning_that_cannot_work(pruning, problem):
    assert any(problem in line for line in job_settings.Pruning(**pruning).problems())


def test_unknown_settings_name_the_nearest_one():
    with pytest.raises(job_settings.SettingsError, match="'stepps' in distillation.*did you mean steps"):
        job_settings.from_dict(job_settings.Job, {"distillation": {"stepps": 3}})


def test_saving_more_often_does_not_undo_a_stage():
    training = job_settings.Training(save_every=10)
    assert plan.outcome(training) == plan.outcome(job_settings.Training(save_every=20))
    assert plan.outcome(training) != plan.outcome(job_settings.Training(lr=1.0))


# --- corpus and tokens ------------------------------------------------------------------------------------------------


def test_heldout_text_is_not_in_the_training_text():
    training, held_out = corpus.split(corpus.documents())
    assert len(training) > 50
    assert len(held_out) >= 5
    paragraphs = {paragraph.strip() for text in held_out for paragraph in text.split("\n\n")}
    seen = {paragraph.strip() for text in training for paragraph in text.split("\n\n")}
    assert not paragraphs & seen


@settings(max_examples=30, deadline=None)  # the first example imports torch
@given(st.integers(3, 200), st.integers(2, 40))
def test_consecutive_windows_predict_each_token_once(length, seq_length):
    from nemo_modelopt_dropin.compress.tokens import Windows

    ids = np.arange(length, dtype=np.int32)
    if length <= seq_length:
        with pytest.raises(ValueError, match="too few"):
            Windows(ids, seq_length)
        return
    windows = Windows(ids, seq_length)
    labels = [int(label) for i in range(len(windows)) for label in windows[i]["labels"]]
    assert labels == list(range(1, len(labels) + 1))
    assert length - 1 - len(labels) < seq_length


def test_random_windows_depend_on_seed_and_number_alone():
    from nemo_modelopt_dropin.compress.tokens import Windows

    ids = np.arange(1000, dtype=np.int32)
    one, two = Windows(ids, 8, samples=50, seed=1), Windows(ids, 8, samples=20, seed=1)
    assert [one[i]["tokens"].tolist() for i in range(20)] == [two[i]["tokens"].tolist() for i in range(20)]
    other = Windows(ids, 8, samples=20, seed=2)
    assert [one[i]["tokens"].tolist() for i in range(20)] != [other[i]["tokens"].tolist() for i in range(20)]
    assert one[3]["labels"].tolist() == [token + 1 for token in one[3]["tokens"].tolist()]
    assert one[3]["attention_mask"][0, 2].tolist() == [False] * 3 + [True] * 5


# --- held-out loss, on real ranks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(ranks_factory, tmp_path_factory) -> Path:
    """A tiny teacher checkpoint with texts beside it."""
    folder = tmp_path_factory.mktemp("compress")
    ranks_factory(1).run(jobs_compress.make_teacher, str(folder), timeout=240)
    return folder


@pytest.mark.parametrize("layout", [{"devices": 2}, {"devices": 2, "tp": 2}, {"devices": 2, "pp": 2}])
def test_every_layout_measures_the_same(ranks, teacher, layout):
    alone = ranks(1).run(jobs_compress.measure, str(teacher), {}, timeout=240)[0]
    split = ranks(2).run(jobs_compress.measure, str(teacher), layout, timeout=240)
    for found in split:
        # fp32 sums in another order
        assert found["heldout_loss"] == pytest.approx(alone["heldout_loss"], abs=1e-5)
        for name in ("heldout_tokens", "parameters", "body_parameters"):
            assert found[name] == alone[name]


# --- the whole job ----------------------------------------------------------------------------------------------------


def _command(teacher: Path, output: Path, *more: str) -> list[str]:
    flags = {
        "--teacher": str(teacher / "checkpoint"),
        "--train-text": str(teacher / "train.jsonl"),
        "--heldout-text": str(teacher / "heldout.jsonl"),
        "--output": str(output),
        "--seq-length": "32",
        "--target-ffn-hidden-size": "64",
        "--target-num-layers": "3",
        "--prune-samples": "8",
        "--distill-steps": "12",
        "--distill-global-batch-size": "4",
        "--distill-micro-batch-size": "2",
        "--distill-warmup-steps": "2",
        "--distill-save-every": "2",
        "--distill-evaluate-every": "6",
        "--calibration-size": "4",
        "--calibration-batch-size": "2",
        "--calibration-seq-len": "32",
    }
    words = [word for pair in flags.items() for word in pair]
    return [sys.executable, str(ROOT / "scripts" / "compress.py"), *words, "--scratch", "--cpu", *more]


def _run(command: list[str], **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, **options)


def test_the_whole_job_killed_while_distilling(teacher, tmp_path):
    command = _command(teacher, tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        _wait_for(lambda: list((tmp_path / "distill" / "steps").glob("step-*[0-9]")) or process.poll(), 300)
        process.kill()
    pruned = stages.read_record(tmp_path / "prune")
    assert pruned is not None, (tmp_path / "log" / "rank0.txt").read_text()[-3000:]
    assert stages.read_record(tmp_path / "distill") is None

    done = _run(command)
    assert done.returncode == 0, done.stderr + (tmp_path / "log" / "rank0.txt").read_text()[-3000:]
    assert "distill   was interrupted, running again" in done.stderr
    assert stages.read_record(tmp_path / "prune") == pruned
    report = json.loads((tmp_path / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == [
        "teacher",
        "pruned",
        "distilled",
        "from scratch",
        "quantized",
    ]
    steps = [point["step"] for point in _curve(report, "distilled") if "loss" in point]
    assert steps == sorted(set(steps)), "a resumed run must not repeat steps in the curve"
    assert steps[-1] == 12
    shape = report["models"][1]["shape"]
    assert (shape["ffn_hidden_size"], shape["num_layers"]) == (64, 3)
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert not list(tmp_path.rglob("*.part"))

    again = _run(command)
    assert again.returncode == 0
    assert again.stderr.count("kept") == 7
    assert "loading NeMo" not in again.stderr

    planned = _run([*command, "--dry-run", "--algorithm", "int8"])
    assert [line.split(maxsplit=1)[1] for line in planned.stdout.splitlines()] == ["finished"] * 5 + ["would run"] * 2


def _curve(report: dict, model: str) -> list[dict]:
    return next(curve["points"] for curve in report["curves"] if curve["model"] == model)

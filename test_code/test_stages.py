"""The stages' state machine and the launcher of local ranks, killed on the way."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nemo_modelopt_dropin.compress import launch, stages
from nemo_modelopt_dropin.compress.stages import Stage, StageError

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

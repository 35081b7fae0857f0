"""The stages' state machine and the launcher of local ranks, killed on the way."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from nemo_modelopt_cli.compress import stages
from nemo_modelopt_cli.compress.stages import Stage, StageError
from nemo_modelopt_cli.process import launch
from nemo_modelopt_dropin import locks
from nemo_modelopt_dropin.errors import InUseError

ROOT = Path(__file__).resolve().parents[2]


class Log:
    """Stages that write down that they ran."""

    def __init__(self):
        self.ran: list[str] = []

    def stage(self, name, after=(), keeps_progress=False, fails=False, **stage_settings) -> Stage:
        def run(folder, records, out):
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
    with pytest.raises(StageError, match=f"{changed} .finished.: lr was 1 and is now 2"):
        stages.run_stages(chain(log, 2), tmp_path)
    assert log.ran == []
    stages.run_stages(chain(log, 2), tmp_path, redo=[changed])
    assert log.ran == list(runs_again)
    assert not list(tmp_path.glob("*.*"))
    stages.run_stages(chain(log, 2), tmp_path)
    assert log.ran == list(runs_again), "the same command again keeps what is finished"


def test_a_change_names_settings_stages_that_follow_and_the_way_out(tmp_path):
    log = Log()
    chain = [log.stage("a", text="0" * 64, kept=1), log.stage("b", ("a",)), log.stage("c", ("b",)), log.stage("d")]
    stages.run_stages(chain, tmp_path)
    other = [log.stage("a", text="1" * 64, kept=1, new=True), *chain[1:]]
    with pytest.raises(StageError, match=r"Use --redo a \(redo=\[...\] in Python\) to run them again") as caught:
        stages.run_stages(other, tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[1] == "  a (finished): new was null and is now true; the content of text changed"
    assert lines[2] == "    would be run again too: b, c"
    assert log.ran == list("abcd")
    with pytest.raises(StageError, match="--redo x: there is no such stage; the stages are a, b, c, d"):
        stages.run_stages(other, tmp_path, redo=["x"])


def test_a_change_asks_for_the_first_stages_and_lists_each_once(tmp_path):
    """Permission for a stage covers those that build on it; b and d both build on a, and e on d."""

    def chain(lr):
        log = Log()
        first = [log.stage("z", lr=1), log.stage("a", lr=lr), log.stage("b", ("a",), lr=lr), log.stage("c", ("b",))]
        return [*first, log.stage("d", lr=lr), log.stage("e", ("d", "b"))]

    stages.run_stages(chain(1), tmp_path)
    with pytest.raises(StageError, match=r"Use --redo a d \(redo") as caught:
        stages.check_redo(chain(2), tmp_path, [])
    assert str(caught.value).splitlines()[1:-1] == [
        "  a (finished): lr was 1 and is now 2",
        "    would be run again too: c, e",
        "  b (finished): lr was 1 and is now 2",
        "  d (finished): lr was 1 and is now 2",
    ]
    stages.check_redo(chain(2), tmp_path, ["a", "d"])


def test_permission_without_a_change_has_no_effect(tmp_path):
    log = Log()

    def chain(lr, fails=False):
        a, b = log.stage("a", lr=1), log.stage("b", ("a",), lr=lr)
        return [a, b, log.stage("c", ("b",), fails=fails), log.stage("d", ("a",))]

    assert stages.without_effect(chain(1), tmp_path, ["a", "b"]) == [], "they run anyway"
    stages.run_stages(chain(1), tmp_path)
    assert stages.without_effect(chain(1), tmp_path, ["b", "a", "b"]) == ["b", "a"]
    assert stages.without_effect(chain(2), tmp_path, ["a", "b", "c", "d"]) == ["d"]
    with pytest.raises(OSError, match="disk full"):
        stages.run_stages(chain(2, fails=True), tmp_path, redo=["b"])
    assert stages.without_effect(chain(2), tmp_path, ["b"]) == [], "it took effect before the interruption"
    shutil.rmtree(tmp_path / "d")
    stages.run_stages(chain(2)[:3], tmp_path)
    assert stages.without_effect(chain(2), tmp_path, ["a", "d"]) == ["a"], "d has no result to replace"


def test_permission_covers_the_stages_that_build_on_one_and_no_others(tmp_path):
    log = Log()
    stages.run_stages([log.stage("a", lr=1), log.stage("b", ("a",), lr=1), log.stage("c", lr=1)], tmp_path)
    other = [log.stage("a", lr=2), log.stage("b", ("a",), lr=2), log.stage("c", lr=2)]
    with pytest.raises(StageError, match=r"was written:\n  c \(finished\): lr was 1 and is now 2\nUse --redo c "):
        stages.run_stages(other, tmp_path, redo=["a"])
    stages.run_stages(other, tmp_path, redo=["a", "c"])
    assert log.ran == list("abcabc")


@pytest.mark.parametrize("finished", [False, True])
def test_the_old_result_stays_until_the_new_one_is_complete(tmp_path, finished):
    log = Log()
    stages.run_stages([log.stage("a", lr=1)], tmp_path)
    (tmp_path / "a" / "student").write_text("60 steps")
    old = stages.read_record(tmp_path / "a")
    with pytest.raises(OSError, match="disk full"):
        stages.run_stages([log.stage("a", keeps_progress=True, fails=True, lr=2)], tmp_path, redo=["a"])
    assert (tmp_path / "a" / "student").read_text() == "60 steps"
    assert stages.read_record(tmp_path / "a") == old
    if not finished:  # the old settings still find it finished
        assert stages.run_stages([log.stage("a", lr=1)], tmp_path)["a"] == old
        return
    (tmp_path / "a.new" / "checkpoint").write_text("step 3")
    record = stages.run_stages([log.stage("a", keeps_progress=True, lr=2)], tmp_path, redo=["a"])["a"]
    assert "checkpoint" in record.result["left"]
    assert record.attempts == 2
    assert stages.read_record(tmp_path / "a") == record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_paths_in_a_result_are_those_of_the_final_folder(tmp_path):
    def stage(lr):
        return Stage(
            "a", lambda folder, records, out: {"hf": {"path": str(folder / "hf")}, "at": [str(folder)]}, {"lr": lr}
        )

    stages.run_stages([stage(1)], tmp_path)
    record = stages.run_stages([stage(2)], tmp_path, redo=["a"])["a"]
    assert record.result == {"hf": {"path": str(tmp_path / "a" / "hf")}, "at": [str(tmp_path / "a")]}


@pytest.mark.parametrize("killed_at", range(1, 13))
def test_a_swap_killed_at_any_step_is_completed(tmp_path, monkeypatch, killed_at):
    log = Log()
    stages.run_stages([log.stage("a", lr=1)], tmp_path)
    steps = []

    class Killed(BaseException):
        """Stands for kill -9: no handler of the code runs after it."""

    def counted(function):
        def call(*args, **kwargs):
            steps.append(function)
            if len(steps) == killed_at:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for name in ("rename", "unlink", "rmdir", "mkdir"):
            patched.setattr(Path, name, counted(getattr(Path, name)))
        try:
            stages.run_stages([log.stage("a", lr=2)], tmp_path, redo=["a"])
        except Killed:
            pass
    assert stages.read_record(tmp_path / "a") or stages.read_record(tmp_path / "a.old")
    record = stages.run_stages([log.stage("a", lr=2)], tmp_path, redo=["a"])["a"]
    assert record.settings == {"lr": 2}
    assert stages.read_record(tmp_path / "a") == record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert len(log.ran) <= 3


def test_a_folder_that_is_not_a_stages_is_not_removed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("years of work")
    with pytest.raises(StageError, match="a holds files that this command did not write"):
        stages.run_stages([Log().stage("a")], tmp_path)
    assert (tmp_path / "a" / "thesis.tex").read_text() == "years of work"


def test_a_stage_whose_folder_was_removed_undoes_those_after_it(tmp_path):
    log = Log()
    chain = [log.stage("a"), log.stage("b", ("a",))]
    stages.run_stages(chain, tmp_path)
    shutil.rmtree(tmp_path / "a")
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
    with pytest.raises(StageError, match=r"a \(interrupted\): lr was 1 and is now 2"):
        stages.run_stages([log.stage("a", keeps_progress=True, lr=2)], tmp_path)
    assert (tmp_path / "a" / "checkpoint").exists()
    record = stages.run_stages([log.stage("a", keeps_progress=True, lr=2)], tmp_path, redo=["a"])["a"]
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
        stages.run_stages([log.stage("a"), log.stage("b", fails=True)], tmp_path, on_event=tell)
    stages.run_stages([log.stage("a"), log.stage("b")], tmp_path, on_event=tell)
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
    from nemo_modelopt_cli.compress.stages import Stage, run_stages
    from nemo_modelopt_dropin.locks import lock
    root = Path(sys.argv[1])
    def work(name, steps):
        def run(folder, records, out):
            progress = folder / "steps.txt"
            done = len(progress.read_text()) if progress.exists() else 0
            for step in range(done, steps):
                with open(progress, "a") as file:
                    file.write(name)
                time.sleep(0.02)
            return {"steps": progress.read_text(), "resumed from": done}
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
    assert second.result["resumed from"] >= 5
    assert second.attempts == 2


def test_two_runs_cannot_share_a_folder(tmp_path):
    held = "import sys, time; from pathlib import Path; from nemo_modelopt_dropin.locks import lock\n"
    held += "with lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", held, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(InUseError, match=f"process {process.pid}"), locks.lock(tmp_path):
            pass
        process.kill()
    with locks.lock(tmp_path):
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
    parent = "import sys; from nemo_modelopt_cli.process.launch import run_ranks; run_ranks(2, sys.argv[1:])"
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


def test_rank_zero_stays_until_no_rank_needs_the_store(monkeypatch):
    from torch.distributed import TCPStore

    from nemo_modelopt_cli.compress import training

    monkeypatch.setenv("WORLD_SIZE", "2")
    hosted = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = hosted, TCPStore("127.0.0.1", hosted.port, wait_for_workers=False)

    def peers(rank):
        found = object.__new__(training.StoreRanks)  # which would look for the store of a launcher
        found.rank, found.count, found.store = rank, 0, stores[rank]
        return found

    order = []

    def second_rank():
        two = peers(1)
        order.append(two.broadcast(None))
        time.sleep(0.3)  # the next rank to be scheduled may be the first one
        stores[1].set("port", "23")
        order.append("second")
        two.leave()

    thread = threading.Thread(target=second_rank)
    thread.start()
    one = peers(0)
    assert one.broadcast({"done": True}) == {"done": True}
    one.leave()
    order.append("first")
    thread.join()
    assert order == [{"done": True}, "second", "first"]

"""What is deleted, replaced and locked on disk: only what carries our marker, one run at a time."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_modelopt_dropin import files, locks
from nemo_modelopt_dropin.errors import InUseError, ModelOptConfigError

KIND = "calibration state"


def _folder(path: Path, **content: str) -> Path:
    path.mkdir(parents=True)
    for name, text in content.items():
        (path / name).write_text(text)
    return path


def _write(target: Path, **content: str) -> None:
    beside = files.staging(target, KIND)
    beside.mkdir()
    for name, text in content.items():
        (beside / name).write_text(text)
    files.publish(beside, target, KIND)


def _content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != files.MARKER}


# --- whose folder it is -----------------------------------------------------------------------------------------------


def test_what_a_user_wrote_is_neither_removed_nor_replaced(tmp_path):
    theirs = _folder(tmp_path / "work", thesis="years")
    with pytest.raises(ModelOptConfigError, match="holds thesis, which this package did not write"):
        files.remove(theirs, KIND)
    with pytest.raises(ModelOptConfigError, match="holds thesis, which this package did not write"):
        files.staging(theirs, KIND)
    assert _content(theirs) == {"thesis": "years"}
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_the_message_lists_three_entries_and_counts_the_rest(tmp_path):
    theirs = _folder(tmp_path / "work", a="", b="", c="", d="", e="")
    with pytest.raises(ModelOptConfigError, match=r"--state: .*work holds a, b, c and 2 more, .* use another folder"):
        files.check(theirs, KIND, "--state")


def test_empty_and_missing_folders_and_our_own_are_free(tmp_path):
    empty = _folder(tmp_path / "empty")
    assert [files.problem(path, KIND) for path in (tmp_path / "none", empty)] == [None, None]
    _write(empty, a="1")
    assert files.problem(empty, KIND) is None
    files.remove(empty, KIND)
    files.remove(empty, KIND)  # nothing there: nothing to do
    assert not empty.exists()


def test_content_of_another_kind_is_refused(tmp_path):
    _write(tmp_path / "state", a="1")
    with pytest.raises(ModelOptConfigError, match="holds a calibration state, not a recorded teacher"):
        files.check(tmp_path / "state", "recorded teacher", "--dump-teacher-topk")


def test_files_and_broken_links_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "is a file" in str(files.problem(tmp_path / "file", KIND))
    assert "broken link" in str(files.problem(tmp_path / "link", KIND))


def test_a_mount_point_cannot_be_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(ModelOptConfigError, match="is a mount point, .* use a folder in it"):
        files.staging(tmp_path, KIND)
    assert files.problem(tmp_path, files.COMPRESSION_RUN) is None, "it is written in place"


def test_a_replaced_folder_keeps_its_mode(tmp_path):
    target = tmp_path / "state"
    target.mkdir(mode=0o750)
    _write(target, a="1")
    assert target.stat().st_mode & 0o777 == 0o750


def test_what_a_user_added_to_our_folder_stays(tmp_path):
    target = tmp_path / "state"
    _write(target, a="1")
    (target / "notes").write_text("mine")
    _write(target, b="2")
    assert _content(target) == {"b": "2", "notes": "mine"}
    files.remove(target, KIND)
    assert _content(target) == {"notes": "mine"}
    assert files.problem(target, KIND) is None, "the folder can be written again"


def test_what_a_user_added_is_not_overwritten_by_new_content_of_the_same_name(tmp_path):
    target = tmp_path / "state"
    _write(target, a="1")
    (target / "b").write_text("mine")
    with pytest.raises(ModelOptConfigError, match="b in it was not written by this package"):
        _write(target, b="2")
    assert _content(target) == {"a": "1", "b": "mine"}


def test_claimed_entries_are_removed_with_the_folder(tmp_path):
    target = tmp_path / "state"
    _write(target, a="1")
    (target / "run.yaml").write_text("x")
    files.claim(target, "run.yaml")
    files.remove(target, KIND)
    assert not target.exists()


@pytest.mark.parametrize("entry", ["..", ".", "", "../thesis", "/etc", "a/b"])
def test_a_forged_marker_reaches_nothing_outside_its_folder(tmp_path, entry):
    _folder(tmp_path / "thesis", text="years")
    target = _folder(tmp_path / "state", a="1")
    (target / files.MARKER).write_text(json.dumps({"kind": KIND, "entries": [entry, "a", 3]}))
    files.remove(target, KIND)
    assert _content(tmp_path / "thesis") == {"text": "years"}
    assert not target.exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"kind": 1}', '{"kind": "calibration state"}', '{"entries": []}'])
def test_a_damaged_marker_makes_nothing_ours(tmp_path, text):
    target = _folder(tmp_path / "state", a="1")
    (target / files.MARKER).write_text(text)
    assert files.kind_of(target) is None
    with pytest.raises(ModelOptConfigError, match="holds a, which"):
        files.remove(target, KIND)


def test_links_are_followed_to_the_folder_and_never_through_an_entry(tmp_path):
    _folder(tmp_path / "thesis", text="years")
    _write(tmp_path / "real", a="1")
    (tmp_path / "link").symlink_to("real")
    _write(tmp_path / "link", b="2")
    assert (tmp_path / "link").is_symlink()
    assert _content(tmp_path / "real") == {"b": "2"}
    (tmp_path / "real" / "b").unlink()
    (tmp_path / "real" / "b").symlink_to(tmp_path / "thesis")
    files.remove(tmp_path / "real", KIND)
    assert _content(tmp_path / "thesis") == {"text": "years"}


def test_a_kill_while_a_folder_is_removed_leaves_no_part_that_looks_whole(tmp_path, monkeypatch):
    target, delete = tmp_path / "state", files._delete
    _write(target, a="1", b="2")

    def stops(path):
        delete(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_delete", stops)
    with pytest.raises(KeyboardInterrupt):
        files.remove(target, KIND)
    monkeypatch.setattr(files, "_delete", delete)
    assert not target.exists()
    files.remove(target, KIND)
    assert list(tmp_path.iterdir()) == []


# --- write aside, then rename -----------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    files.write_json(path, {"a": 1})

    def fails(beside):
        beside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), files.replacing(path) as beside:
        fails(beside)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["report.json"]


def test_a_planted_link_is_not_written_through(tmp_path):
    (tmp_path / "thesis").write_text("years")
    files.beside_path(tmp_path / "report.json").symlink_to("thesis")
    files.write_text(tmp_path / "report.json", "new")
    assert (tmp_path / "thesis").read_text() == "years"
    assert (tmp_path / "report.json").read_text() == "new"


def test_a_folder_beside_that_is_not_ours_stays(tmp_path):
    theirs = _folder(tmp_path / ".state.partial", thesis="years")
    with pytest.raises(ModelOptConfigError, match=r"\.state\.partial holds thesis"):
        files.staging(tmp_path / "state", KIND)
    assert _content(theirs) == {"thesis": "years"}


def test_what_a_killed_run_left_beside_is_removed(tmp_path):
    half = files.staging(tmp_path / "state", KIND)
    half.mkdir()
    (half / "half").write_text("x")
    _write(tmp_path / "state", a="1")
    assert _content(tmp_path / "state") == {"a": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_kill_at_any_rename_loses_neither_content(tmp_path, monkeypatch):
    """Stop `publish` before each of its renames: the next write finds the old content, or the new."""
    rename = Path.rename
    for at in range(3):
        target = tmp_path / f"at{at}" / "state"
        _write(target, a="old")
        (target / "notes").write_text("mine")
        count = 0

        def stops(path, to, stop_at=at):
            nonlocal count
            count += 1
            if count > stop_at:
                raise KeyboardInterrupt
            return rename(path, to)

        monkeypatch.setattr(Path, "rename", stops)
        with pytest.raises(KeyboardInterrupt):
            _write(target, a="new")
        monkeypatch.setattr(Path, "rename", rename)
        _write(target, a="newest")
        assert _content(target) == {"a": "newest", "notes": "mine"}
        assert [path.name for path in target.parent.iterdir()] == ["state"]


_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}


def _killed_at(step: int, work: Callable[[], None]) -> bool:
    """Do work in a forked process that ends as if killed before its n-th change of the disk; return whether it did."""
    child = os.fork()
    if child == 0:
        changes = 0

        def count(event: str, arguments: tuple) -> None:
            nonlocal changes
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            changes += event in _CHANGES or bool(writes)
            if changes > step:
                os._exit(9)

        code = 1
        try:
            sys.addaudithook(count)
            work()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("before", ["nothing", "killed while it wrote"])
def test_a_kill_at_any_change_of_the_disk_leaves_what_the_next_write_can_replace(tmp_path, before):
    for step in range(200):
        target = tmp_path / f"at{step}" / "state"
        _write(target, a="old")
        (target / "notes").write_text("mine")
        if before != "nothing":
            half = files.staging(target, KIND)
            _folder(half, b="half", c="half")
            _folder(half / "more", d="half")
        killed = _killed_at(step, functools.partial(_write, target, a="new", b="new"))
        _write(target, a="newest")
        assert _content(target) == {"a": "newest", "notes": "mine"}
        assert [path.name for path in target.parent.iterdir()] == ["state"]
        if not killed:
            break
    assert not killed
    assert step > 10


def test_a_kill_at_any_change_of_the_disk_leaves_what_the_next_removal_can_remove(tmp_path):
    for step in range(200):
        target = tmp_path / f"at{step}" / "state"
        _write(target, a="1", b="2")
        _folder(target / "more", d="3")
        files.claim(target, "more")
        killed = _killed_at(step, functools.partial(files.remove, target, KIND))
        files.remove(target, KIND)
        assert not [*target.parent.iterdir()]
        if not killed:
            break
    assert not killed
    assert step > 3


# --- one run at a time ------------------------------------------------------------------------------------------------


_HOLD = """
import sys, time
from pathlib import Path
from nemo_modelopt_dropin import locks
with locks.lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def _holder(output: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(output)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_at_once_and_the_holder_is_named(tmp_path):
    process = _holder(tmp_path / "out")
    try:
        started = time.monotonic()
        with (
            pytest.raises(InUseError, match=rf"out is in use by another run \(process {process.pid} on host \S+, for"),
            locks.lock(tmp_path / "out"),
        ):
            pass
        assert time.monotonic() - started < 1
        with locks.lock(tmp_path / "other"):
            pass
    finally:
        process.kill()
        process.communicate()
    with locks.lock(tmp_path / "out", patience_s=5):
        pass
    assert list(tmp_path.iterdir()) == []


def test_lock_files_of_killed_processes_are_removed_and_those_of_others_stay(tmp_path):
    dead, alive = _holder(tmp_path / "dead"), _holder(tmp_path / "alive")
    try:
        dead.kill()
        dead.communicate()
        assert sorted(path.name for path in tmp_path.iterdir()) == [".alive.lock", ".dead.lock"]
        locks.tidy(tmp_path / "dead", tmp_path / "alive", tmp_path / "none")
        assert [path.name for path in tmp_path.iterdir()] == [".alive.lock"]
    finally:
        alive.kill()
        alive.communicate()


def test_what_a_process_holds_is_released_before_it_ends_at_once(tmp_path):
    with locks.lock(tmp_path / "out"):
        locks.release_all()
        assert list(tmp_path.iterdir()) == []
    with locks.lock(tmp_path / "out"):
        pass


def test_both_names_of_a_linked_folder_are_one_output(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    process = _holder(tmp_path / "real")
    try:
        with pytest.raises(InUseError, match="link is in use"), locks.lock(tmp_path / "link"):
            pass
    finally:
        process.kill()
        process.communicate()


def _outlive(pipe) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe.send(os.getpid())
    time.sleep(60)


def _fork_and_die(output: Path, pipe) -> None:
    with locks.lock(output):
        child = multiprocessing.get_context("fork").Process(target=_outlive, args=(pipe,))
        child.start()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_forked_child_that_outlives_its_parent_does_not_hold_the_lock(tmp_path):
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    parent = context.Process(target=_fork_and_die, args=(tmp_path / "out", theirs))
    parent.start()
    assert ours.poll(60)
    orphan = ours.recv()
    try:
        parent.join()  # without a timeout it waits for the process alone, and not for the orphan's pipes
        assert parent.exitcode == -signal.SIGKILL
        os.kill(orphan, 0)  # it lives
        with locks.lock(tmp_path / "out"):
            pass
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_a_forked_child_is_refused_what_its_parent_holds(tmp_path):
    read, write = os.pipe()
    with locks.lock(tmp_path / "out"):
        if os.fork() == 0:
            try:
                with locks.lock(tmp_path / "out"):
                    os.write(write, b"held")
            except InUseError:
                os.write(write, b"refused")
            finally:
                os._exit(0)
        os.wait()
        assert os.read(read, 10) == b"refused"
        process = subprocess.run([sys.executable, "-c", _HOLD, str(tmp_path / "out")], capture_output=True, text=True)
        assert "InUseError" in process.stderr, "the child's end has released nothing"


def test_a_process_may_hold_an_output_several_times(tmp_path):
    with locks.lock(tmp_path / "out"):
        with locks.lock(tmp_path / "out"):
            pass
        process = subprocess.run([sys.executable, "-c", _HOLD, str(tmp_path / "out")], capture_output=True, text=True)
        assert "InUseError" in process.stderr


def test_folders_made_for_the_lock_go_if_nothing_was_written(tmp_path):
    with locks.lock(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_the_same_name_is_not_overwritten(tmp_path):
    (tmp_path / ".out.lock").write_text("mine")
    with pytest.raises(ModelOptConfigError, match=r"\.out\.lock is not a lock of"), locks.lock(tmp_path / "out"):
        pass
    (tmp_path / ".out.lock").unlink()
    (tmp_path / "thesis").write_text("")
    (tmp_path / ".out.lock").symlink_to("thesis")
    with pytest.raises(ModelOptConfigError, match="cannot be locked"), locks.lock(tmp_path / "out"):
        pass
    assert (tmp_path / "thesis").read_text() == ""


def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, caplog):
    def fails(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "lockf", fails)
    with locks.lock(tmp_path / "out"):
        pass
    assert "do not start a second run that writes to it" in caplog.text

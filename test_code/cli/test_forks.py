"""Ranks that are forked from a command's process: what they are, how they end, and when processes start instead."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nemo_modelopt_cli.process import forks, imports
from nemo_modelopt_dropin import ranks
from nemo_modelopt_dropin.console import screen
from test_code.support import started

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("collects", [True, False])
def test_imports_are_not_collected_and_stay(collects):
    was, frozen, done = gc.isenabled(), gc.get_freeze_count(), []
    gc.callbacks.append(note := lambda phase, info: done.append(phase))
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(ImportError, match="none"), imports.uncollected():
            done.clear()
            kept = [[] for _ in range(100_000)]
            during = list(done)
            raise ImportError("none")
        assert not during
        assert gc.isenabled() is collects
        assert gc.get_freeze_count() >= frozen + len(kept)
    finally:
        gc.callbacks.remove(note)
        (gc.enable if was else gc.disable)()


# A command on two ranks; ``work(rank)`` is defined between the two parts.
_BEGIN = """
    import json, os, signal, sys, threading, time
    from pathlib import Path
    from nemo_modelopt_cli.process import entry, forks, launch, signals

    folder = Path(sys.argv[1])
"""
_END = """
    def main():
        forks.load()
        assert forks.are_ready()
        code = launch.fork_ranks(2, {"OMP_NUM_THREADS": "3"})
        if code is not None:
            (folder / "parent").write_text(str(code))
            return code
        rank = int(os.environ["RANK"])
        (folder / f"{rank}.pid").write_text(str(os.getpid()))
        return work(rank)

    sys.exit(entry.run(lambda: signals.guarded(main, "interrupted")))
"""
STAYS = """
    def work(rank):
        time.sleep(100)
"""


def _command(folder: Path, work: str) -> list[str]:
    script = folder / "command.py"
    script.write_text("\n".join(map(textwrap.dedent, (_BEGIN, work, _END))))
    return [str(script), str(folder)]


def _pids(folder: Path) -> list[int]:
    """Return the ranks' process numbers once both are there."""
    deadline = time.monotonic() + 60
    while not all((folder / f"{rank}.pid").exists() and (folder / f"{rank}.pid").read_text() for rank in (0, 1)):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.02)
    return [int((folder / f"{rank}.pid").read_text()) for rank in (0, 1)]


STATE = """
    def work(rank):
        import torch
        from lightning.pytorch.utilities import rank_zero_only
        from nemo.utils import logging
        (folder / f"{rank}.json").write_text(json.dumps({
            "environment": dict(os.environ),
            "threads": torch.get_num_threads(),
            "rank of lightning": rank_zero_only.rank,
            "handlers": sorted(logging._handlers),
            "forked": forks.is_rank(),
            "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        }))
        print("rank", rank)
        return 0
"""


def test_a_forked_rank_is_what_a_started_one_is(commands, tmp_path):
    done = commands.run(_command(tmp_path, STATE), ENVIRONMENT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0", "rank 1"], "what the parent had written is written once"
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for rank, found in enumerate((first, second)):
        variables = found["environment"]
        assert (variables["RANK"], variables["LOCAL_RANK"], variables["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert variables[ranks.STARTED_BY_US] == "2"
        assert variables["OMP_NUM_THREADS"] == "3" and found["threads"] == 3
        assert found["rank of lightning"] == rank
        assert found["forked"] and found["blocked"] == []
    assert first["environment"]["MASTER_PORT"] == second["environment"]["MASTER_PORT"]
    # NeMo's logger, which reads the rank while it is imported: only rank zero writes to the screen.
    assert {"stream_stdout", "stream_stderr", "memory_err"} <= {*first["handlers"]}
    assert second["handlers"] == ["memory_all"]


@pytest.mark.parametrize(
    ("work", "code"),
    [
        ("def work(rank):\n    return 3 if rank else time.sleep(100)", 3),
        ("def work(rank):\n    time.sleep(100) if rank else os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("def work(rank):\n    time.sleep(100) if rank else {}['missing']", 1),
    ],
    ids=["exits", "is killed", "raises"],
)
def test_the_first_rank_that_fails_ends_the_others(commands, tmp_path, work, code):
    before = time.monotonic()
    with commands.start(_command(tmp_path, work), ENVIRONMENT, tmp_path, stderr=subprocess.PIPE) as process:
        seen = process.stderr.read()
    assert process.returncode == code, seen
    assert ("KeyError: 'missing'" in seen) is (code == 1)
    assert time.monotonic() - before < 60 and not process.alive()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_ranks_with_one_message(commands, tmp_path, number, code):
    with commands.start(_command(tmp_path, STAYS), ENVIRONMENT, tmp_path, stderr=subprocess.PIPE) as process:
        _pids(tmp_path)
        process.send_signal(number)
        seen = process.stderr.read()
    assert (process.returncode, (tmp_path / "parent").read_text()) == (code, str(code))
    assert seen == "" and not process.alive()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux signals a child when its parent ends")
def test_killing_the_parent_kills_the_ranks(commands, tmp_path):
    with commands.start(_command(tmp_path, STAYS), ENVIRONMENT, tmp_path, stderr=subprocess.DEVNULL) as process:
        pids = _pids(tmp_path)
        assert all(any(line.startswith(f"{pid} ") for line in process.alive()) for pid in pids)
        process.kill()
    started.wait_for_end(process.pid)


THREAD = """
    def work(rank):
        raise AssertionError("no rank is forked")

    threading.Thread(target=time.sleep, args=(2,), daemon=True).start()
    assert not forks.possible()
    (folder / "checked").touch()
"""


def test_ranks_are_not_forked_beside_other_threads(commands, tmp_path):
    """A lock that another thread holds would never be released in a rank."""
    done = commands.run(_command(tmp_path, THREAD), ENVIRONMENT, tmp_path)
    assert (tmp_path / "checked").exists(), done.stderr
    assert "assert forks.are_ready()" in done.stderr and not list(tmp_path.glob("*.pid"))


def test_ranks_are_not_forked_from_a_program_that_calls_a_command():
    assert not forks.possible() and not forks.are_ready()


def test_warnings_that_are_not_shown_while_loading_are_counted_once(tmp_path, capfd):
    for carry, text in (True, "while loading"), (False, "later"):
        with screen.quiet(tmp_path / "log", carry):
            logging.getLogger("a.library").warning(text)
    shown = capfd.readouterr().err
    assert shown == "2 warnings of libraries are not shown here; -v shows them\n"

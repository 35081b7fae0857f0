"""Fork the ranks of a command from its own process once that has imported NeMo: N ranks import it once.

Importing takes about ten seconds of processor time, and the imported modules hundreds of megabytes, which forked
ranks share.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from nemo_modelopt_cli.process import entry, imports, processes

# A thread of pyarrow's allocator, which prepares for forks by itself.
_HARMLESS_THREADS = {"jemalloc_bg_thd"}
_POLL_S = 0.05
_threads = "OMP_NUM_THREADS"
_state = {"loaded": False, "forked": False}


class Forked:
    """A forked process, with the part of ``subprocess.Popen`` that the launcher uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the process runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process and return its exit code.

        Raises:
            subprocess.TimeoutExpired: If the process still runs after ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(_POLL_S)
        return code

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def possible() -> bool:
    """Return whether ranks can be forked from this process.

    It must be that of a command, because a rank returns through all callers and ends as the command does. Another
    thread could hold a lock at the time of the fork that nothing in the rank would release.
    """
    if not sys.platform.startswith("linux") or not entry.is_command() or threading.active_count() > 1:
        return False
    names = [_name(task) for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    return _HARMLESS_THREADS.issuperset(names)


def _name(task: Path) -> str:
    try:
        return (task / "comm").read_text().strip()
    except OSError:  # it has ended
        return next(iter(_HARMLESS_THREADS))


def are_ready() -> bool:
    """Return whether this process has loaded what ranks need, and they can be forked from it."""
    return _state["loaded"] and possible()


def is_rank() -> bool:
    """Return whether this process is a rank that was forked."""
    return _state["forked"]


def load() -> None:
    """Import NeMo and enable the CPU backend, without threads, so that ranks can be forked from this process."""
    before = os.environ.get(_threads)
    os.environ[_threads] = "1"  # NumPy and PyTorch start none; each rank sets its number
    try:
        with imports.uncollected():
            from nemo_modelopt_dropin import cpu_backend

            cpu_backend.enable()
            import nemo.collections.llm.modelopt  # noqa: F401
    finally:
        if before is None:
            del os.environ[_threads]
        else:
            os.environ[_threads] = before
    _state["loaded"] = True


def become_rank(parent: int, variables: Mapping[str, str]) -> None:
    """Make this forked process what one is that was started as a rank, with these variables.

    Args:
        parent: number of the process that forked this one; the rank ends with it.
        variables: of the rank's environment.
    """
    _state["forked"] = True
    processes.end_with(parent)
    os.environ.update(variables)
    import torch

    torch.set_num_threads(int(os.environ[_threads]))
    if rank := int(os.environ["RANK"]):
        _set_rank(rank)


def _set_rank(rank: int) -> None:
    """Set the rank for libraries that read it while they are imported: only rank zero writes their messages."""
    for module in list(sys.modules.values()):
        function = getattr(module, "__dict__", {}).get("rank_zero_only")
        if hasattr(function, "rank"):
            setattr(function, "rank", rank)  # noqa: B010
    from nemo.utils import logging

    logging.remove_stream_handlers()
    errors = logging._handlers.pop("memory_err", None)
    if errors is not None:
        logging._logger.removeHandler(errors)
    logging.rank = "UNK"

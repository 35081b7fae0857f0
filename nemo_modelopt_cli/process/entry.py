"""Run a command: exit without a traceback if its output is closed, and report a full disk. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import sys
from collections.abc import Callable, Iterator

from nemo_modelopt_cli.process import processes

CLOSED_SCREEN = 141  # as of a program that SIGPIPE ended
# What libraries write of a system's error that they do not pass on as an OSError: C++ and Rust writers of files.
_FULL = ("no space left on device", "os error 28", "disk quota exceeded", "os error 122")
_TOO_LARGE = ("file too large", "os error 27")
# Failed writes that PyTorch and NeMo report without the reason.
_UNEXPLAINED = ("pytorchstreamwriter failed", "file write failed", "unexpected pos", "could not be written")
_NEARLY_FULL = 1 << 20
_state = {"command": False}


def run(main: Callable[[], int]) -> int:
    """Run a script's main function and return its exit code.

    Its children end with it, and if the reader of its output has gone (``| head``) it ends without a traceback.
    """
    _state["command"] = True
    processes.children_end_with_this_process()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, which does not end its ranks if it is killed
        processes.end_with(os.getppid())
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not any(is_closed(stream.fileno()) for stream in (sys.stdout, sys.stderr)):
            raise
        silence(1, 2)
        return CLOSED_SCREEN


def is_command() -> bool:
    """Return whether this process runs a command from its start to its end, and no program that calls our functions."""
    return _state["command"]


def is_closed(descriptor: int) -> bool:
    """Return whether a descriptor is a pipe that nobody reads any more."""
    with contextlib.suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def silence(*descriptors: int) -> None:
    """Discard what is still written to closed pipes: Python flushes its streams at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        if is_closed(descriptor):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it came from, with what exceptions of distributed checkpoints collect by rank."""
    waiting, known = [error], set()
    while waiting:
        one = waiting.pop()
        if id(one) in known:
            continue
        known.add(id(one))
        yield one
        collected = getattr(one, "failures", None)
        found = list(collected.values()) if isinstance(collected, dict) else []
        found += [item for value in found if isinstance(value, tuple) for item in value]
        waiting += [item for item in (*found, one.__cause__, one.__context__) if isinstance(item, BaseException)]


def storage_problem(error: BaseException, folder: str | os.PathLike[str]) -> str | None:
    """Return a sentence if an error says that the disk is full or a file too large, else None.

    Args:
        error: what ended the work.
        folder: where the work writes, to look at the space if the error gives no reason.
    """
    for one in _chain(error):
        number = one.errno if isinstance(one, OSError) else None
        text = str(one).lower()
        path = getattr(one, "filename", None) or folder
        if number in (errno.ENOSPC, errno.EDQUOT) or any(part in text for part in _FULL):
            return _full(path)
        if number == errno.EFBIG or any(part in text for part in _TOO_LARGE):
            return _too_large(path)
        if any(part in text for part in _UNEXPLAINED):
            if _free(folder) < _NEARLY_FULL:
                return _full(path)
            if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
                return _too_large(path)
    return None


def _full(path: str | os.PathLike[str]) -> str:
    return f"the disk is full: {os.fspath(path)}. Free some space and run the same command again."


def _too_large(path: str | os.PathLike[str]) -> str:
    return (
        f"a file is larger than the file system or the limit (ulimit -f) allows: {os.fspath(path)}. Raise the limit or "
        "write elsewhere, and run the same command again."
    )


def _free(folder: str | os.PathLike[str]) -> int:
    """Return the free bytes of the file system of a folder, or of its nearest parent that exists."""
    place = os.path.abspath(folder)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize

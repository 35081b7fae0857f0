"""Let child processes end with their parent, so that a killed run leaves nothing behind. Standard library only.

Megatron writes checkpoints in forked processes, which wait forever if their parent is killed, and keeps a queue in a
spawned one. Linux can send a child a signal when the thread that started it ends; elsewhere this does nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG = 1
_state: dict[str, Any] = {"prctl": None, "parent": None}


def _prctl() -> Callable[..., int] | None:
    """Return the system's prctl, or None if there is none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None


def children_end_with_this_process() -> None:
    """Let every process that is forked from now on end when this one does, also by ``kill -9``; call it once.

    Only forks of the main thread are covered: the signal comes when the thread that forked ends, and a worker of a
    thread that has done its work must not be killed.
    """
    if _state["prctl"] is not None:
        return
    _state["prctl"] = _prctl()
    if _state["prctl"] is not None:
        os.register_at_fork(before=_remember, after_in_child=_in_child)


def _remember() -> None:
    main = threading.current_thread() is threading.main_thread()
    _state["parent"] = os.getpid() if main else None


def _in_child() -> None:
    if _state["parent"] is not None:
        end_with(_state["parent"])


def end_with(parent: int) -> None:
    """End this process when its parent does, or now if the parent has already ended.

    Args:
        parent: process number of the parent.
    """
    prctl = _state["prctl"] or _prctl()
    if prctl is None:
        return
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the signal was set
        os._exit(128 + signal.SIGKILL)


def import_in_spawned_children(path: str | os.PathLike[str]) -> None:
    """Let multiprocessing import a file in spawned children, in place of the main module's file.

    It imports neither the ``__main__.py`` of a package nor, in the children of an installed command, a file of ours.

    Args:
        path: a file that calls `spawned_child` when it is imported as ``__mp_main__``.
    """
    main = sys.modules["__main__"]
    main.__file__, main.__spec__ = os.fspath(path), None


def spawned_child() -> None:
    """End this process with its parent; call it where multiprocessing imports the main module in a spawned child."""
    end_with(os.getppid())

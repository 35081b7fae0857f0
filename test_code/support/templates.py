"""Processes that have imported what a task needs, and fork a copy of themselves for each task.

A template is started by multiprocessing's fork server, which has most of NeMo imported (`preload`), and prepares itself
once. What it forks has its own session or group, streams and environment, and shares nothing with its siblings that one
could change. A template has one thread, so that no lock is held when it forks.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import select
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import reduction
from typing import TypeVar

_START_TIMEOUT = 240.0


class Forked:
    """A forked process, with the attributes of ``subprocess.Popen`` that the tests use."""

    def __init__(self, template: Template, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._template = template
        self._descriptor = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the process runs."""
        return self._wait(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code; raise as ``Popen.wait`` does."""
        code = self._wait(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return code

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            if not select.select([self._descriptor], [], [], timeout)[0]:
                return None
            os.close(self._descriptor)
            self.returncode = self._template.code_of(self.pid)
        return self.returncode


F = TypeVar("F", bound=Forked)


class Template:
    """A process that calls a function once, and forks; started when it is first used."""

    def __init__(self, prepare: Callable[..., None], *args) -> None:
        """Store the preparation.

        Args:
            prepare: module-level function that the template calls first; it must not start threads.
            *args: its arguments.
        """
        self._prepare, self._args = prepare, args
        self._pipe = None
        self._process = None

    def fork(self, target: Callable[..., None], args: tuple, descriptor: int, kind: type[F] = Forked) -> F:
        """Fork a process that calls ``target(*args, descriptor)`` and then ends.

        Args:
            target: module-level function.
            args: its first arguments, which are pickled.
            descriptor: of this process; ``target`` gets the number of its copy.
            kind: class of what is returned.
        """
        return kind(self, self._ask(("fork", target, args), descriptor))

    def code_of(self, pid: int) -> int:
        """Return the exit code of a process that has ended, negative for a signal."""
        return self._ask(("ended", pid))

    def close(self) -> None:
        """End the template, but not what it forked."""
        if self._process is not None:
            atexit.unregister(self.close)
            self._pipe.close()
            self._process.join(10)
            self._process.kill()
            self._process = self._pipe = None

    def _ask(self, request: tuple, descriptor: int | None = None):
        if self._process is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["test_code.support.preload"])
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._prepare, *self._args), daemon=False)
            self._process.start()
            theirs.close()
            # Before multiprocessing, which waits for its children at exit.
            atexit.register(self.close)
        self._pipe.send(request)
        if descriptor is not None:
            reduction.send_handle(self._pipe, descriptor, self._process.pid)
        assert self._pipe.poll(_START_TIMEOUT), "the template of the test processes does not answer"
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def _serve(pipe, prepare: Callable[..., None], *args) -> None:
    """Run as a template, until the test process closes the pipe."""
    problem = None
    try:
        prepare(*args)
    except BaseException:
        problem = traceback.format_exc()
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        if request[0] == "ended":
            pipe.send(os.waitstatus_to_exitcode(os.waitpid(request[1], 0)[1]))
            continue
        descriptor = reduction.recv_handle(pipe)
        threads = [one.name for one in threading.enumerate()[1:]]
        if problem or threads:
            pipe.send(problem or f"the template has started threads: {threads}")
            os.close(descriptor)
            continue
        pid = os.fork()
        if not pid:
            pipe.close()
            _become(*request[1:], descriptor)
        os.close(descriptor)
        pipe.send(pid)


def _become(target: Callable[..., None], args: tuple, descriptor: int) -> None:
    """Call a function in a forked process, and end the process."""
    code = 1
    try:
        target(*args, descriptor)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        faulthandler.disable()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

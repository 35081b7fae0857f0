"""Start commands as processes of their own that need not import NeMo, which takes 15 seconds of processor time.

A server imports NeMo once and forks a process for each command. That process has its own session, environment,
folder and streams, and runs the script from its first line, as an interpreter would. Tests of what happens before NeMo
is imported, and of the import itself, start an interpreter instead.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from nemo_modelopt_cli.process import imports
from test_code.support import templates


class Started(templates.Forked):
    """A running command, with the attributes of ``subprocess.Popen`` that the tests use."""

    def __init__(self, template: templates.Template, pid: int) -> None:
        super().__init__(template, pid)
        self.stderr: IO[str] | None = None

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self.kill()
        self.wait()
        if self.stderr is not None:
            self.stderr.close()

    def send_signal(self, number: int) -> None:
        """Send a signal to the command's first process."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the command's first process."""
        self.send_signal(signal.SIGKILL)

    def alive(self) -> list[str]:
        """Return the processes of this command that run, its children among them."""
        return processes_of(self.pid)


class Server(templates.Template):
    """The process that has imported NeMo; started when it is first used."""

    def __init__(self) -> None:
        super().__init__(_import_nemo)

    def start(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        stderr: int | None = None,
    ) -> Started:
        """Start a script with its arguments, as ``subprocess.Popen`` would.

        Args:
            command: the script and its arguments; an interpreter before them is passed over.
            env: all variables of its environment; those of this process by default.
            cwd: its working directory; that of this process by default.
            stderr: ``subprocess.PIPE`` to read its stderr, ``subprocess.DEVNULL`` for none; this process's by default.
        """
        if stderr == subprocess.PIPE:
            reader, writer = os.pipe()
            with os.fdopen(writer, "w") as end:
                started = self._start(command, env, cwd, os.devnull, end)
            started.stderr = os.fdopen(reader)
            return started
        name = os.devnull if stderr == subprocess.DEVNULL else "/dev/stderr"
        with open(name, "a") as end:
            return self._start(command, env, cwd, os.devnull, end)

    def run(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        timeout: float = 600.0,
        during: Callable[[int], contextlib.AbstractContextManager] | None = None,
    ) -> subprocess.CompletedProcess:
        """Run a script to its end and return its exit code and what it printed, as ``subprocess.run`` would.

        Args:
            command: as for `start`, as the next two.
            env: all variables of its environment.
            cwd: its working directory.
            timeout: seconds that it may take.
            during: returns a context for the time in which the command runs, from the number of its process.
        """
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            watch = during or contextlib.nullcontext
            with err.open("a") as end, self._start(command, env, cwd, str(out), end) as started, watch(started.pid):
                started.wait(timeout)
            code = started.returncode
            return subprocess.CompletedProcess(list(command), code, _text(out), _text(err))

    def _start(self, command, env, cwd, out: str, err: IO[str]) -> Started:
        words = [str(word) for word in command]
        if words[0] == sys.executable:
            del words[0]
        assert not words[0].startswith("-"), "start an interpreter for -c and -m"
        args = words, dict(os.environ if env is None else env), str(cwd or os.getcwd()), out
        return self.fork(_become, args, err.fileno(), Started)


def processes_of(session: int) -> list[str]:
    """Return the process numbers and command lines of a session's processes that run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, owner = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(owner) == session and state != "Z":
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"{folder.name} {line}")
    return found


def has_file(folder: Path, pattern: str) -> bool:
    """Return whether a folder that another process works in has files of this pattern, as for ``Path.glob``.

    The other process renames folders: one that ``glob`` has listed may be gone when it looks into it.
    """
    try:
        return any(folder.glob(pattern))
    except FileNotFoundError:
        return False


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _import_nemo() -> None:
    with imports.uncollected():
        import nemo.collections.llm.modelopt  # noqa: F401


def _become(words: list[str], env: dict[str, str], cwd: str, out: str, err: int) -> None:
    """Be the process of a command: take its place, run its script, and end with its exit code."""
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        written = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for target, source in enumerate((nothing, written, err)):
            os.dup2(source, target)
        os.close(err)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        _set_threads()
        sys.argv[:] = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        code = _run(words[0])
    finally:
        os._exit(code)


def _set_threads() -> None:
    """Do what torch does with this variable when it is imported."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))


def _run(script: str) -> int:
    """Run a script and return the exit code that an interpreter would have."""
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            sys.stderr.write(error.code + "\n")
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return code


def wait_for_end(session: int, seconds: float = 10.0) -> None:
    """Wait until no process of a command runs any more."""
    deadline = time.monotonic() + seconds
    while found := processes_of(session):
        assert time.monotonic() < deadline, f"still running: {found}"
        time.sleep(0.02)

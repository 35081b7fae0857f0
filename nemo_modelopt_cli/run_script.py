"""Run the work of a command: start ranks and the CPU backend, redirect library output, write the run file."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from nemo_modelopt_cli import run_file
from nemo_modelopt_cli.parser import saved_settings
from nemo_modelopt_cli.process import entry, forks, imports, rendezvous, signals
from nemo_modelopt_dropin import files, locks, ranks
from nemo_modelopt_dropin.errors import InUseError, ModelOptConfigError


@dataclass(frozen=True)
class Script:
    """Describe a command to `execute`.

    Args:
        name: as people call it.
        output: what the script writes, where the run file goes.
        paths: settings that are paths, or may be: the run file holds them so that they work from everywhere.
        others: what else the script writes; no other run may write there meanwhile.
        keeps_progress: True if the same command resumes after an interruption; the run file is then written first.
        state: the folder of a calibration state that may outlive the run.
    """

    name: str
    output: Path
    paths: tuple[str, ...]
    keeps_progress: bool = False
    others: tuple[Path, ...] = ()
    state: Path | None = None


class _Interrupted:
    """What is printed after an interruption, put together at that time."""

    def __init__(self, script: Script):
        self.script = script

    def __str__(self) -> str:
        if self.script.keeps_progress:
            return signals.RESUMABLE
        state = self.script.state
        if state is not None and files.is_ours(state, files.CALIBRATION_STATE):
            return f"interrupted; the calibrated state is kept in {state}, run the same command again to use it"
        return signals.NOTHING_WRITTEN


Rows = list[tuple[str, str]]


def execute(script: Script, given: argparse.Namespace, work: Callable[[argparse.Namespace], Rows | None]) -> int:
    """Do the work on every rank and return the exit code.

    What ``work`` returns, rows of a label and a text, is shown at the end.

    With ``given.cpu`` this starts ``given.devices`` ranks itself unless it is one of them; on GPUs torchrun (or
    Lightning itself) does, as for NeMo's own scripts. Rank zero writes the run file once the work is done.
    """
    after = _Interrupted(script)
    return signals.guarded(lambda: _execute(script, given, work, after), after)


def _execute(
    script: Script,
    given: argparse.Namespace,
    work: Callable[[argparse.Namespace], Rows | None],
    after: _Interrupted,
    started: float | None = None,
) -> int:
    from nemo_modelopt_cli.compress import runner

    started = started or time.perf_counter()
    with contextlib.ExitStack() as held:
        try:
            for output in (script.output, *script.others) if ranks.is_first() else ():
                held.enter_context(locks.lock(output))
        except (InUseError, ModelOptConfigError) as error:
            sys.stderr.write(f"error: {error}\n")
            return runner.FAILED if isinstance(error, InUseError) else runner.USAGE
        if not starts_ranks(given.devices, given.cpu):
            return _as_rank(script, given, work, after, started)
        if forks.possible() and (code := _load_for_ranks(script, given, after)):
            return code
    # The locks are free again: rank zero takes them, which is the rank that writes.
    found = run_local_ranks(given.devices)
    if found is None:
        return _execute(script, given, work, after, started)
    locks.tidy(script.output, *script.others)
    if signals.is_ours(found):
        sys.stderr.write(f"{after}\n")
    return found


def _load_for_ranks(script: Script, given: argparse.Namespace, after: _Interrupted) -> int:
    """Import NeMo in this process, so that ranks can be forked from it, and return the exit code."""
    from nemo_modelopt_cli.compress import runner

    log = None if given.verbose else _log_file(script.name, 0)
    code = runner.load_for_ranks(f"{script.name}: ", log, after, keep_log=False, output=script.output)
    _discard(log, code)
    return code


def _discard(log: Path | None, code: int) -> None:
    """Remove a rank's log unless it explains what went wrong."""
    from nemo_modelopt_cli.compress import runner

    if log is not None and (code in (runner.OK, runner.USAGE, entry.CLOSED_SCREEN) or signals.is_ours(code)):
        log.unlink(missing_ok=True)


def _as_rank(
    script: Script,
    given: argparse.Namespace,
    work: Callable[[argparse.Namespace], Rows | None],
    after: _Interrupted,
    started: float,
) -> int:
    from nemo_modelopt_cli.compress import runner

    rank = ranks.number()
    settings = saved_settings(given, script.paths)

    def on_this_rank(out: TextIO) -> None:
        if rank == 0 and not forks.is_rank():
            out.write(f"{script.name}: {runner.LOADING}\n")
        with imports.uncollected():
            if given.cpu:
                start_on_cpu()
            else:
                runner.require_gpu()
            import nemo.collections.llm.modelopt  # noqa: F401
        rendezvous.keep_on_loopback()
        if rank == 0 and script.keeps_progress:
            save(script, settings)
        found = work(given)
        if rank == 0:
            save(script, settings)
            out.writelines(f"{line}\n" for line in aligned(found or []))
            out.write(f"{script.name}: wrote {script.output} in {time.perf_counter() - started:.0f} s\n")

    log = None if given.verbose else _log_file(script.name, rank)
    made = not script.output.exists()
    code = runner.guarded(on_this_rank, log, after, keep_log=False, output=script.output)
    if made and code == runner.USAGE and rank == 0:
        _unmake(script.output)
    kept = script.output / run_file.NAME
    if code != runner.OK and script.keeps_progress and rank == 0 and script.output.exists() and not kept.exists():
        save(script, settings)  # NeMo moves what lay there before
    _discard(log, code)
    return code


def aligned(rows: Rows) -> Iterable[str]:
    """Yield the rows as aligned text; a row without a label continues the one before."""
    width = max((len(label) for label, _ in rows), default=0)
    for label, text in rows:
        yield f"{label:<{width}}  {text}"


def save(script: Script, settings: dict) -> Path:
    """Write the run file into the script's output, so that ``--config`` with it is the same run."""
    files.own(script.output, files.TRAINING_RUN, run_file.NAME)
    heading = f"nemo-modelopt {script.name} --config {run_file.NAME}"
    return run_file.write(script.output / run_file.NAME, settings, heading)


@contextlib.contextmanager
def standing_in(folder: str | Path) -> Iterator[None]:
    """Work in ``folder``: NeMo's validation has a default logger, which writes into the working directory."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _unmake(output: Path) -> None:
    """Remove the folder that a run with invalid arguments created, unless it holds more than the run file."""
    if files.is_ours(output, files.TRAINING_RUN):
        files.remove(output, files.TRAINING_RUN)


def _log_file(name: str, rank: int) -> Path:
    handle, path = tempfile.mkstemp(prefix=f"{name}-rank{rank}-", suffix=".log")
    os.close(handle)
    return Path(path)


def start_on_cpu() -> None:
    """Let this process run Megatron on the CPU over gloo; call it before NeMo is imported."""
    from nemo_modelopt_cli.compress import runner

    runner.cpu_environment()
    from nemo_modelopt_dropin import cpu_backend

    cpu_backend.enable()


def starts_ranks(devices: int, cpu: bool) -> bool:
    """Return whether this process starts ranks, because it is not one itself."""
    return cpu and devices != 1 and not ranks.is_rank()


def run_local_ranks(devices: int) -> int | None:
    """Start or fork ``devices`` CPU ranks of this command and return their exit code, or None in a rank."""
    from nemo_modelopt_cli.process import launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    return launch.fork_ranks(devices) if forks.are_ready() else launch.run_ranks(devices)

"""Run job steps on ranks, with a lock, a log and exit codes, also after Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from nemo_modelopt_cli import run_file
from nemo_modelopt_cli.compress import console
from nemo_modelopt_cli.compress.settings import Layout
from nemo_modelopt_cli.compress.stages import (
    Alone,
    Record,
    Stage,
    StageError,
    check_ready,
    check_redo,
    pending,
    read_record,
    run_stages,
)
from nemo_modelopt_cli.process import entry, forks, imports, launch, rendezvous, signals
from nemo_modelopt_dropin import files, locks, ranks
from nemo_modelopt_dropin.console import screen
from nemo_modelopt_dropin.errors import InUseError, ModelOptConfigError
from nemo_modelopt_dropin.preflight import output_checks

OK, FAILED, USAGE = 0, 1, 2
LOADING = "loading NeMo"
_RANK_ZERO_FIRST_S = 3.0

Finish = Callable[[Mapping[str, Record]], int]
OnEvent = Callable[[str, Stage, "Record | None"], None]


def execute(
    stages: Sequence[Stage],
    root: Path,
    layout: Layout,
    finish: Finish,
    verbose: bool = False,
    settings: Mapping[str, Any] | None = None,
    redo: Collection[str] = (),
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run the stages on the layout's ranks, then ``finish`` on one process; return the exit code.

    Args:
        stages: the job's steps; every rank calls this function with the same ones.
        root: the run's folder, locked while stages run.
        layout: how many ranks this machine starts; under torchrun the ranks exist and none is started.
        finish: writes the report and returns the exit code.
        verbose: let everything that libraries write through to the terminal.
        settings: of the run, saved as ``run.yaml`` in its folder.
        redo: names of stages whose results may be replaced if their settings changed.
        environment: variables for the ranks that this process starts.
    """
    return signals.guarded(
        lambda: _execute(stages, root, layout, finish, verbose, settings, redo, environment), signals.RESUMABLE
    )


def _execute(
    stages: Sequence[Stage],
    root: Path,
    layout: Layout,
    finish: Finish,
    verbose: bool,
    settings: Mapping[str, Any] | None,
    redo: Collection[str],
    environment: Mapping[str, str] | None,
) -> int:
    try:
        check_place(stages, root)
        check_redo(stages, root, redo)
        if ranks.leads():
            check_ready(stages, root)
    except (StageError, ModelOptConfigError) as error:  # before anything is started or loaded
        sys.stderr.write(f"error: {error}\n")
        return USAGE
    started, waiting = time.perf_counter(), pending(stages, root)
    if layout.cpu:
        cpu_environment()
    elif waiting:
        try:
            require_gpu()
        except StageError as error:  # before anything is made in the run's folder
            sys.stderr.write(f"error: {error}\n")
            return FAILED
    started_by_us = ranks.is_started_by_us()
    leads = not started_by_us and ranks.is_first()
    if leads:
        try:
            with locks.lock(root):  # later rank zero holds it, which is the one that writes
                files.own(root, files.COMPRESSION_RUN, *_names(stages))
        except InUseError as error:
            sys.stderr.write(f"error: {error}\n")
            return FAILED
    if not ranks.is_rank() and (layout.devices > 1 and waiting):
        found = _on_new_ranks(root, layout, verbose, environment)
        if found is None:
            return _execute(stages, root, layout, finish, verbose, settings, redo, environment)
        code = found
    else:
        code = _as_rank(stages, root, layout, verbose, settings, redo)
    if code == OK and leads:
        whole = time.perf_counter() - started
        records = {stage.name: read_record(root / stage.name) for stage in stages}
        with locks.lock(root):
            code = finish({name: record for name, record in records.items() if record is not None})
        if waiting:
            from nemo_modelopt_dropin.report.page import duration

            sys.stdout.write(f"Total time, including loading NeMo: {duration(whole)}.\n")
    return code


def _on_new_ranks(root: Path, layout: Layout, verbose: bool, environment: Mapping[str, str] | None) -> int | None:
    """Start or fork this job's ranks and return their exit code, or None in a rank that was forked."""
    if layout.cpu and forks.possible():
        with locks.lock(root):
            code = load_for_ranks("", _log(root, 0, verbose), signals.RESUMABLE, output=root)
        if code:
            return code
    found = (launch.fork_ranks if forks.are_ready() else launch.run_ranks)(layout.devices, environment=environment)
    if found is not None:
        locks.tidy(root)
        if signals.is_ours(found):
            sys.stderr.write(f"{signals.RESUMABLE}\n")
    return found


def load_for_ranks(
    prefix: str, log: Path | None, on_interrupt: object, keep_log: bool = True, output: Path = Path()
) -> int:
    """Import NeMo in this process, so that CPU ranks can be forked from it, and return the exit code.

    Args:
        prefix: precedes the line on the screen.
        log: as for `guarded`, as the other arguments.
        on_interrupt: what is printed after Ctrl-C or SIGTERM.
        keep_log: whether the log stays if a signal ends this process.
        output: folder to which the command writes.
    """

    def load(out: TextIO) -> None:
        out.write(f"{prefix}{LOADING}\n")
        cpu_environment()
        forks.load()

    return guarded(load, log, on_interrupt, keep_log, output, carry=True)


def _log(root: Path, rank: int, verbose: bool) -> Path | None:
    return None if verbose else root / "log" / f"rank{rank}.txt"


def check_place(stages: Iterable[Stage], root: Path) -> None:
    """Raise an error if a run would replace files in its folder that no run wrote.

    Raises:
        ModelOptConfigError: naming those files.
    """
    files.check(root, files.COMPRESSION_RUN, "--output")
    problem = files.taken(root, [*_names(stages), *output_checks.REPORT_FILES])
    if problem:
        raise ModelOptConfigError(f"--output: {problem}.")


def _names(stages: Iterable[Stage]) -> list[str]:
    """Return the names of the files and folders of a run, without its report."""
    folders = [f"{stage.name}{ending}" for stage in stages for ending in ("", ".new", ".old")]
    return ["log", run_file.NAME, *folders]


def cpu_environment() -> None:
    """Set the environment variables that torch and gloo read when they are imported."""
    # Megatron compiles its small fused functions; with a C++ compiler that takes 20 s, and without one it fails.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait by spinning starve the other ranks.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    rendezvous.keep_gloo_on_loopback()


def _as_rank(
    stages: Sequence[Stage],
    root: Path,
    layout: Layout,
    verbose: bool,
    settings: Mapping[str, Any] | None,
    redo: Collection[str],
) -> int:
    rank = ranks.number()

    def work(out: TextIO) -> None:
        with locks.lock(root) if rank == 0 else contextlib.nullcontext():
            show = console.StepLines(out, len(stages), rank)
            on_event = _renewing(show, stages, root, settings) if rank == 0 else show
            _run_all(stages, root, layout, out, on_event, redo)

    return guarded(work, _log(root, rank, verbose), signals.RESUMABLE, output=root)


def _renewing(on_event: OnEvent, stages: Sequence[Stage], root: Path, settings: Mapping[str, Any] | None) -> OnEvent:
    """Write the run's settings and remove the report of an earlier run, now or when a result is replaced.

    As long as the results in the folder are those of an earlier run, its report and ``run.yaml`` describe them.

    Returns:
        A function that calls ``on_event``, and first does the above if it was not done now.
    """
    waiting = pending(stages, root)
    left = [True]

    def renew() -> None:
        left.clear()
        if settings is not None:
            heading = f"nemo-modelopt compress --config {run_file.NAME}"
            run_file.write(root / run_file.NAME, settings, heading)
        if waiting:
            from nemo_modelopt_dropin.report import page

            page.withdraw(root)

    def renewing(event: str, stage: Stage, record: Record | None) -> None:
        if event == "done" and left:
            renew()
        on_event(event, stage, record)

    if not any(read_record(root / name) is not None for name in waiting):
        renew()
    return renewing


def require_gpu() -> None:
    """Fail early, before the slow NeMo import, with a clear message.

    Raises:
        StageError: if PyTorch finds no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise StageError("PyTorch sees no GPU on this machine; pass --cpu to run on CPU ranks")


def guarded(
    work: Callable[[TextIO], None],
    log: Path | None,
    on_interrupt: object,
    keep_log: bool = True,
    output: Path = Path(),
    carry: bool = False,
) -> int:
    """Do a script's work on this rank, with the output of libraries in ``log``, and return the exit code.

    Args:
        work: called with the stream to the screen.
        log: file for the output of libraries; None shows it.
        on_interrupt: what rank zero prints after Ctrl-C or SIGTERM.
        keep_log: whether the log stays if a signal ends this process while modules are imported.
        output: folder to which the work writes.
        carry: whether more work follows, which reports how many warnings were not shown.
    """
    rank = ranks.number()
    says = signals.reports()
    with screen.quiet(log, carry) as out, contextlib.ExitStack() as stack:

        def at_once(code: int) -> None:
            if says:
                out.write(f"{on_interrupt}\n")
            if log is not None and not keep_log:
                log.unlink(missing_ok=True)
            locks.release_all()
            os._exit(code)

        seen = stack.enter_context(signals.seen(at_once))
        try:
            work(out)
            return OK
        except BaseException as error:
            # After a signal the error does not matter: Lightning turns Ctrl-C into SystemExit(1), and libraries may
            # catch the exception while they are imported, and raise another.
            if seen:
                logging.disable(logging.CRITICAL)  # libraries warn at exit about unfinished work
                if says:
                    screen.close_bars()
                    out.write(f"{on_interrupt}\n")
                return signals.CODES[seen[0]]
            if isinstance(error, BrokenPipeError) and entry.is_closed(out.fileno()):
                entry.silence(out.fileno())
                return entry.CLOSED_SCREEN
            screen.close_bars()
            return _code_of(error, rank, log, out, output)


def _code_of(error: BaseException, rank: int, log: Path | None, out: TextIO, output: Path) -> int:
    """Report what went wrong, and return the exit code."""
    if isinstance(error, (StageError, InUseError)):
        out.write(f"error: {error}\n")
        return FAILED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    if isinstance(error, ModelOptConfigError):
        # All ranks do the same checks: the others report only if rank zero does not, which would end them.
        time.sleep(0 if rank == 0 else _RANK_ZERO_FIRST_S)
        out.write(f"error: {error}\n")
        return USAGE
    with contextlib.suppress(OSError):  # the log may be on the disk that is full
        traceback.print_exception(error)
    if problem := entry.storage_problem(error, output):
        out.write(f"error: {problem}\n")
        return FAILED
    where = f"\nsee {log} for the full traceback" if log else ""
    # Some libraries append more lines; Fiddle adds all arguments of the object it was building.
    reason = (str(error).strip().splitlines() or [""])[0]
    out.write(f"error on rank {rank}: {type(error).__name__}: {reason}{where}\n")
    return FAILED


def _run_all(
    stages: Sequence[Stage], root: Path, layout: Layout, out: TextIO, on_event: OnEvent, redo: Collection[str]
) -> None:
    if not pending(stages, root):
        run_stages(stages, root, Alone(), on_event)  # all finished: needs no NeMo and no other ranks
        return
    if ranks.is_first() and not forks.is_rank():
        out.write(f"{LOADING}\n")
    with imports.uncollected():
        if layout.cpu:
            from nemo_modelopt_dropin import cpu_backend

            cpu_backend.enable()
        from nemo_modelopt_cli.compress import training
    rendezvous.keep_on_loopback()
    peers = training.StoreRanks() if ranks.is_rank() else None
    run_stages(stages, root, peers or Alone(), on_event, redo, out)
    training.release()
    if peers is not None:
        peers.leave()

"""From a script's arguments to finished stages: ranks, lock, log, Ctrl-C, exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from nemo_modelopt_dropin.compress import console, launch
from nemo_modelopt_dropin.compress.settings import Layout
from nemo_modelopt_dropin.compress.stages import (
    Alone,
    Record,
    Stage,
    StageError,
    lock,
    pending,
    read_record,
    run_stages,
)

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

MakeStages = Callable[[TextIO], list[Stage]]
Finish = Callable[[Mapping[str, Record]], int]


def execute(make_stages: MakeStages, root: Path, layout: Layout, finish: Finish, verbose: bool = False) -> int:
    """Run the stages on the layout's ranks, then ``finish`` on one process; return the exit code.

    Args:
        make_stages: builds the stages; called on every rank with the stream for progress bars.
        root: the run's folder, locked while stages run.
        layout: how many ranks this machine starts; under torchrun the ranks exist and none is started.
        finish: writes the report and returns the exit code.
        verbose: let everything that libraries write through to the terminal.
    """
    root.mkdir(parents=True, exist_ok=True)
    if layout.cpu:
        cpu_environment()
    started_by_us = launch.STARTED_BY_US in os.environ
    if not launch.is_rank() and (layout.devices > 1 and pending(make_stages(sys.stderr), root)):
        code = launch.run_ranks(layout.devices)
    else:
        code = _as_rank(make_stages, root, layout, verbose)
    if code == OK and not started_by_us and int(os.environ.get("RANK", "0")) == 0:
        records = {stage.name: read_record(root / stage.name) for stage in make_stages(sys.stderr)}
        code = finish({name: record for name, record in records.items() if record is not None})
    return code


def cpu_environment() -> None:
    """Settings that must be there before torch is imported."""
    # Megatron compiles its small fused functions; with a C++ compiler that takes 20 s, and without one it fails.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait by spinning starve the other ranks.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _as_rank(make_stages: MakeStages, root: Path, layout: Layout, verbose: bool) -> int:
    rank = int(os.environ.get("RANK", "0"))
    log = None if verbose else root / "log" / f"rank{rank}.txt"
    interrupted = _note_interrupt()
    # An interrupt by the launcher, after another rank failed, ends this one as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(FAILED))
    with console.quiet(log) as out:
        try:
            with lock(root) if rank == 0 else contextlib.nullcontext():
                _run_all(make_stages(out), root, layout, console.Teller(out, len(make_stages(out)), rank))
            return OK
        except StageError as error:
            out.write(f"error: {error}\n")
            return FAILED
        except (KeyboardInterrupt, SystemExit) as stop:
            # Lightning turns Ctrl-C into SystemExit(1).
            if interrupted():
                logging.disable(logging.CRITICAL)  # libraries complain at exit about what was not finished
                if rank == 0:
                    out.write("interrupted; the same command goes on from here\n")
                return INTERRUPTED
            return stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else FAILED
        except Exception as error:
            traceback.print_exc()
            where = f"; the whole story is in {log}" if log else ""
            out.write(f"error on rank {rank}: {type(error).__name__}: {error}{where}\n")
            return FAILED


def _run_all(stages: list[Stage], root: Path, layout: Layout, tell: console.Teller) -> None:
    if not pending(stages, root):
        run_stages(stages, root, Alone(), tell)  # all finished: needs no NeMo and no other ranks
        return
    if tell.rank == 0:
        tell.out.write("loading NeMo\n")
    if layout.cpu:
        from nemo_modelopt_dropin import cpu_backend

        cpu_backend.enable()
    from nemo_modelopt_dropin.compress import training

    ranks = training.StoreRanks() if launch.is_rank() else Alone()
    run_stages(stages, root, ranks, tell)
    training.release()


def _note_interrupt() -> Callable[[], bool]:
    """Remember that Ctrl-C came; the default handler still raises KeyboardInterrupt."""
    seen: list[int] = []

    def handler(number, frame):
        seen.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handler)
    return lambda: bool(seen)

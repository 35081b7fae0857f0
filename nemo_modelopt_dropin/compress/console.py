"""What a person sees: one line a stage and our bars; everything that libraries write goes to a log file."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from nemo_modelopt_dropin.compress.stages import Record, Stage


@contextlib.contextmanager
def quiet(log: Path | None) -> Iterator[TextIO]:
    """Send file descriptors 1 and 2 to ``log`` and yield a stream to where standard error went before.

    Descriptors and not ``sys.stdout``: NeMo, Megatron and their C++ parts write at import, through handlers they made
    themselves, and from child processes. None leaves everything as it is.
    """
    if log is None:
        yield sys.stderr
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    # Line buffered: what we said is on the screen when something kills the process.
    stream = os.fdopen(os.dup(kept[1]), "w", buffering=1, encoding="utf-8")
    try:
        yield stream
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        stream.close()
        for number, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, number)
            os.close(saved)


class Teller:
    """Say on rank zero what happens to each stage."""

    def __init__(self, out: TextIO, count: int, rank: int = 0):
        self.out, self.count, self.rank, self.number = out, count, rank, 0
        self.started = time.perf_counter()

    def __call__(self, event: str, stage: Stage, record: Record | None) -> None:
        """Write one line for an event of `run_stages`."""
        if event != "done":
            self.number += 1
        if self.rank != 0:
            return
        place = f"[{self.number}/{self.count}] {stage.name:<9}"
        line = {
            "kept": "finished before, kept",
            "start": "running",
            "again": "was interrupted, running again",
            "done": f"done in {record.seconds:.1f} s" if record else "done",
        }[event]
        loss = (record.result if record else {}).get("heldout_loss")
        self.out.write(f"{place} {line}{f', held-out loss {loss:.4f}' if loss is not None else ''}\n")

"""One line on the screen for each event of a job step."""

from __future__ import annotations

from typing import TextIO

from nemo_modelopt_cli.compress.stages import Record, Stage


class StepLines:
    """Print the events of `run_stages` on rank zero.

    Args:
        out: stream to the screen.
        count: number of job steps.
        rank: of this process.
    """

    def __init__(self, out: TextIO, count: int, rank: int = 0):
        self.out, self.count, self.rank, self.number = out, count, rank, 0

    def __call__(self, event: str, stage: Stage, record: Record | None) -> None:
        """Print one event."""
        if event != "done":
            self.number += 1
        if self.rank != 0:
            return
        place = f"[{self.number}/{self.count}] {stage.name:<9}"
        line = {
            "kept": "finished before, kept",
            "start": "running",
            "again": "was interrupted, running again",
            "redo": "running again; the old result is kept until this one is complete",
            "done": f"done in {record.seconds:.1f} s" if record else "done",
        }[event]
        loss = (record.result if record else {}).get("heldout_loss")
        self.out.write(f"{place} {line}{f', held-out loss {loss:.4f}' if loss is not None else ''}\n")

"""Checkpoints of a training every few minutes, only the last of which is kept, to resume from after an interruption."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.lightning.ckpt_utils import ckpt_to_context_subdir
from nemo.lightning.io.pl import TrainerContext

from nemo import lightning as nl
from nemo_modelopt_cli.checks import resume_checks
from nemo_modelopt_dropin import files, locks, ranks

MINUTES = 5.0
# Saving takes at most about this share of the time.
_LONGEST_SHARE = 0.1


def save_checkpoint(run: pl.Trainer, path: Path, weights_only: bool = False) -> None:
    """Write a NeMo checkpoint under another name and rename it, so that a checkpoint which exists is whole."""
    first = ranks.is_first()
    with files.written(path, files.TRAINING_CHECKPOINT, writes=first) as part:
        run.strategy.barrier()
        run.save_checkpoint(part, weights_only=weights_only)
        finish = getattr(run.strategy.checkpoint_io, "maybe_finalize_save_checkpoint", None)
        if finish is not None:  # an asynchronous writer, which must have finished before the rename
            finish(blocking=True)
        if first:
            TrainerContext.from_trainer(run).io_dump(ckpt_to_context_subdir(part), yaml_attrs=["model"])
        run.strategy.barrier()
    run.strategy.barrier()


class Steps:
    """The intermediate checkpoints in a folder, by step."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)

    def latest(self) -> Path | None:
        """Return the newest whole checkpoint."""
        return max(self.folder.glob("step-*"), default=None)

    def save(self, trainer: pl.Trainer) -> None:
        """Save the trainer's step and remove the checkpoints before it."""
        path = self.folder / f"step-{trainer.global_step:08d}"
        save_checkpoint(trainer, path)
        if ranks.is_first():
            for other in self.folder.glob("step-*"):
                if other != path:
                    files.remove(other, files.TRAINING_CHECKPOINT)
            self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """Remove what killed runs left of checkpoints that they were writing, and their locks."""
        for ending in ("partial", "lock"):
            for left in [*self.folder.glob(f".step-*.{ending}")]:
                target = self.folder / left.name[1 : -len(ending) - 1]
                files.discard(files.staging_path(target), files.TRAINING_CHECKPOINT)
                locks.tidy(target)

    def remove_before(self, checkpoints: Path) -> None:
        """Remove all of them, unless the newest is newer than NeMo's last checkpoint: then it holds the training."""
        if newest(checkpoints, self) != self.latest():
            self.remove()

    def remove(self) -> None:
        """Remove all of them, on rank zero."""
        if ranks.is_first():
            for one in self.folder.glob("step-*"):
                files.remove(one, files.TRAINING_CHECKPOINT)
            self._remove_unfinished()
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()


class Schedule:
    """Decide after each step whether it is time to save, alike on all ranks, by the first rank's clock.

    Ranks compare their clocks only when the time may have come, at most after twice as many steps as so far.

    Args:
        seconds: time between checkpoints; more if saving takes long.
        clock: returns the time in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.least = self.seconds = seconds
        self.clock = clock
        self.start()

    def start(self) -> None:
        """Count from now."""
        self.began, self.done, self.next = self.clock(), 0, 1

    def is_due(self, agree: Callable[[float], float]) -> bool:
        """Return whether to save after this step; ``agree`` returns the first rank's value on every rank."""
        self.done += 1
        if self.done < self.next:
            return False
        elapsed = agree(self.clock() - self.began)
        if elapsed >= self.seconds:
            return True
        left = (self.seconds - elapsed) * self.done / elapsed if elapsed > 0 else self.done
        self.next = self.done + max(1, min(self.done, int(left)))
        return False

    def saved(self, took: float, agree: Callable[[float], float]) -> None:
        """Restart the clock after a checkpoint that took this many seconds."""
        self.seconds = max(self.least, agree(took) / _LONGEST_SHARE)
        self.start()


class Saver:
    """Save a training between two steps, every few minutes or after a number of steps.

    Call `between_steps` when a batch starts: at the end of a batch, Lightning does not count it yet, and a resumed
    training would validate one step late, or never. The last step is left to the final checkpoint.

    Args:
        steps: where the checkpoints go.
        first: the step at which this training starts; it has its checkpoint already if it is not 0.
        minutes: time between checkpoints.
        every: steps between checkpoints, instead of the time.
    """

    def __init__(self, steps: Steps, first: int, minutes: float = MINUTES, every: int | None = None):
        self.steps, self.seen, self.every = steps, first, every
        self.schedule = Schedule(60 * minutes)

    def between_steps(self, trainer: pl.Trainer) -> None:
        """Save if it is time."""
        step, agree = trainer.global_step, trainer.strategy.broadcast
        if step <= self.seen:
            return
        self.seen = step
        if self.every is not None:
            if self.every and step % self.every == 0:
                self.steps.save(trainer)
        elif self.schedule.is_due(agree):
            began = time.monotonic()
            self.steps.save(trainer)
            self.schedule.saved(time.monotonic() - began, agree)


class Interim(pl.Callback):
    """Save the training every few minutes, in addition to the checkpoints of NeMo's callback.

    Args:
        folder: where the checkpoints go, as text: NeMo cannot write a path into checkpoints.
        minutes: time between them.
    """

    def __init__(self, folder: str, minutes: float = MINUTES):
        self.folder, self.minutes = folder, minutes
        self.saver: Saver | None = None

    def __getstate__(self):
        """Leave the running schedule out of copies."""
        return {**self.__dict__, "saver": None}

    def on_train_start(self, trainer, pl_module):
        """Start the clock."""
        self.saver = Saver(Steps(self.folder), trainer.global_step, self.minutes)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Save if the time has come."""
        if self.saver is not None:
            self.saver.between_steps(trainer)


class Resume(nl.AutoResume):
    """NeMo's resuming, from the newest whole checkpoint of either kind; unfinished ones are skipped.

    NeMo's own raises an error if its only last checkpoint was killed while it was written.
    """

    def __init__(self, folder: str, output: str, **options: Any):
        """Remember the folders.

        Args:
            folder: of the intermediate checkpoints.
            output: of the experiment, with NeMo's ``checkpoints``.
            **options: arguments of ``nl.AutoResume``.
        """
        super().__init__(**options)
        self.folder, self.output = folder, output

    def _find_trainer_ckpt_path(self) -> Path | None:
        return newest(Path(self.output) / "checkpoints", Steps(self.folder))


def newest(checkpoints: Path, steps: Steps) -> Path | None:
    """Return the newest whole checkpoint among NeMo's last ones and the intermediate ones."""
    return resume_checks.newest(checkpoints, steps.folder)

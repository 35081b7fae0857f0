"""Bars of Lightning's loops, in the place of those that our scripts send to the log with the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl

from nemo_modelopt_dropin.console import screen

_LABELS = {
    "reduced_train_loss": "training loss",
    "kd_loss": "distillation loss",
    "teacher_lm_loss": "teacher's LM loss",
    "kd_top1_agreement": "top-1 agreement",
    "val_loss": "validation loss",
}


class TrainingBar(pl.Callback):
    """One bar for a training run: steps, time left, loss."""

    def __init__(self, title: str):
        self.title = title
        self.bar: Any = None

    def __getstate__(self):
        """Leave the bar out of copies: NeMo copies what a trainer holds."""
        return {**self.__dict__, "bar": None}

    def on_train_start(self, trainer, pl_module):
        """Open the bar where a resumed run goes on."""
        self.bar = screen.bar(total=trainer.max_steps, initial=trainer.global_step, desc=self.title, unit="step")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Move the bar to the step."""
        loss = trainer.callback_metrics.get("reduced_train_loss")
        self.bar.update(trainer.global_step - self.bar.n)
        if loss is not None:
            self.bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)

    def on_train_end(self, trainer, pl_module):
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer, pl_module, exception):
        """Close the bar."""
        self.on_train_end(trainer, pl_module)


class FirstFigures(pl.Callback):
    """Keep the first value of everything that a training logs: the last ones alone tell no progress.

    Attributes:
        values: name -> value.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Take what is new."""
        for name, value in trainer.callback_metrics.items():
            # The first validation comes after many steps.
            if name not in self.values and not name.startswith("val"):
                self.values[name] = float(value)


def figures(trainer: Any) -> list[tuple[str, str]]:
    """Return steps and last logged losses of a training by what they are, with the first of this run beside."""
    metrics = trainer.callback_metrics
    first = next((one.values for one in trainer.callbacks if isinstance(one, FirstFigures)), {})
    rows = [("steps", str(trainer.global_step))]
    for name, label in _LABELS.items():
        if name in metrics:
            last, before = f"{float(metrics[name]):.4f}", f"{first[name]:.4f}" if name in first else ""
            rows.append((label, last if before in ("", last) else f"{last} (this run began at {before})"))
    return rows


class _ValidationBar(pl.Callback):
    def __init__(self, title: str):
        self.title = title
        self.bar: Any = None

    def on_validation_start(self, trainer, pl_module):
        self.bar = screen.bar(total=_total(trainer.num_val_batches), desc=self.title, unit="batch")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.bar.update()

    def on_validation_end(self, trainer, pl_module):
        self.bar.close()


def _total(batches: list[int | float]) -> int | None:
    """Return the steps of a validation: Lightning counts micro-batches, NeMo takes a global batch a step."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    if not batches or batches[0] == float("inf"):
        return None
    try:
        return -(-int(batches[0]) // max(1, get_num_microbatches()))
    except AttributeError:  # the calculator of this process was never set up
        return int(batches[0])


@contextlib.contextmanager
def validation_shown(trainer: Any, title: str) -> Iterator[None]:
    """Show a validation of this trainer as one bar where Lightning's own bar goes to a log; elsewhere do nothing."""
    callbacks = getattr(trainer, "callbacks", None)
    if not screen.is_quiet() or not isinstance(callbacks, list):
        yield
        return
    bar = _ValidationBar(title)
    callbacks.append(bar)
    try:
        yield
    finally:
        # Lightning may have put another list there.
        trainer.callbacks[:] = [one for one in trainer.callbacks if one is not bar]
        if bar.bar is not None:
            bar.bar.close()

"""Progress bars of Lightning's loops for commands, which redirect Lightning's own bars to the log."""

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
    """One bar for a training run, with steps, remaining time and loss."""

    def __init__(self, title: str):
        self.title = title
        self.bar: Any = None

    def __getstate__(self):
        """Return the state without the bar, because NeMo copies the callbacks of a trainer."""
        return {**self.__dict__, "bar": None}

    def on_train_start(self, trainer, pl_module):
        """Open the bar at the step from which the run resumes."""
        self.bar = screen.bar(total=trainer.max_steps, initial=trainer.global_step, desc=self.title, unit="step")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Update the bar to the current step and loss."""
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
    """Store the first value of every metric, to show progress next to the last one.

    Attributes:
        values: First values by name.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Store the values of new metrics."""
        for name, value in trainer.callback_metrics.items():
            # The first validation is after many steps, so it does not show the start.
            if name not in self.values and not name.startswith("val"):
                self.values[name] = float(value)


def figures(trainer: Any) -> list[tuple[str, str]]:
    """Return rows with the steps and the last value of each loss, and its first value in this run."""
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
    """Return the steps of a validation: Lightning counts micro-batches, but a step of NeMo is a global batch."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    if not batches or batches[0] == float("inf"):
        return None
    try:
        return -(-int(batches[0]) // max(1, get_num_microbatches()))
    except AttributeError:  # the calculator is not initialised in this process
        return int(batches[0])


@contextlib.contextmanager
def validation_shown(trainer: Any, title: str) -> Iterator[None]:
    """Show a validation of a trainer as one bar if Lightning's own bar goes to a log; otherwise do nothing."""
    callbacks = getattr(trainer, "callbacks", None)
    if not screen.is_quiet() or not isinstance(callbacks, list):
        yield
        return
    bar = _ValidationBar(title)
    callbacks.append(bar)
    try:
        yield
    finally:
        # Lightning may have replaced the list.
        trainer.callbacks[:] = [one for one in trainer.callbacks if one is not bar]
        if bar.bar is not None:
            bar.bar.close()

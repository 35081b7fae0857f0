"""Observe the micro-batches that a NeMo model reads, and replace its loaders for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any


class Shown:
    """An iterator over batches that shows each one before it is used."""

    def __init__(self, batches: Iterator, see: Callable[[Mapping[str, Any]], None]):
        self.batches, self.see = batches, see

    def __iter__(self):
        return self

    def __next__(self):
        found = next(self.batches)
        # NeMo's loaders return (batch, number, loader).
        batch = found[0] if isinstance(found, tuple) and len(found) == 3 else found
        if isinstance(batch, Mapping):
            self.see(batch)
        return found


def _show_and_step(step: Callable, see: Callable, batches: Iterator) -> Any:
    return step(Shown(batches, see))


@contextlib.contextmanager
def shown_batches(config: Any, see: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Show every micro-batch that a NeMo model reads, whole: its data step leaves out what a stage does not need.

    Args:
        config: the NeMo configuration of the model, which holds ``data_step_fn``.
        see: called with the batch right before the stage's forward pass.
    """
    step = getattr(config, "data_step_fn", None)
    if step is None:
        yield
        return
    config.data_step_fn = partial(_show_and_step, step, see)
    try:
        yield
    finally:
        config.data_step_fn = step


@contextlib.contextmanager
def own_data(data_module: Any, **replaced: Any) -> Iterator[None]:
    """Set attributes of a data module, and put its own loader and tokenizer back on leaving."""
    own = {name: getattr(data_module, name) for name in ("val_dataloader", "tokenizer") if hasattr(data_module, name)}
    inherited = [name for name in own if name not in vars(data_module) and hasattr(type(data_module), name)]
    try:
        for name, value in replaced.items():
            setattr(data_module, name, value)
        yield
    finally:
        for name, value in own.items():
            if name not in inherited:
                setattr(data_module, name, value)
            elif name in vars(data_module):
                delattr(data_module, name)

"""What modelopt's hooks capture of the layers that a distillation compares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def captured_layers(model: Any) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """Return the (student layer, teacher layer) pairs whose outputs modelopt's hooks keep."""
    layers_to_loss = getattr(model, "_layers_to_loss", None)
    return list(layers_to_loss) if isinstance(layers_to_loss, dict) else []


def forget_captured_outputs(model: Any) -> None:
    """Drop what was captured in an evaluation, where no distillation loss takes it.

    Otherwise the next training step would find it, warn, and hold it in memory until then.
    """
    for pair in captured_layers(model):
        for layer in pair:
            layer._intermediate_output = None


def copy_captured(model: Any, tensor: Tensor) -> None:
    """Put a copy in the place of every captured student output that shares memory with ``tensor``."""
    for layer, _ in captured_layers(model):
        output = layer._intermediate_output
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.data_ptr() == tensor.data_ptr():
            copied = first.clone()
            layer._intermediate_output = (copied, *output[1:]) if isinstance(output, tuple) else copied

"""Collect values from all ranks, and name layers over all pipeline stages."""

from __future__ import annotations

from typing import Any

import torch


def gather(value: Any, group=None) -> list[Any]:
    """Return the value of each rank of a group, by default of all ranks."""
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def global_name(core: torch.nn.Module, name: str) -> str:
    """Return a layer's name with its number in the whole model; a pipeline stage counts its layers from zero."""
    head, marker, tail = name.partition("layers.")
    if not marker:
        return name
    number, _, rest = tail.partition(".")
    layer = core.get_submodule(f"{head}layers.{number}")
    return f"{head}layers.{layer.layer_number - 1}.{rest}" if hasattr(layer, "layer_number") else name

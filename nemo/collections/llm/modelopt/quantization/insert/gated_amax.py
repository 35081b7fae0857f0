"""Store the amax of gated MLPs correctly in distributed checkpoints.

A tensor-parallel rank has its share of the gate followed by its share of the other half, and Megatron stores the two
halves of the weight separately. modelopt intends to do the same with the amax, but its pattern only matches names
without a prefix: restored at another tensor-parallel size, rows of INT8 and INT4 layers got the amax of other rows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory


def mend(model: torch.nn.Module) -> None:
    """Make the converted gated MLPs of a model store amax as they store their weights; a second call changes nothing.

    Args:
        model: The Megatron-Core model; stand-ins are ignored.
    """
    if not isinstance(model, torch.nn.Module):
        return
    for module in model.modules():
        converted = hasattr(type(module), "_modelopt_state_keys")
        if converted and module.config.gated_linear_unit and "sharded_state_dict" not in module.__dict__:
            # Bypasses modelopt's __setattr__, which manages attributes itself.
            module.__dict__["sharded_state_dict"] = functools.partial(_sharded_state_dict, module)


def _sharded_state_dict(
    module: Any, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
) -> dict:
    """Return the MLP's own entries, with the amax of the weight split like the weight."""
    entries = type(module).sharded_state_dict(module, prefix, sharded_offsets, metadata)
    for name, entry in entries.items():
        is_amax = name.startswith(f"{prefix}linear_fc1.weight_quantizer.") and name.endswith("_amax")
        # A per-tensor amax is equal on all ranks and is not split. The key and shape in the checkpoint do not change.
        if is_amax and getattr(entry, "data", None) is not None and entry.data.numel() > 1:
            entries[name] = apply_swiglu_sharded_factory(entry, sharded_offsets)
    return entries

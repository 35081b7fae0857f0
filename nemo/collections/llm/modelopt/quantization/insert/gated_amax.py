"""The amax of gated MLPs in distributed checkpoints.

A tensor-parallel rank holds its share of the gate followed by its share of the other half, and Megatron stores the
weight by halves. modelopt means to treat the amax alike, but looks for it by a pattern that only a name without
prefix could match: restored at another tensor-parallel size, INT8 and INT4 layers got each other's amax.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory


def mend(model: torch.nn.Module) -> None:
    """Let the converted gated MLPs of a model store amax as they store their weights; do nothing twice.

    Args:
        model: The Megatron-Core model; stand-ins are left alone.
    """
    if not isinstance(model, torch.nn.Module):
        return
    for module in model.modules():
        converted = hasattr(type(module), "_modelopt_state_keys")
        if converted and module.config.gated_linear_unit and "sharded_state_dict" not in module.__dict__:
            # Past modelopt's __setattr__, which keeps attributes of its own.
            module.__dict__["sharded_state_dict"] = functools.partial(_sharded_state_dict, module)


def _sharded_state_dict(
    module: Any, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
) -> dict:
    """Return the MLP's own entries, with those of the weight's amax cut as the weight is."""
    entries = type(module).sharded_state_dict(module, prefix, sharded_offsets, metadata)
    for name, entry in entries.items():
        is_amax = name.startswith(f"{prefix}linear_fc1.weight_quantizer.") and name.endswith("_amax")
        # Per-tensor amax is the same on all ranks and not cut. The key and shape in the checkpoint stay as they are.
        if is_amax and getattr(entry, "data", None) is not None and entry.data.numel() > 1:
            entries[name] = apply_swiglu_sharded_factory(entry, sharded_offsets)
    return entries

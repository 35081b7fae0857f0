"""What pruning did to a model, as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from ._checks import model_sizes


def measure(core: nn.Module) -> dict[str, int]:
    """Return the number of parameters over all tensor- and pipeline-parallel ranks, and the prunable sizes.

    Args:
        core: the Megatron-Core model. All ranks must call it.
    """
    model: Any = core
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    count = 0
    for name, parameter in core.named_parameters():
        # With tied embeddings the last pipeline stage holds a copy.
        copy = name.startswith("output_layer") and model.share_embeddings_and_output_weights and not model.pre_process
        if not copy:
            count += parameter.numel() * (tensor_parallel if getattr(parameter, "tensor_model_parallel", False) else 1)
    total = torch.tensor([count], dtype=torch.int64, device=next(core.parameters()).device)
    torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return {"parameters": int(total), **model_sizes(core)}


def numbered_layers(core: nn.Module) -> list[tuple[int, nn.Module]]:
    """Return this rank's layers with their 1-indexed numbers in the whole model."""
    decoder: Any = core.decoder
    return [(layer.layer_number, layer) for layer in decoder.layers]


def kept_layers(before: Sequence[tuple[int, nn.Module]], core: nn.Module) -> list[int]:
    """Return the original numbers of the layers that are left in the whole model. All ranks must call it.

    Args:
        before: `numbered_layers` before pruning.
        core: the pruned model.
    """
    decoder: Any = core.decoder
    left = {id(layer) for layer in decoder.layers}
    local = [number for number, layer in before if id(layer) in left]
    group = parallel_state.get_pipeline_model_parallel_group()
    gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(gathered, local, group=group)
    return sorted(number for part in gathered for number in part)


def keep_pattern(pattern: str, kept: Sequence[int]) -> str:
    """Return a hybrid model's layer pattern with only the kept layers' letters.

    Args:
        pattern: one letter a layer, such as ``"M*M-"``.
        kept: 1-indexed numbers of the layers that are left.
    """
    return "".join(pattern[number - 1] for number in sorted(kept))


def keep_hybrid_pattern(core: nn.Module, kept: Sequence[int]) -> None:
    """Cut the pattern of a hybrid model, in the model and its configuration, to the layers that are left.

    modelopt cuts the model's own only, and not when layers are dropped by number; the configuration is what is saved.

    Args:
        core: the pruned model.
        kept: 1-indexed original numbers of the layers that are left.
    """
    model: Any = core
    pattern = getattr(model.config, "hybrid_override_pattern", None)
    if not isinstance(pattern, str) or len(pattern) == len(kept):
        return
    model.config.hybrid_override_pattern = keep_pattern(pattern, kept)
    if isinstance(getattr(model, "hybrid_override_pattern", None), str):
        model.hybrid_override_pattern = model.config.hybrid_override_pattern


def table(before: dict[str, int], after: dict[str, int]) -> str:
    """Return a text table of the sizes before and after."""
    rows = [f"{'':24}{'before':>16}{'after':>16}{'ratio':>8}"]
    for name, old in before.items():
        new = after.get(name, old)
        rows.append(f"{name:24}{old:>16,}{new:>16,}{new / old:>8.2f}")
    return "\n".join(rows)

"""What pruning did to a model, as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .. import _parallel
from . import _hybrid
from ._checks import model_sizes


def measure(core: nn.Module) -> dict[str, int]:
    """Return the number of parameters over all tensor- and pipeline-parallel ranks, and the prunable sizes.

    Of a mixture of experts also ``active_parameters``, those that one token uses.

    Args:
        core: the Megatron-Core model. All ranks must call it.
    """
    model: Any = core
    own = [(name, parameter.numel()) for name, parameter in _parallel.own_parameters(core)]
    sums = [sum(number for _, number in own), sum(number for name, number in own if ".mlp.experts." in name)]
    count, in_experts = map(int, _parallel.model_parallel_sum(sums))
    sizes = model_sizes(core)
    experts = sizes.get("num_moe_experts")
    if not experts:
        return {"parameters": count, **sizes}
    used = count - in_experts + in_experts * min(model.config.moe_router_topk, experts) // experts
    return {"parameters": count, "active_parameters": used, **sizes}


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
    gathered = _parallel.gather_over_stages(local)
    return sorted(number for part in gathered for number in part)


def keep_moe_pattern(frequency: int | Sequence[int], num_layers: int, kept: Sequence[int]) -> int | list[int]:
    """Return Megatron's ``moe_layer_freq`` for the layers that are left.

    Args:
        frequency: every so-manieth layer has experts, beginning with the first, or one 0 or 1 a layer.
        num_layers: number of layers before.
        kept: 1-indexed numbers of the layers that are left.
    """
    pattern = (
        [int(index % frequency == 0) for index in range(num_layers)] if isinstance(frequency, int) else list(frequency)
    )
    left = [pattern[number - 1] for number in sorted(kept)]
    return frequency if isinstance(frequency, int) and all(left) else left


def keep_layer_patterns(core: nn.Module, kept: Sequence[int], num_layers: int) -> None:
    """Cut the pattern of a hybrid or MoE model, in model and configuration, to the layers that are left.

    Args:
        core: the pruned model.
        kept: 1-indexed original numbers of the layers that are left.
        num_layers: number of layers before.
    """
    model: Any = core
    frequency = getattr(model.config, "moe_layer_freq", 1)
    if getattr(model.config, "num_moe_experts", None) and frequency != 1 and len(kept) != num_layers:
        model.config.moe_layer_freq = keep_moe_pattern(frequency, num_layers, kept)
    _hybrid.cut_pattern(core, kept)


def table(before: dict[str, int], after: dict[str, int]) -> str:
    """Return a text table of the sizes before and after."""
    rows = [f"{'':24}{'before':>16}{'after':>16}{'ratio':>8}"]
    for name, old in before.items():
        new = after.get(name, old)
        rows.append(f"{name:24}{old:>16,}{new:>16,}{new / old:>8.2f}")
    return "\n".join(rows)

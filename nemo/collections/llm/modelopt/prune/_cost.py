"""What a model costs: memory of its weights, FLOPs of a token, and the measured time of a forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from .. import _batches, _parallel
from ..errors import ModelOptConfigError
from . import _checks, _count, _heldout

_REPEATS = 3
# Points of a layer's curve of importance: enough for a figure, whatever the size.
_POINTS = 33


def describe(core: nn.Module, parameters: int) -> dict[str, Any]:
    """Return the bytes of all weights, and, if they are known, the FLOPs of a token's forward pass.

    Args:
        core: the Megatron-Core model. All ranks must call it.
        parameters: how many it has over all ranks.
    """
    config: Any = core.config
    size = next((p.element_size() for p in core.parameters()), config.params_dtype.itemsize)
    found: dict[str, Any] = {"weight_bytes": parameters * size}
    try:
        terms = _count.model_terms(core)
    except ModelOptConfigError:
        return found
    sizes, length = _checks.model_sizes(core), getattr(config, "seq_length", None) or 0
    layers = [part for part in terms if part > 0]
    found["flops_per_token"] = _count.flops_per_token(terms, sizes, layers, config, length)
    groups = len(_count.attending(terms, layers)) * sizes["num_query_groups"]
    found["kv_cache_bytes_per_token"] = 2 * groups * config.kv_channels * size
    return found


def one_batch(core: nn.Module, validate: Callable[[], None]) -> list[Mapping[str, Any]]:
    """Return the micro-batches of the data's first global batch.

    Args:
        core: the Megatron-Core model.
        validate: runs that batch through it with NeMo.
    """
    batches: list[Mapping[str, Any]] = []
    with _batches.shown_batches(core.config, batches.append):
        validate()
    return batches


def forward_seconds(core: nn.Module, batches: list[Mapping[str, Any]]) -> float:
    """Return the time of one forward pass of the whole pipeline over some micro-batches: the best of three.

    Args:
        core: the Megatron-Core model. All ranks must call it.
        batches: the micro-batches.
    """
    modes = [(module, module.training) for module in core.modules()]
    core.eval()
    times = []
    for _ in range(1 + _REPEATS):  # the first warms up
        torch.distributed.barrier()
        _synchronize()
        started = time.perf_counter()
        _heldout.run_batches(core, batches)
        _synchronize()
        torch.distributed.barrier()
        times.append(time.perf_counter() - started)
    for module, training in modes:
        module.training = training
    best = torch.tensor([min(times[1:])], dtype=torch.float64, device=_parallel.device_of(core))
    torch.distributed.all_reduce(best, op=torch.distributed.ReduceOp.MAX)
    return float(best)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def curves(activations: Mapping[str, Any], numbers: Sequence[int], channels: int) -> dict[str, dict[int, list[float]]]:
    """Return the importance of each hparam's units by layer, descending, as curves for a figure.

    Args:
        activations: this stage's sums as modelopt keeps them, by module name.
        numbers: 1-indexed numbers of this stage's layers before pruning.
        channels: channels of an attention head.

    Returns:
        hparam -> layer -> quantiles of the units' importance from the highest to the lowest; for the hidden size, which
        all layers share, layer 0.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for name, value in activations.items():
        layer = numbers[int(name.split(".")[2])] if name.startswith("decoder.layers.") else 0
        if isinstance(value, dict) and "expert_l2_scores" in value:
            hparam, units = "num_moe_experts", value["expert_l2_scores"] / (value["expert_sample_counts"] + 1e-8)
        elif isinstance(value, dict):
            if not value:
                continue
            hparam, units = "hidden_size", torch.stack([sums.sqrt() for sums in value.values()]).sum(0)
        elif name.endswith("self_attention") and value is not None:
            hparam, units = "num_attention_heads", value.view(-1, channels).sum(1).sqrt()
        elif name.endswith("shared_experts") and value is not None:
            hparam, units = "moe_shared_expert_intermediate_size", value.sqrt()
        elif name.endswith(".mlp") and value is not None:
            hparam, units = "ffn_hidden_size", value.sqrt()
        else:
            continue
        found.setdefault(hparam, {})[layer] = _curve(units)
    return found


def _curve(units: Tensor) -> list[float]:
    ordered = units.detach().float().cpu().sort(descending=True).values
    positions = torch.linspace(0, len(ordered) - 1, min(_POINTS, len(ordered))).round().long()
    return [round(float(value), 6) for value in ordered[positions]]


def all_curves(known: Mapping[str, Any], numbers: Sequence[int], channels: int) -> dict[str, dict[int, list[float]]]:
    """Return `curves` of all pipeline stages. All ranks must call it.

    Args:
        known: the importance as `_search.prune_by_importance` returns it.
        numbers: 1-indexed numbers of this stage's layers before pruning.
        channels: channels of an attention head.
    """
    own = curves(known["activations_per_rank"][parallel_state.get_pipeline_model_parallel_rank()], numbers, channels)
    gathered = _parallel.gather_over_stages(own)
    whole: dict[str, dict[int, list[float]]] = {}
    for stage in gathered:
        for hparam, layers in stage.items():
            whole.setdefault(hparam, {}).update(layers)
    return {hparam: dict(sorted(layers.items())) for hparam, layers in whole.items()}

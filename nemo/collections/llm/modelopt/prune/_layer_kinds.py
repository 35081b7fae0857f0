"""Kinds of layers that a configuration describes by number: they follow the layers that pruning leaves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nemo_modelopt_dropin.preflight import families

from ..errors import ModelOptConfigError

# Fields with one entry for each layer. Megatron also reads ``window_attn_skip_freq`` as a period.
_BY_LAYER = ("window_attn_skip_freq", "no_rope_freq")


def all_have_experts(config: Any) -> bool:
    """Return whether each layer of a model has experts, so that there is no dense MLP."""
    if not getattr(config, "num_moe_experts", None):
        return False
    frequency = getattr(config, "moe_layer_freq", 1)
    return all(frequency) if isinstance(frequency, (list, tuple)) else frequency == 1


def local_layers(config: Any) -> list[bool] | None:
    """Return for each layer of a Gemma 2 or 3 whether its attention is local; None for other models.

    The number of a layer decides it, and no field of the configuration could list other layers.
    """
    numbers = range(1, config.num_layers + 1)
    pattern = getattr(config, "interleaved_attn_pattern", None)
    if isinstance(pattern, (list, tuple)):
        return [number % sum(pattern) != 0 for number in numbers]
    if hasattr(config, "attn_logit_softcapping") and getattr(config, "window_size", None):
        return [number % 2 == 1 for number in numbers]
    return None


def check_family(targets: Collection[str], config: Any, by_budget: bool) -> None:
    """Raise an error for sizes that modelopt does not prune in models of this family.

    Args:
        targets: names of the requested sizes.
        config: the model's ``TransformerConfig``.
        by_budget: whether further sizes will be chosen to keep a number of parameters.

    Raises:
        ModelOptConfigError: naming what to set instead.
    """
    for problem in families.prune_problems(config, targets, by_budget):
        raise ModelOptConfigError(f"{problem}.")


def check_targets(resolved: Mapping[str, int], config: Any, by_budget: bool) -> None:
    """Raise an error for a depth chosen by importance, if the remaining layers could change their kind.

    Args:
        resolved: hparam -> requested size.
        config: the model's ``TransformerConfig``.
        by_budget: whether further sizes will be chosen to keep a number of parameters.

    Raises:
        ModelOptConfigError: naming what to set instead.
    """
    layers = config.num_layers
    if local_layers(config) is None or resolved.get("num_layers", None if by_budget else layers) == layers:
        return
    raise ModelOptConfigError(
        "Local and global attention alternate by the number of a layer in this model, so the importance of layers "
        f"cannot choose those that remain. Set target_num_layers={layers}, or drop_layers to layers after which the "
        "others keep their kind."
    )


def check_drop(drop_layers: Sequence[int], config: Any) -> None:
    """Raise an error for layers to drop after which another layer would change its kind.

    Args:
        drop_layers: 1-indexed numbers of the layers to remove.
        config: the model's ``TransformerConfig``.

    Raises:
        ModelOptConfigError: naming the layer, and layers that can be dropped.
    """
    before = local_layers(config)
    if before is None:
        return
    kept = [number for number in range(1, len(before) + 1) if number not in drop_layers]
    for new, old in enumerate(kept):
        if before[old - 1] != before[new]:
            kinds = ["global", "local"]
            raise ModelOptConfigError(
                f"drop_layers={list(drop_layers)}: layer {old} has {kinds[before[old - 1]]} attention and would become "
                f"layer {new + 1}, which has {kinds[before[new]]} attention in this model. Drop the last layers, or as "
                "many layers in a row as the pattern has."
            )


def follow(config: Any, kept: Sequence[int], before: Mapping[str, int]) -> None:
    """Let fields of a pruned model's configuration follow from what was pruned.

    Args:
        config: the pruned model's ``TransformerConfig``.
        kept: 1-indexed original numbers of the layers that are left.
        before: the sizes before.
    """
    if len(kept) != before["num_layers"]:
        for name in _BY_LAYER:
            value = getattr(config, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and name == "window_attn_skip_freq":
                value = [int(number % value != 0) for number in range(1, before["num_layers"] + 1)]
            if isinstance(value, (list, tuple)):
                setattr(config, name, [value[number - 1] for number in sorted(kept)])
    # Mixtral has one size for both; exporters and other frameworks read either.
    experts = before.get("moe_ffn_hidden_size")
    if experts is not None and experts == config.ffn_hidden_size and all_have_experts(config):
        config.ffn_hidden_size = config.moe_ffn_hidden_size


def write(saved: Any, live: Any) -> None:
    """Write these fields into the configuration that a checkpoint's context will hold.

    Args:
        saved: the recorded configuration.
        live: the model's ``TransformerConfig``.
    """
    for name in _BY_LAYER:
        if isinstance(value := getattr(live, name, None), list):
            setattr(saved, name, value)

"""The layer pattern of Mamba and hybrid models: one letter a layer, spelled out before layers go, and cut with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..errors import ModelOptConfigError

PATTERN = "hybrid_override_pattern"
# Shares of attention and MLP layers, which Megatron makes a pattern of, or compares with one that is set.
RATIOS = ("hybrid_attention_ratio", "hybrid_mlp_ratio")


def is_hybrid(core: nn.Module) -> bool:
    """Return whether a Megatron-Core model is one of Mamba, attention and MLP layers."""
    from megatron.core.models.mamba import MambaModel

    return isinstance(core, MambaModel)


def check_packages(core: nn.Module) -> None:
    """Raise an error for a Mamba or hybrid model if the package that modelopt needs for it is missing.

    Raises:
        ModelOptConfigError: naming the packages.
    """
    from modelopt.torch.nas.plugins import megatron as plugin

    if is_hybrid(core) and not getattr(plugin, "HAS_MAMBA", True):
        raise ModelOptConfigError(
            "Mamba and hybrid models can be pruned only if the package mamba_ssm can be imported, which it cannot "
            "here; install mamba_ssm and causal_conv1d. The model is as it was."
        )


@contextlib.contextmanager
def spelled_out(core: nn.Module) -> Iterator[None]:
    """Write the layer pattern of a hybrid model that has only shares of layers; remove it again if pruning fails.

    modelopt cuts the letters, and stops half-way if there are none; shares of the layers that are left would be
    another order of layers.
    """
    model: Any = core
    if not is_hybrid(core) or isinstance(getattr(model, PATTERN, None), str):
        yield
        return
    from megatron.core.ssm.mamba_hybrid_layer_allocation import allocate_layers

    shares = [getattr(model, name, 0.0) for name in RATIOS]
    pattern = "".join(allocate_layers(model.config.num_layers, *shares))
    before = [(holder, getattr(holder, PATTERN, None)) for holder in (model, model.config, model.decoder)]
    for holder, _ in before:
        setattr(holder, PATTERN, pattern)
    try:
        yield
    except BaseException:
        for holder, old in before:
            setattr(holder, PATTERN, old)
        raise


def keep_pattern(pattern: str, kept: Sequence[int]) -> str:
    """Return a hybrid model's layer pattern with only the kept layers' letters.

    Args:
        pattern: one letter a layer, such as ``"M*M-"``.
        kept: 1-indexed numbers of the layers that are left.
    """
    return "".join(pattern[number - 1] for number in sorted(kept))


def cut_pattern(core: nn.Module, kept: Sequence[int]) -> None:
    """Cut the pattern of a hybrid model, in model and configuration, to the layers that are left.

    modelopt cuts the model's own only, and not when layers are dropped by number; the configuration is saved. Shares
    are given up: Megatron raises an error for a pattern whose numbers of layers are not those that the shares make.

    Args:
        core: the pruned model.
        kept: 1-indexed original numbers of the layers that are left.
    """
    model: Any = core
    pattern = getattr(model.config, PATTERN, None)
    if not isinstance(pattern, str) or len(pattern) == len(kept):
        return
    for holder in (model.config, model, getattr(model, "decoder", None)):
        if isinstance(getattr(holder, PATTERN, None), str):
            setattr(holder, PATTERN, keep_pattern(pattern, kept))
        for name in RATIOS:
            if getattr(holder, name, None):
                setattr(holder, name, 0.0)

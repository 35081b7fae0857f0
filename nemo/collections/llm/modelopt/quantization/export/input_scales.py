"""Store the input scales of AWQ and SmoothQuant (``pre_quant_scale``) in a Hugging Face checkpoint.

Readers fuse q, k and v, and gate and up, and do not load a ``pre_quant_scale`` for them: modelopt's exporter of Hugging
Face models multiplies it into the norm before them. Other layers, such as the output and down projections, are loaded
one by one; with INT4 weights they must have a ``pre_quant_scale``, of ones if their input is not scaled.

The codes of the weights do not change: in memory the weights are already divided by the scale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from megatron.core.transformer.transformer_layer import TransformerLayer

from nemo_modelopt_dropin.preflight import families

from .. import quant_cfg_choices as choices
from .layouts.layer import INT4, Layer


@dataclass(frozen=True)
class Fold:
    """A layer that readers fuse with others, and the norm before it.

    Attributes:
        linear: The layer, Megatron's fused q/k/v or gate/up projection.
        norm: The module with the norm's parameters: the norm, or the layer itself if the norm is part of it.
        weight: Name of the norm's weight in ``norm``.
        bias: Name of the norm's bias in ``norm``, which may be None.
        is_zero_centred: Whether the norm multiplies by one plus its weight.
    """

    linear: torch.nn.Module
    norm: torch.nn.Module
    weight: str
    bias: str
    is_zero_centred: bool

    def parameters(self) -> Iterator[tuple[torch.nn.Parameter, float]]:
        """Yield each parameter of the norm and the number that the norm adds to it."""
        yield getattr(self.norm, self.weight), 1.0 if self.is_zero_centred else 0.0
        bias = getattr(self.norm, self.bias, None)
        if bias is not None:
            yield bias, 0.0


def folds(core: torch.nn.Module, everything: bool = False) -> list[Fold]:
    """Return the layers whose input scale is stored in the norm before them.

    Experts are not among them, because the router and the shared experts read the same norm.

    Args:
        core: The Megatron-Core model.
        everything: Include the first layer of MLPs without a gate, which readers load one by one and can scale.
    """
    if getattr(getattr(core, "config", None), "apply_residual_connection_post_layernorm", False):
        # The norm's output is also added to the layer's output.
        return []
    found = []
    for layer in core.modules():
        if isinstance(layer, TransformerLayer):
            found.append(_fold(layer.input_layernorm, getattr(layer.self_attention, "linear_qkv", None)))
            if isinstance(layer.mlp, MLP) and (everything or layer.config.gated_linear_unit):
                found.append(_fold(layer.pre_mlp_layernorm, layer.mlp.linear_fc1))
    return [fold for fold in found if fold is not None]


def _fold(norm: torch.nn.Module, linear: torch.nn.Module | None) -> Fold | None:
    """Return a layer with its norm, or None if either is missing or the norm has no weight."""
    fused = isinstance(norm, IdentityOp)
    weight, bias = ("layer_norm_weight", "layer_norm_bias") if fused else ("weight", "bias")
    owner = linear if fused else norm
    if linear is None or owner is None or getattr(owner, weight, None) is None:
        return None
    configured = getattr(getattr(linear, "config", None), "layernorm_zero_centered_gamma", False)
    return Fold(linear, owner, weight, bias, bool(getattr(owner, "zero_centered_gamma", configured)))


def scale_of(linear: torch.nn.Module) -> torch.Tensor | None:
    """Return the scale `[i]` of a layer's input in fp32, or None if there is none."""
    scale = getattr(getattr(linear, "input_quantizer", None), "pre_quant_scale", None)
    return None if scale is None else scale.detach().float().reshape(-1)


@contextlib.contextmanager
def folded(core: torch.nn.Module, layers: dict[int, Layer], dtype: torch.dtype) -> Iterator[None]:
    """Multiply input scales into the norms that store them, inside the context.

    Args:
        core: The Megatron-Core model; its norms are changed inside the context.
        layers: What is stored for each of its layers, by the module's id; the folded scales are removed permanently.
        dtype: The checkpoint's dtype.
    """
    kept = []
    try:
        for fold in folds(core):
            layer = layers.get(id(fold.linear))
            if layer is None or layer.pre_quant_scale is None:
                continue
            for parameter, offset in fold.parameters():
                kept.append((parameter, parameter.data))
                parameter.data = scaled(parameter.data, layer.pre_quant_scale, offset).to(dtype)
            layer.pre_quant_scale = None
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def add_missing(core: torch.nn.Module, layers: dict[int, Layer]) -> None:
    """Add scales of ones to this rank's INT4 layers that readers load one by one and expect a scale for."""
    fused = {id(fold.linear) for fold in folds(core)}
    for module in core.modules():
        layer = layers.get(id(module))
        if layer is None or layer.algorithm not in INT4:
            continue
        layer.facts["pre_quant_scale"] = True
        if layer.pre_quant_scale is None and id(module) not in fused:
            weight: Any = module.weight
            layer.pre_quant_scale = torch.ones(weight.shape[-1], device=weight.device)


def scaled(value: torch.Tensor, scale: torch.Tensor, offset: float) -> torch.Tensor:
    """Return a norm's parameter in fp32 that multiplies its output by ``scale``."""
    return (value.float() + offset) * scale.to(value.device) - offset


def norms_as_stored(core: torch.nn.Module, dtype: torch.dtype) -> dict[int, torch.Tensor]:
    """Return, by parameter id, the norms' parameters whose scaled values are those that a checkpoint stores."""
    found = {}
    for fold in folds(core):
        scale = scale_of(fold.linear)
        if scale is None:
            continue
        for parameter, offset in fold.parameters():
            divisor = torch.where(scale == 0, torch.ones_like(scale), scale).to(parameter.device)
            stored = scaled(parameter.data, scale, offset).to(dtype).float()
            found[id(parameter)] = (stored + offset) / divisor - offset
    return found


@contextlib.contextmanager
def rounded(core: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Round the input scales that are stored as ``pre_quant_scale`` to a checkpoint's dtype, inside the context."""
    in_norms = {id(fold.linear) for fold in folds(core)}
    kept = []
    for module in core.modules():
        if scale_of(module) is not None and id(module) not in in_norms:
            buffer = module.input_quantizer._pre_quant_scale
            kept.append((buffer, buffer.data))
            buffer.data = buffer.data.to(dtype).to(buffer.dtype)
    try:
        yield
    finally:
        for buffer, data in kept:
            buffer.data = data


def scales_inputs(quant_cfg: dict[str, Any]) -> bool:
    """Return whether the calibration of a quant_cfg adds scales to the inputs of layers."""
    return choices.is_awq(quant_cfg) or choices.is_smoothquant(quant_cfg)


def obstacle(core: torch.nn.Module, packs_experts: bool = False) -> str | None:
    """Return why a checkpoint cannot store the input scales of a model, or None.

    Args:
        core: The model, converted or not.
        packs_experts: Whether the architecture's files store all experts of a layer in one tensor.
    """
    if any(isinstance(module, MultiLatentAttention) for module in core.modules()):
        return families.LATENT_SCALES.reason
    if packs_experts and getattr(getattr(core, "config", None), "num_moe_experts", None):
        return "the files of this architecture cannot hold the scales that AWQ and SmoothQuant add to experts' inputs"
    return None

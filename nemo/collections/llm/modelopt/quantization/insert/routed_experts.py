"""Quantize the inputs of experts' second layers as the readers of exported files compute them.

An expert's output is multiplied by the weight that the router gives the expert for a token. Megatron-Core multiplies
the input of the second layer instead, which is the same as long as nothing is rounded. The programs that read exported
files multiply the output, so the inputs there are larger by the reciprocal of the routing weight: by about eight with
eight experts per token. With a static scale that was calibrated in Megatron-Core's order they would be clipped.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero

from nemo_modelopt_dropin.preflight import algorithms

from ..export import layout_choice

_WEIGHTS = "_routing_weights"


def prepare(core: Any, export_config: Any) -> bool:
    """Let experts multiply their outputs by the routing weights, if the model is quantized for readers that do.

    With ``export_format="nemo"`` it is if ``hf_layout`` is set, for a later export to Hugging Face files; otherwise
    the order and the amax stay those of Megatron-Core, which runs the checkpoint.

    Args:
        core: This rank's Megatron-Core model.
        export_config: The ``ExportConfig``, or None.

    Returns:
        Whether the experts were changed.
    """
    if export_config is None or not getattr(getattr(core, "config", None), "num_moe_experts", None):
        return False
    if export_config.export_format == "nemo" and layout_choice.requested(export_config) == algorithms.AUTO:
        return False
    for module in core.modules():
        if isinstance(module, SequentialMLP):
            for expert in module.local_experts:
                # modelopt replaces the method `forward` when it converts the module; hooks stay.
                if _WEIGHTS not in vars(expert):
                    vars(expert)[_WEIGHTS] = None
                    expert.register_forward_pre_hook(_with_ones, with_kwargs=True)
                    expert.register_forward_hook(_weighted)
    return True


def warn(core: torch.nn.Module) -> None:
    """Log on rank zero if static scales of experts' inputs were calibrated in Megatron-Core's order, for readers.

    Args:
        core: The converted Megatron-Core model, which will be written as a Hugging Face checkpoint.
    """
    for module in core.modules():
        for expert in module.local_experts if isinstance(module, SequentialMLP) else ():
            quantizer = getattr(expert.linear_fc2, "input_quantizer", None)
            if _WEIGHTS not in vars(expert) and getattr(quantizer, "amax", None) is not None:
                if is_global_rank_zero():
                    logging.warning(
                        "The input scales of experts' second layers were calibrated on inputs that Megatron-Core had "
                        "multiplied by the routing weights. Readers of Hugging Face files multiply the outputs, so "
                        'these scales are too small for them. Quantize with export_format="hf", or with hf_layout set.'
                    )
                return


def _with_ones(expert: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Keep the routing weights `[n]` of an expert's tokens, and pass weights of one to it.

    Megatron's fused activations of some experts need weights.
    """
    tokens, weights = (*args, kwargs.get("per_token_scale"))[:2]
    vars(expert)[_WEIGHTS] = weights
    return (tokens, None if weights is None else torch.ones_like(weights)), {}


def _weighted(expert: torch.nn.Module, _: tuple, outputs: tuple) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return an expert's outputs `[n, h]`, multiplied by the routing weights."""
    weights = vars(expert)[_WEIGHTS]
    vars(expert)[_WEIGHTS] = None
    output, bias = outputs
    if weights is None:
        return output, bias
    # Megatron has added the bias if there are weights.
    return (output * weights.unsqueeze(-1)).to(output.dtype), bias

"""Read from a converted linear layer what a Hugging Face checkpoint stores for it: codes, scales and the format.

How they are packed and named in files is defined by the layouts: `modelopt` and `compressed_tensors`.

Axes: o output, i input features, n blocks of the input.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

_E4M3 = (4, 3)
_E4M3_MAX = 448.0
# The largest value of each format's codes, by which modelopt's fake quantizers divide amax.
MAXBOUND = {"FP8": _E4M3_MAX, "W8": 127.0, "W4": 7.0}
# modelopt's quantizers treat an amax up to this value as zero.
_ZERO_AMAX = 2.0**-24
# Readers divide by scales, and a GPU flushes smaller numbers to zero.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass
class Layer:
    """What is stored for one linear layer of this rank.

    Attributes:
        algorithm: Name of the format in `HF_FORMATS`, modelopt's ``quant_algo``.
        scale: Scale of the weight: a scalar, `[o, 1]` or `[o, n]`.
        scale_2: Scale of the second step of W4A8, a scalar.
        input_scale: Scale of the input, a scalar.
        pre_quant_scale: Factors `[i]` of the input.
        facts: Further entries of the quantization configuration.
        codes: Codes `[o, i]`, one in each element, see `codes_of`; None if they were not computed.
    """

    algorithm: str
    scale: torch.Tensor
    scale_2: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    pre_quant_scale: torch.Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    codes: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> Layer:
        """Return what is stored for some of the output rows, in the order of the index.

        Args:
            index: Numbers of the rows.

        Returns:
            A layer with the same input; its scales of whole tensors are shared.
        """
        codes = None if self.codes is None else _rows(self.codes, index)
        scale = self.scale if self.scale.dim() == 0 else _rows(self.scale, index)
        return replace(self, codes=codes, scale=scale, facts=dict(self.facts))


def _rows(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    # Not all devices can select rows of FP8, so its bytes are selected.
    found = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    return found[index.to(tensor.device)].view(tensor.dtype)


def algorithm_of(weight: list[dict[str, Any]], has_input: bool, has_pre_quant_scale: bool) -> str | None:
    """Return the format of a layer that can be stored, or None for all others.

    Args:
        weight: ``num_bits``, ``axis`` and ``block_sizes`` of each step of the weight quantizer.
        has_input: Whether the input is quantized.
        has_pre_quant_scale: Whether the input is scaled first.
    """
    bits = [tuple(b) if isinstance(b := step["num_bits"], (tuple, list)) else b for step in weight]
    blocks = weight[0].get("block_sizes") or {}
    dynamic = any((step.get("block_sizes") or {}).get("type") == "dynamic" for step in weight)
    if dynamic or set(blocks) - {-1, "type", "scale_bits"}:
        return None
    if bits == [4, _E4M3] and blocks:
        return "W4A8_AWQ"
    if bits == [4] and blocks and not has_input:
        return "W4A16_AWQ"
    if bits == [8] and not blocks:
        return "W8A8_SQ_PER_CHANNEL" if has_input else "W8A16"
    if bits == [_E4M3] and not blocks and weight[0].get("axis") is None and has_input and not has_pre_quant_scale:
        return "FP8"
    return None


def settings_of(module: torch.nn.Module) -> tuple[list[dict[str, Any]], bool, bool] | None:
    """Return the arguments of `algorithm_of` for a layer, or None if its weight is not quantized."""
    quantizer = getattr(module, "weight_quantizer", None)
    if not isinstance(quantizer, (TensorQuantizer, SequentialQuantizer)):
        return None
    steps = [step for step in _steps(quantizer) if step.is_enabled]
    if not steps:
        return None
    inputs = getattr(module, "input_quantizer", None)
    has_input = isinstance(inputs, TensorQuantizer) and inputs.is_enabled
    settings = [{"num_bits": s.num_bits, "axis": s.axis, "block_sizes": s.block_sizes} for s in steps]
    return settings, has_input, getattr(inputs, "pre_quant_scale", None) is not None


def read(module: torch.nn.Module) -> Layer | None:
    """Return what is stored for a converted layer, or None if its format cannot be stored."""
    settings = settings_of(module)
    algorithm = algorithm_of(*settings) if settings else None
    if settings is None or algorithm is None:
        return None
    steps = [step for step in _steps(module.weight_quantizer) if step.is_enabled]
    if steps[0].amax is None:
        return None
    inputs: Any = getattr(module, "input_quantizer", None)
    has_input = settings[1]
    pre = getattr(inputs, "pre_quant_scale", None)
    scale = positive_scale(steps[0].amax, steps[0].maxbound)
    facts: dict[str, Any] = {}
    if algorithm.startswith("W4"):
        facts = {
            "group_size": int(steps[0].block_sizes[-1]),
            "has_zero_point": False,
            "pre_quant_scale": pre is not None,
        }
    rows = module.weight.shape[0]
    if algorithm.startswith("W8"):
        scale = scale.reshape(-1, 1).expand(rows, 1)
    return Layer(
        algorithm,
        scale.reshape(rows, -1) if scale.numel() > 1 else scale.reshape(()),
        scale_2=_scalar(steps[1], steps[1].amax) if len(steps) > 1 else None,
        input_scale=_scalar(inputs, _input_amax(inputs)) if has_input and inputs.amax is not None else None,
        pre_quant_scale=None if pre is None else pre.detach().float().reshape(-1),
        facts=facts,
    )


def _steps(quantizer: Any) -> list[Any]:
    return list(quantizer) if isinstance(quantizer, SequentialQuantizer) else [quantizer]


def _scalar(quantizer: Any, amax: torch.Tensor) -> torch.Tensor:
    return positive_scale(amax, quantizer.maxbound).amax().reshape(())


def _input_amax(quantizer: Any) -> torch.Tensor:
    """Return the amax that an input quantizer applies; for FP8, modelopt replaces zero by one."""
    amax = quantizer.amax.detach().float()
    is_float = not isinstance(quantizer.num_bits, int)
    return torch.where(amax <= _ZERO_AMAX, torch.ones_like(amax), amax) if is_float else amax


def positive_scale(amax: torch.Tensor, maxbound: float) -> torch.Tensor:
    """Return the fp32 scale for an amax, or the smallest positive one if the amax is zero (all codes are zero then)."""
    return (amax.detach().float() / maxbound).clamp_min(SMALLEST_SCALE)


def codes_of(module: torch.nn.Module, layer: Layer) -> torch.Tensor:
    """Return the codes `[o, i]` to which a layer's weight quantizer rounds its weight; INT4 codes are one int8 each.

    The quantizer returns code times scale. Dividing by the scale restores the code exactly, for any arithmetic that the
    quantizer uses on this device. Rounding the weight here could break ties differently, and bf16 weights have many.

    Args:
        module: The converted layer, with the weight of this rank.
        layer: The result of `read` for it.
    """
    weight: Any = module.weight
    quantizer = next(step for step in _steps(module.weight_quantizer) if step.is_enabled)
    on_grid = quantizer(weight.detach().float())
    return nearest_codes(layer.algorithm, on_grid / per_element(layer.scale.to(on_grid.device), on_grid.shape[-1]))


def values_of(layer: Layer, codes: torch.Tensor) -> torch.Tensor:
    """Return the fp32 weight `[o, i]` for codes; encoding it results into the same codes."""
    return codes.float() * per_element(layer.scale.to(codes.device), codes.shape[-1])


def nearest_codes(algorithm: str, scaled: torch.Tensor) -> torch.Tensor:
    """Return the codes nearest to a weight in units of its scale."""
    if algorithm == "FP8":
        return scaled.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    lowest, highest = (-128, 127) if algorithm.startswith("W8") else (-8, 7)
    return scaled.round().clamp(lowest, highest).to(torch.int8)


def per_element(scale: torch.Tensor, width: int) -> torch.Tensor:
    """Return a scale that broadcasts against `[o, i]`; those of blocks `[o, n]` are repeated to the width."""
    if scale.dim() < 2 or scale.shape[-1] == 1:
        return scale
    return scale.repeat_interleave(width // scale.shape[-1], dim=-1)


def static_quantizer(algorithm: str, scale: torch.Tensor) -> TensorQuantizer:
    """Return modelopt's quantizer for a stored scale, so that ties are rounded as in modelopt.

    Args:
        algorithm: ``quant_algo``, or "FP8" for a second step.
        scale: The scale of the input or of the second step, a scalar.
    """
    is_integer = algorithm.startswith("W8")
    settings = QuantizerAttributeConfig(num_bits=8 if is_integer else _E4M3)
    maxbound = MAXBOUND["W8" if is_integer else "FP8"]
    return TensorQuantizer(settings, amax=scale.detach().float().reshape(()) * maxbound)

"""Encode quantized linear layers for a Hugging Face checkpoint, and decode them, by pure functions of tensors.

The names are those of modelopt's unified checkpoint: ``weight`` (codes), ``weight_scale``, ``weight_scale_2``,
``input_scale`` and ``pre_quant_scale``, which multiplies a layer's input before anything else (AWQ, SmoothQuant).

Axes: o output, i input features, n blocks of the input.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from nemo_modelopt_dropin.preflight.algorithms import HF_FORMATS

_E4M3 = (4, 3)
_E4M3_MAX = 448.0
# The largest value of each format's codes, by which modelopt's fake quantizers divide amax.
_MAXBOUND = {"FP8": _E4M3_MAX, "W8": 127.0, "W4": 7.0}
# modelopt's quantizers treat an amax up to this value as zero.
_ZERO_AMAX = 2.0**-24
# Readers divide by scales, and a GPU flushes smaller numbers to zero.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# The sixteen values of FP4 E2M1 by their code.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

# Values of ``quant_algo`` that `decode` supports.
DECODABLE = frozenset(HF_FORMATS)


@dataclass
class Layer:
    """What is stored for one linear layer of this rank.

    Attributes:
        algorithm: ``quant_algo``, the name of the format.
        scale: Scale of the weight: a scalar, `[o, 1]` or `[o, n]`.
        scale_2: Scale of the second step of W4A8, a scalar.
        input_scale: Scale of the input, a scalar.
        pre_quant_scale: Factors `[i]` of the input.
        facts: Further entries of the quantization configuration.
        codes: Codes of the whole weight `[o, i]` if they were gathered from tensor-parallel ranks, see `codes_of`.
    """

    algorithm: str
    scale: torch.Tensor
    scale_2: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    pre_quant_scale: torch.Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    codes: torch.Tensor | None = None


def algorithm_of(weight: list[dict[str, Any]], has_input: bool, has_pre_quant_scale: bool) -> str | None:
    """Return ``quant_algo`` of a layer that this module encodes, or None for all others.

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


def is_encoded_here(algorithm: str) -> bool:
    """Return whether `encode`, and not modelopt's writer, makes the codes of a ``quant_algo``."""
    return algorithm in HF_FORMATS and HF_FORMATS[algorithm].encoded_here


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
    """Return what is stored for a converted layer, or None if this module does not encode it."""
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
    return _nearest(layer.algorithm, on_grid / _per_element(layer.scale.to(on_grid.device), on_grid.shape[-1]))


def values_of(layer: Layer, codes: torch.Tensor) -> torch.Tensor:
    """Return the fp32 weight `[o, i]` for codes; `encode` turns it into the same codes."""
    return codes.float() * _per_element(layer.scale.to(codes.device), codes.shape[-1])


def _nearest(algorithm: str, scaled: torch.Tensor) -> torch.Tensor:
    """Return the codes nearest to a weight in units of its scale."""
    if algorithm == "FP8":
        return scaled.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    lowest, highest = (-128, 127) if algorithm.startswith("W8") else (-8, 7)
    return scaled.round().clamp(lowest, highest).to(torch.int8)


def encode(algorithm: str, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the codes of a weight `[o, i]` as they are stored; the scale is a scalar, `[o, 1]` or `[o, n]`."""
    maxbound = next(bound for prefix, bound in _MAXBOUND.items() if algorithm.startswith(prefix))
    # modelopt's quantizers multiply by the reciprocal; `w / (amax / maxbound)` would break ties differently.
    reciprocal = maxbound / (scale.float() * maxbound)
    codes = _nearest(algorithm, weight.float() * _per_element(reciprocal, weight.shape[-1]))
    if not algorithm.startswith("W4"):
        return codes
    # Two neighbouring output rows share a byte, the lower one in the lower half.
    return ((codes[0::2] & 0x0F) | (codes[1::2] << 4)).view(torch.uint8).contiguous()


def unpack(algorithm: str, stored: torch.Tensor) -> torch.Tensor:
    """Return stored codes, one in each element, as `codes_of` does."""
    if not algorithm.startswith("W4"):
        return stored
    signed = stored.view(torch.int8)
    # Shifting an int8 right keeps the sign; the lower half is shifted to the left first.
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=1).flatten(0, 1)


def decode(algorithm: str, tensors: dict[str, torch.Tensor], second_step: bool = True) -> torch.Tensor:
    """Return the dequantized fp32 weight `[o, i]` of a layer's stored tensors, without ``pre_quant_scale``.

    Args:
        algorithm: ``quant_algo``.
        tensors: The layer's tensors by the last part of their names.
        second_step: Round to FP8 after INT4 if there is a ``weight_scale_2`` for it (W4A8).

    Raises:
        KeyError: For an algorithm that is not in `DECODABLE`.
    """
    codes, scale = tensors["weight"], tensors["weight_scale"].float()
    if algorithm == "FP8":
        return codes.float() * scale
    if algorithm.startswith("W8"):
        return codes.float() * _column(scale)
    if algorithm.startswith("NVFP4"):
        table = torch.tensor(_E2M1)
        values = table[torch.stack((codes & 0x0F, codes >> 4), dim=-1).long()].flatten(-2)
        return values * _per_element(scale * tensors["weight_scale_2"].float(), values.shape[-1])
    if not algorithm.startswith("W4A16") and not algorithm.startswith("W4A8_AWQ"):
        raise KeyError(algorithm)
    values = unpack(algorithm, codes).float()
    weight = values * _per_element(scale, values.shape[-1])
    if not second_step or "weight_scale_2" not in tensors:
        return weight
    return static_quantizer("FP8", tensors["weight_scale_2"])(weight)


def _column(scale: torch.Tensor) -> torch.Tensor:
    return scale[:, None] if scale.dim() == 1 else scale


def _per_element(scale: torch.Tensor, width: int) -> torch.Tensor:
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
    maxbound = _MAXBOUND["W8" if is_integer else "FP8"]
    return TensorQuantizer(settings, amax=scale.detach().float().reshape(()) * maxbound)


def configuration(
    algorithm: str | None, facts: dict[str, Any], excluded: list[str], kv_cache: str | None
) -> dict[str, Any]:
    """Return the content of ``hf_quant_config.json``; the algorithm is None if only the KV cache is quantized."""
    import modelopt

    quantization = {"quant_algo": algorithm, "exclude_modules": sorted(excluded), **facts}
    if kv_cache:
        quantization["kv_cache_quant_algo"] = kv_cache
    return {"producer": {"name": "modelopt", "version": modelopt.__version__}, "quantization": quantization}


def config_section(quant_config: dict[str, Any]) -> dict[str, Any]:
    """Return the section ``quantization_config`` of ``config.json`` for the content of ``hf_quant_config.json``."""
    details = dict(quant_config["quantization"])
    section: dict[str, Any] = {"ignore": details.pop("exclude_modules")}
    cache = details.pop("kv_cache_quant_algo", None)
    if details["quant_algo"] is not None:
        section["config_groups"] = {"group_0": _config_group(details)}
    if cache:
        section["kv_cache_scheme"] = kv_cache_scheme(cache)
    return {**section, **details, "producer": quant_config["producer"], "quant_method": "modelopt"}


def kv_cache_scheme(cache: str) -> dict[str, Any] | str:
    """Return the entry of ``config.json`` for a ``kv_cache_quant_algo``."""
    return {"dynamic": False, "num_bits": 8, "type": "float"} if cache == "FP8" else cache


def _config_group(details: dict[str, Any]) -> dict[str, Any]:
    """Return how weights and inputs are quantized, from the entries of ``hf_quant_config.json``."""
    is_fp8 = details["quant_algo"] == "FP8"
    bits = 4 if details["quant_algo"].startswith("W4") else 8
    weights = {"dynamic": False, "num_bits": bits, "type": "float" if is_fp8 else "int"}
    group: dict[str, Any] = {"weights": weights, "targets": ["Linear"]}
    if is_fp8:
        group["input_activations"] = dict(weights)
    elif "group_size" in details:
        group["weights"]["group_size"] = details["group_size"]
    else:
        group["weights"]["strategy"] = "channel"
    if "A8" in details["quant_algo"]:
        kind = "float" if bits == 4 else "int"
        group["input_activations"] = {"dynamic": False, "num_bits": 8, "type": kind}
    return group

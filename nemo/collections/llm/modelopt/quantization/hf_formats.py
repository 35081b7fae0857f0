"""What a quantized linear layer becomes in a Hugging Face checkpoint, and back: pure functions of tensors.

The names are those of modelopt's unified checkpoint: ``weight`` (codes), ``weight_scale``, ``weight_scale_2``,
``input_scale`` and ``pre_quant_scale``, which multiplies a layer's input before anything else (AWQ, SmoothQuant).

Axes: o output, i input features, n blocks of the input.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

_E4M3 = (4, 3)
_E4M3_MAX = 448.0
# The sixteen values of FP4 E2M1 by their code.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

# Values of ``quant_algo`` whose numbers `decode` knows.
DECODABLE = frozenset({"FP8", "W4A16_AWQ", "W4A8_AWQ", "W8A16", "W8A8_SQ_PER_CHANNEL", "NVFP4"})


@dataclass
class Layer:
    """One linear layer of this rank: what is to be stored beside its codes.

    Attributes:
        algorithm: ``quant_algo`` as modelopt's readers call it.
        scale: Of the weight: a scalar, `[o, 1]` or `[o, n]`.
        scale_2: Of the second step of W4A8, a scalar.
        input_scale: Of the input, a scalar.
        pre_quant_scale: `[i]`.
        facts: Further entries of the quantization configuration.
    """

    algorithm: str
    scale: torch.Tensor
    scale_2: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    pre_quant_scale: torch.Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def algorithm_of(weight: list[dict[str, Any]], has_input: bool, has_pre_quant_scale: bool) -> str | None:
    """Return ``quant_algo`` of the layers this module writes itself, or None for all others.

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
    """Return the arguments of `algorithm_of` for a layer, None where its weight is not quantized."""
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
    """Return what is to be stored for a converted layer, None where it is not quantized or another writer's."""
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
    scale = steps[0].amax.detach().float() / steps[0].maxbound
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
        scale_2=_scalar(steps[1]) if len(steps) > 1 else None,
        input_scale=_scalar(inputs) if has_input and inputs.amax is not None else None,
        pre_quant_scale=None if pre is None else pre.detach().float().reshape(-1),
        facts=facts,
    )


def _steps(quantizer: Any) -> list[Any]:
    return list(quantizer) if isinstance(quantizer, SequentialQuantizer) else [quantizer]


def _scalar(quantizer: Any) -> torch.Tensor:
    return (quantizer.amax.detach().float() / quantizer.maxbound).amax().reshape(())


def encode(algorithm: str, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the codes of a weight `[o, i]` for scales that are a scalar, `[o, 1]` or `[o, n]`."""
    scaled = weight.float() / _per_element(scale.float(), weight.shape[-1])
    if algorithm == "FP8":
        return scaled.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    if algorithm.startswith("W8"):
        return scaled.round().clamp(-128, 127).to(torch.int8)
    codes = scaled.round().clamp(-8, 7).to(torch.int8)
    # Two neighbouring output rows share a byte, the lower one in the lower half.
    return ((codes[0::2] & 0x0F) | (codes[1::2] << 4)).view(torch.uint8).contiguous()


def decode(algorithm: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the fp32 weight `[o, i]` that a layer's stored tensors stand for, without ``pre_quant_scale``.

    Args:
        algorithm: ``quant_algo``.
        tensors: The layer's tensors by the last part of their names.

    Raises:
        KeyError: For an algorithm whose numbers are not known here.
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
    signed = codes.view(torch.int8)
    # Shifting an int8 right keeps the sign: to the left first for the lower half.
    values = torch.stack(((signed << 4) >> 4, signed >> 4), dim=1).flatten(0, 1).float()
    weight = values * _per_element(scale, values.shape[-1])
    return round_to_e4m3(weight, tensors["weight_scale_2"].float()) if "weight_scale_2" in tensors else weight


def _column(scale: torch.Tensor) -> torch.Tensor:
    return scale[:, None] if scale.dim() == 1 else scale


def _per_element(scale: torch.Tensor, width: int) -> torch.Tensor:
    """Return a scale that broadcasts against `[o, i]`: blocks `[o, n]` are repeated to the width."""
    if scale.dim() < 2 or scale.shape[-1] == 1:
        return scale
    return scale.repeat_interleave(width // scale.shape[-1], dim=-1)


def round_to_e4m3(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return a value as FP8 E4M3 with a scale would hold it."""
    return (value / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).to(value.dtype) * scale


def quantize_input(algorithm: str, value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return a layer's input as its static input quantizer gives it on."""
    if algorithm.startswith("W8"):
        return (value / scale).round().clamp(-128, 127) * scale
    return round_to_e4m3(value, scale)


def configuration(algorithm: str, facts: dict[str, Any], excluded: list[str], kv_cache: str | None) -> dict[str, Any]:
    """Return the content of ``hf_quant_config.json``."""
    import modelopt

    quantization = {"quant_algo": algorithm, "exclude_modules": sorted(excluded), **facts}
    if kv_cache:
        quantization["kv_cache_quant_algo"] = kv_cache
    return {"producer": {"name": "modelopt", "version": modelopt.__version__}, "quantization": quantization}


def config_section(quant_config: dict[str, Any]) -> dict[str, Any]:
    """Return the section ``quantization_config`` of ``config.json`` for a content of ``hf_quant_config.json``."""
    details = dict(quant_config["quantization"])
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
    section = {"config_groups": {"group_0": group}, "ignore": details.pop("exclude_modules"), **details}
    if section.pop("kv_cache_quant_algo", None) == "FP8":
        section["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return {**section, "producer": quant_config["producer"], "quant_method": "modelopt"}

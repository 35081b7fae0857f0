"""modelopt's layout of quantized layers in Hugging Face files: the tensors of each linear layer, and the configuration.

The names are those of modelopt's unified checkpoint: ``weight`` (codes), ``weight_scale``, ``weight_scale_2``,
``input_scale`` and ``pre_quant_scale``, which multiplies a layer's input before anything else (AWQ, SmoothQuant).

Axes: o output, i input features, n blocks of the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nemo_modelopt_dropin.preflight.algorithms import HF_FORMATS

from .layer import MAXBOUND, Layer, nearest_codes, per_element, static_quantizer

# The sixteen values of FP4 E2M1 by their code.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

# Values of ``quant_algo`` that `decode` supports.
DECODABLE = frozenset(HF_FORMATS)


def is_encoded_here(algorithm: str) -> bool:
    """Return whether `encode`, and not modelopt's writer, makes the codes of a ``quant_algo``."""
    return algorithm in HF_FORMATS and HF_FORMATS[algorithm].encoded_here


def encode(algorithm: str, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the codes of a weight `[o, i]` as they are stored; the scale is a scalar, `[o, 1]` or `[o, n]`."""
    maxbound = next(bound for prefix, bound in MAXBOUND.items() if algorithm.startswith(prefix))
    # modelopt's quantizers multiply by the reciprocal; `w / (amax / maxbound)` would break ties differently.
    reciprocal = maxbound / (scale.float() * maxbound)
    return pack(algorithm, nearest_codes(algorithm, weight.float() * per_element(reciprocal, weight.shape[-1])))


def pack(algorithm: str, codes: torch.Tensor) -> torch.Tensor:
    """Return codes `[o, i]`, one in each element, as they are stored."""
    if not algorithm.startswith("W4"):
        return codes.contiguous()
    # Two neighbouring output rows share a byte, the lower one in the lower half.
    return ((codes[0::2] & 0x0F) | (codes[1::2] << 4)).view(torch.uint8).contiguous()


def tensors(layer: Layer, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors that are stored for one linear layer of the Hugging Face model.

    Args:
        layer: The layer, with its codes.
        dtype: The checkpoint's dtype.

    Returns:
        The tensors by the last part of their names.
    """
    if layer.codes is None:
        raise RuntimeError("The layer has no codes.")
    scale = layer.scale.squeeze(-1) if layer.algorithm.startswith("W8") else layer.scale
    found = {
        "weight": pack(layer.algorithm, layer.codes),
        "weight_scale": scale,
        "weight_scale_2": layer.scale_2,
        "input_scale": layer.input_scale,
        "pre_quant_scale": None if layer.pre_quant_scale is None else layer.pre_quant_scale.to(dtype),
    }
    return {leaf: value.cpu().contiguous() for leaf, value in found.items() if value is not None}


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
        return values * per_element(scale * tensors["weight_scale_2"].float(), values.shape[-1])
    if not algorithm.startswith("W4A16") and not algorithm.startswith("W4A8_AWQ"):
        raise KeyError(algorithm)
    values = unpack(algorithm, codes).float()
    weight = values * per_element(scale, values.shape[-1])
    if not second_step or "weight_scale_2" not in tensors:
        return weight
    return static_quantizer("FP8", tensors["weight_scale_2"])(weight)


def _column(scale: torch.Tensor) -> torch.Tensor:
    return scale[:, None] if scale.dim() == 1 else scale


def quant_config(
    formats: Mapping[str, tuple[str, dict[str, Any]]], excluded: list[str], kv_cache: str | None
) -> dict[str, Any]:
    """Return the content of ``hf_quant_config.json``.

    Args:
        formats: Name of the format in `HF_FORMATS`, and further facts, of each quantized linear layer by its name.
        excluded: Names of the linear layers in 16 bits.
        kv_cache: ``kv_cache_quant_algo``.
    """
    algorithm, facts = next(iter(formats.values()), (None, {}))
    return configuration(algorithm, facts, excluded, kv_cache)


def section(
    formats: Mapping[str, tuple[str, dict[str, Any]]], excluded: list[str], kv_cache: str | None
) -> dict[str, Any]:
    """Return ``quantization_config`` of ``config.json``; the arguments are those of `quant_config`."""
    return config_section(quant_config(formats, excluded, kv_cache))


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

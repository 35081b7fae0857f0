"""modelopt's layout of quantized layers in Hugging Face files: the tensors of each linear layer, and the configuration.

The names are those of modelopt's unified checkpoint: ``weight`` (codes), ``weight_scale``, ``weight_scale_2``,
``input_scale`` and ``pre_quant_scale``, which multiplies a layer's input before anything else (AWQ, SmoothQuant).

Axes: o output, i input features, n blocks of the input.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from .inputs import static_quantizer
from .layer import BLOCK_2D, BY_CHANNEL, BY_TOKEN, FP4, INT4, INT8, Layer, values_of

NAME = "modelopt"
# Formats that this layout has a name for.
ALGORITHMS = frozenset({"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8"} | FP4 | INT4 | (INT8 - BY_TOKEN))
# The last parts of the names of a quantized layer's tensors; the first is that of the codes.
LEAVES = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
# modelopt writes this name in lower case (`QUANTIZATION_FP8_PB_WO` of modelopt.torch.export.model_config). vLLM and
# TensorRT-LLM ignore the case.
_WRITTEN_AS = {"FP8_PB_WO": "fp8_pb_wo"}
_MIXED = "MIXED_PRECISION"
# Names of the scales of keys and values below attention, and their shape.
CACHE_SCALES, CACHE_SHAPE = ("k_proj.k_scale", "v_proj.v_scale"), ()

Formats = Mapping[str, tuple[str, dict[str, Any]]]


# --- tensors ----------------------------------------------------------------------------------------------------------


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
    scale = layer.scale
    if layer.algorithm in BY_CHANNEL:
        scale = scale.squeeze(-1)
    elif layer.algorithm == "FP8_PB_WO":
        scale = scale[:, None, :, None]
    pre = layer.pre_quant_scale
    found = {
        "weight": pack(layer.algorithm, layer.codes),
        "weight_scale": scale,
        "weight_scale_2": layer.scale_2,
        "input_scale": layer.input_scale,
        "pre_quant_scale": None if pre is None else pre.to(dtype),
    }
    return {leaf: value.cpu().contiguous() for leaf, value in found.items() if value is not None}


def layer_of(algorithm: str, facts: dict[str, Any], stored: Mapping[str, torch.Tensor]) -> Layer:
    """Return the layer that stored tensors belong to; the inverse of `tensors`.

    Args:
        algorithm: Name of the format in `HF_FORMATS`.
        facts: Further entries of the configuration.
        stored: The layer's tensors by the last part of their names.
    """
    scale = stored["weight_scale"]
    if algorithm in BY_CHANNEL:
        scale = scale.reshape(-1, 1)
    elif algorithm == "FP8_PB_WO":
        scale = scale.reshape(scale.shape[0], -1)
    return Layer(
        algorithm,
        scale,
        scale_2=stored.get("weight_scale_2"),
        input_scale=stored.get("input_scale"),
        pre_quant_scale=stored.get("pre_quant_scale"),
        facts=dict(facts),
        codes=unpack(algorithm, stored["weight"]),
    )


def as_read(layer: Layer) -> Layer:
    """Return a layer with the scales that readers compute from what is stored; here they are the same."""
    return layer


def scales_as_stored(core: torch.nn.Module, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Return a context in which quantizers have the scales that are stored; here they always have."""
    return contextlib.nullcontext()


def pack(algorithm: str, codes: torch.Tensor) -> torch.Tensor:
    """Return codes `[o, i]`, one in each element, as they are stored."""
    if algorithm in FP4:
        # Two neighbouring inputs share a byte, the lower one in the lower half.
        return (codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous()
    if algorithm in INT4:
        # Two neighbouring output rows share a byte, the lower one in the lower half.
        return ((codes[0::2] & 0x0F) | (codes[1::2] << 4)).view(torch.uint8).contiguous()
    return codes.contiguous()


def unpack(algorithm: str, stored: torch.Tensor) -> torch.Tensor:
    """Return stored codes, one in each element, as in `Layer.codes`."""
    if algorithm in FP4:
        return torch.stack((stored & 0x0F, stored >> 4), dim=-1).flatten(-2)
    if algorithm not in INT4:
        return stored
    signed = stored.view(torch.int8)
    # Shifting an int8 right keeps the sign; the lower half is shifted to the left first.
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=1).flatten(0, 1)


def decode(
    algorithm: str, stored: Mapping[str, torch.Tensor], second_step: bool = True, facts: dict[str, Any] | None = None
) -> torch.Tensor:
    """Return the dequantized fp32 weight `[o, i]` of a layer's stored tensors, without ``pre_quant_scale``.

    Args:
        algorithm: Name of the format in `HF_FORMATS`.
        stored: The layer's tensors by the last part of their names.
        second_step: Round to FP8 after INT4 if there is a ``weight_scale_2`` for it (W4A8).
        facts: Further entries of the configuration.

    Raises:
        KeyError: For a format that this layout does not have.
    """
    if algorithm not in ALGORITHMS:
        raise KeyError(algorithm)
    layer = layer_of(algorithm, facts or {}, stored)
    weight = values_of(layer)
    if not second_step or algorithm not in INT4 or layer.scale_2 is None:
        return weight
    return static_quantizer("FP8", layer.scale_2)(weight)


# --- configuration ----------------------------------------------------------------------------------------------------


def quant_config(formats: Formats, excluded: list[str], kv_cache: str | None) -> dict[str, Any]:
    """Return the content of ``hf_quant_config.json``.

    Args:
        formats: Name of the format in `HF_FORMATS`, and further facts, of each quantized linear layer by its name.
        excluded: Names of the linear layers in 16 bits.
        kv_cache: ``kv_cache_quant_algo``.
    """
    formats = _with_one_nvfp4(formats)
    different = [entry for number, entry in enumerate(formats.values()) if entry not in list(formats.values())[:number]]
    if len(different) <= 1:
        algorithm, facts = next(iter(different), (None, {}))
        return configuration(algorithm, facts, excluded, kv_cache)
    layers = {name: {"quant_algo": _written(algorithm), **facts} for name, (algorithm, facts) in formats.items()}
    return configuration(_MIXED, {"quantized_layers": layers}, excluded, kv_cache)


def _with_one_nvfp4(formats: Formats) -> Formats:
    """Return formats with one name for NVFP4 layers with and without factors of inputs.

    Readers of NVFP4_AWQ take layers without factors, but no mixture that contains NVFP4_AWQ.
    """
    if {algorithm for algorithm, _ in formats.values()} != {"NVFP4", "NVFP4_AWQ"}:
        return formats
    scaled = next(entry for entry in formats.values() if entry[0] == "NVFP4_AWQ")
    return dict.fromkeys(formats, scaled)


def section(formats: Formats, excluded: list[str], kv_cache: str | None) -> dict[str, Any]:
    """Return ``quantization_config`` of ``config.json``; the arguments are those of `quant_config`."""
    return config_section(quant_config(formats, excluded, kv_cache))


def configuration(
    algorithm: str | None, facts: dict[str, Any], excluded: list[str], kv_cache: str | None
) -> dict[str, Any]:
    """Return the content of ``hf_quant_config.json``; the algorithm is None if only the KV cache is quantized."""
    import modelopt

    quantization = {"quant_algo": _written(algorithm), "exclude_modules": sorted(excluded), **facts}
    if kv_cache:
        quantization["kv_cache_quant_algo"] = kv_cache
    return {"producer": {"name": "modelopt", "version": modelopt.__version__}, "quantization": quantization}


def _written(algorithm: str | None) -> str | None:
    return None if algorithm is None else _WRITTEN_AS.get(algorithm, algorithm)


def formats_of(section: Mapping[str, Any]) -> dict[str | None, tuple[str, dict[str, Any]]]:
    """Return the formats in a ``quantization_config`` by the layer's name; None is the name for all layers.

    Args:
        section: The result of `section`, or the part ``quantization`` of ``hf_quant_config.json``.
    """
    layers = section.get("quantized_layers")
    if layers is not None:
        return {name: _format(entry) for name, entry in layers.items()}
    return {None: _format(section)} if section.get("quant_algo") else {}


def _format(entry: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    algorithm = str(entry["quant_algo"]).upper()
    facts = {key: entry[key] for key in ("group_size", "has_zero_point", "pre_quant_scale") if key in entry}
    if algorithm in FP4 | {"MXFP8"}:
        facts.setdefault("group_size", 32 if algorithm == "MXFP8" else 16)
    return algorithm, facts


def config_section(quant_config: dict[str, Any]) -> dict[str, Any]:
    """Return the section ``quantization_config`` of ``config.json`` for the content of ``hf_quant_config.json``."""
    details = dict(quant_config["quantization"])
    section: dict[str, Any] = {"ignore": details.pop("exclude_modules")}
    cache = details.pop("kv_cache_quant_algo", None)
    algorithm = details["quant_algo"]
    if algorithm == _MIXED:
        section["config_groups"] = _mixed_groups(details["quantized_layers"])
    elif algorithm is not None:
        section["config_groups"] = {"group_0": {**_config_group(details), "targets": ["Linear"]}}
    if algorithm == "NVFP4":
        # modelopt names the size in the groups only.
        details.pop("group_size", None)
    if cache:
        section["kv_cache_scheme"] = kv_cache_scheme(cache)
    return {**section, **details, "producer": quant_config["producer"], "quant_method": "modelopt"}


def kv_cache_scheme(cache: str) -> dict[str, Any] | str:
    """Return the entry of ``config.json`` for a ``kv_cache_quant_algo``."""
    return {"dynamic": False, "num_bits": 8, "type": "float"} if cache == "FP8" else cache


def _mixed_groups(layers: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return one group for each different entry, with the names of its layers."""
    targets: dict[tuple, list[str]] = defaultdict(list)
    for name, entry in layers.items():
        targets[tuple(sorted(entry.items()))].append(name)
    return {
        f"group_{number}": {**_config_group(dict(entry)), "targets": sorted(names)}
        for number, (entry, names) in enumerate(targets.items())
    }


def _config_group(details: dict[str, Any]) -> dict[str, Any]:
    """Return how weights and inputs are quantized, from the entries of ``hf_quant_config.json``."""
    algorithm = details["quant_algo"].upper()
    is_float = algorithm not in INT4 | INT8
    weights: dict[str, Any] = {
        "dynamic": False,
        "num_bits": 4 if algorithm in FP4 | INT4 else 8,
        "type": "float" if is_float else "int",
    }
    group: dict[str, Any] = {"weights": weights}
    if algorithm == "FP8_PB_WO":
        weights |= {"strategy": "block", "block_structure": [BLOCK_2D, BLOCK_2D]}
    elif algorithm in BY_CHANNEL:
        weights["strategy"] = "channel"
    elif "group_size" in details:
        weights["group_size"] = details["group_size"]
    if algorithm in ("FP8", "NVFP4", "NVFP4_AWQ", "MXFP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        group["input_activations"] = {key: value for key, value in weights.items() if key != "strategy"}
    elif "A8" in algorithm:
        group["input_activations"] = {"dynamic": False, "num_bits": 8, "type": "float" if algorithm in INT4 else "int"}
    return group

"""The layout of the ``compressed-tensors`` library, which vLLM, SGLang and transformers read.

Codes are packed and unpacked by the library. A layer's tensors are ``weight`` or ``weight_packed`` (codes),
``weight_scale``, ``input_scale``, and for NVFP4 ``weight_global_scale`` and ``input_global_scale``, which are the
reciprocals of the scales. The layout has no scales of single inputs; they must be multiplied into other tensors first.

Axes: o output, i input features, n blocks of the input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from .layer import BLOCK_2D, FP4, Layer, algorithm_of, positive_scale, settings_of

NAME = "compressed-tensors"
# The last parts of the names of a quantized layer's tensors; the first two are those of the codes.
LEAVES = (
    "weight_packed",
    "weight",
    "weight_scale",
    "weight_shape",
    "weight_global_scale",
    "input_global_scale",
    "input_scale",
)
# The library packs these codes into 32 bits; readers then need the scales in the dtype of the activations.
_PACKED_INT = {"W4A16_AWQ": 4, "W8A16": 8}
_MIXED = "mixed-precision"
# Names of the scales of keys and values below attention, and their shape.
CACHE_SCALES, CACHE_SHAPE = ("k_scale", "v_scale"), (1,)

Formats = Mapping[str, tuple[str, dict[str, Any]]]


def _arguments(bits: int, kind: str, strategy: str, dynamic: bool | str = False, **sizes: Any) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "symmetric": True,
        "dynamic": dynamic,
        "group_size": sizes.get("group_size"),
        "block_structure": sizes.get("block_structure"),
        "actorder": None,
        **{key: value for key, value in sizes.items() if key == "scale_dtype"},
    }


# Name of the library's format, and how weights and inputs are quantized. `_group` sets the size of blocks.
_FP8_CHANNEL = _arguments(8, "float", "channel")
_NVFP4: dict[str, Any] = {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
_MXFP8: dict[str, Any] = {"group_size": 32, "scale_dtype": "torch.uint8"}
_SCHEMES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "FP8": ("float-quantized", _arguments(8, "float", "tensor"), _arguments(8, "float", "tensor")),
    "FP8_PER_CHANNEL_PER_TOKEN": ("float-quantized", _FP8_CHANNEL, _arguments(8, "float", "token", True)),
    "FP8_WO": ("float-quantized", _FP8_CHANNEL, None),
    # Weights are all that modelopt quantizes here, but readers with kernels for such blocks also round the inputs.
    "FP8_PB_WO": (
        "float-quantized",
        _arguments(8, "float", "block", block_structure=[BLOCK_2D, BLOCK_2D]),
        _arguments(8, "float", "group", True, group_size=BLOCK_2D),
    ),
    "W8A8_SQ_PER_CHANNEL": ("int-quantized", _arguments(8, "int", "channel"), _arguments(8, "int", "tensor")),
    "W8A8_PER_CHANNEL_PER_TOKEN": (
        "int-quantized",
        _arguments(8, "int", "channel"),
        _arguments(8, "int", "token", True),
    ),
    "W8A16": ("pack-quantized", _arguments(8, "int", "channel"), None),
    "W4A16_AWQ": ("pack-quantized", _arguments(4, "int", "group"), None),
    "NVFP4": (
        "nvfp4-pack-quantized",
        _arguments(4, "float", "tensor_group", **_NVFP4),
        _arguments(4, "float", "tensor_group", "local", **_NVFP4),
    ),
    "W4A16_NVFP4": ("nvfp4-pack-quantized", _arguments(4, "float", "tensor_group", **_NVFP4), None),
    "MXFP8": (
        "mxfp8-quantized",
        _arguments(8, "float", "group", **_MXFP8),
        _arguments(8, "float", "group", True, **_MXFP8),
    ),
}
# Formats of `HF_FORMATS` that this layout can hold.
ALGORITHMS = frozenset(_SCHEMES)


# --- tensors ----------------------------------------------------------------------------------------------------------


def tensors(layer: Layer, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors that are stored for one linear layer of the Hugging Face model.

    Args:
        layer: The layer, with its codes and without ``pre_quant_scale``.
        dtype: The checkpoint's dtype.

    Returns:
        The tensors by the last part of their names.
    """
    algorithm, _ = layer.format
    if layer.codes is None or layer.pre_quant_scale is not None or algorithm not in ALGORITHMS:
        raise RuntimeError(f"This layout cannot hold a layer in {layer.algorithm} without codes or with input scales.")
    codes = layer.codes.cpu().contiguous()
    if algorithm in _PACKED_INT:
        found = _packed_int(codes, layer.scale.cpu(), _PACKED_INT[algorithm], dtype)
    elif algorithm in FP4:
        found = _packed_fp4(codes, layer)
    else:
        scale = layer.scale.reshape(1) if layer.scale.dim() == 0 else layer.scale
        found = {"weight": codes, "weight_scale": scale, "input_scale": layer.input_scale}
    found = {leaf: value.cpu().contiguous() for leaf, value in found.items() if value is not None}
    return {leaf: value.reshape(1) if value.dim() == 0 else value for leaf, value in found.items()}


def _packed_int(codes: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> dict[str, Any]:
    from compressed_tensors.compressors import pack_to_int32

    scale = scale.expand(codes.shape[0], 1) if scale.dim() == 0 else scale
    return {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_scale": stored_scale(scale, dtype),
        "weight_shape": torch.tensor(codes.shape),
    }


def _packed_fp4(codes: torch.Tensor, layer: Layer) -> dict[str, Any]:
    from compressed_tensors.compressors import pack_fp4_to_uint8

    from .blocks import e2m1_values

    assert layer.scale_2 is not None
    inputs = layer.input_scale
    return {
        "weight_packed": pack_fp4_to_uint8(e2m1_values(codes)),
        "weight_scale": layer.scale,
        "weight_global_scale": layer.scale_2.float().reciprocal(),
        "input_global_scale": None if inputs is None else inputs.float().reciprocal(),
    }


def layer_of(algorithm: str, facts: dict[str, Any], stored: Mapping[str, torch.Tensor]) -> Layer:
    """Return the layer that stored tensors belong to; the inverse of `tensors`.

    Args:
        algorithm: Name of the format in `HF_FORMATS`.
        facts: Further entries of the configuration.
        stored: The layer's tensors by the last part of their names.
    """
    scale, inputs, scale_2 = stored["weight_scale"], stored.get("input_scale"), None
    if algorithm in FP4:
        scale_2 = stored["weight_global_scale"].reciprocal().reshape(())
        inputs = stored.get("input_global_scale")
        inputs = None if inputs is None else inputs.reciprocal()
    return Layer(
        algorithm,
        scale.reshape(()) if algorithm == "FP8" else scale,
        scale_2=scale_2,
        input_scale=None if inputs is None else inputs.reshape(()),
        facts=dict(facts),
        codes=unpack(algorithm, stored),
    )


def as_read(layer: Layer) -> Layer:
    """Return a layer with the scales that readers compute from what is stored: NVFP4 stores rounded reciprocals."""
    if layer.algorithm not in FP4:
        return layer
    return replace(layer, scale_2=_twice_inverted(layer.scale_2), input_scale=_twice_inverted(layer.input_scale))


def _twice_inverted(scale: torch.Tensor | None) -> torch.Tensor | None:
    return None if scale is None else scale.float().reciprocal().reciprocal()


def unpack(algorithm: str, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the stored codes of a layer, one in each element, as in `Layer.codes`."""
    if algorithm in FP4:
        # The library unpacks values, and -0 is lost; codes are therefore split from their bytes.
        packed = stored["weight_packed"]
        return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)
    if algorithm not in _PACKED_INT:
        return stored["weight"]
    from compressed_tensors.compressors import unpack_from_int32

    shape = torch.Size(stored["weight_shape"].tolist())
    return unpack_from_int32(stored["weight_packed"], _PACKED_INT[algorithm], shape)


def decode(
    algorithm: str, stored: Mapping[str, torch.Tensor], second_step: bool = True, facts: dict[str, Any] | None = None
) -> torch.Tensor:
    """Return the fp32 weight `[o, i]` of a layer's stored tensors, dequantized by the library.

    Args:
        algorithm: Name of the format in `HF_FORMATS`.
        stored: The layer's tensors by the last part of their names.
        second_step: Not used; no format of this layout has a second step.
        facts: Not used.

    Raises:
        KeyError: For a format that this layout does not have.
    """
    from compressed_tensors.compressors import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    _, weights, _ = _SCHEMES[algorithm]
    scale, global_scale = stored["weight_scale"].float(), None
    if algorithm in FP4:
        rows, half = stored["weight_packed"].shape
        codes = unpack_fp4_from_uint8(stored["weight_packed"], rows, 2 * half, dtype=torch.float32)
        global_scale = stored["weight_global_scale"]
    else:
        codes = unpack(algorithm, stored).float()
    if algorithm == "MXFP8":
        scale = torch.exp2(scale - 127)
    if weights["strategy"] in ("group", "tensor_group"):
        weights = {**weights, "group_size": codes.shape[1] // scale.shape[1]}
    arguments = {key: value for key, value in weights.items() if key in ("num_bits", "type", "strategy", "group_size")}
    arguments["block_structure"] = weights["block_structure"]
    return dequantize(codes, scale, args=QuantizationArgs(**arguments), dtype=torch.float32, global_scale=global_scale)


# --- scales in 16 bits ------------------------------------------------------------------------------------------------


def stored_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return scales in the checkpoint's dtype; those that would be zero are the smallest positive number."""
    smallest = torch.finfo(dtype).smallest_normal if dtype != torch.float16 else 2.0**-24
    return scale.to(dtype).clamp_min(smallest)


@contextlib.contextmanager
def scales_as_stored(core: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Round the scales of quantizers to the dtype in which this layout stores them, inside the context.

    The codes of a layer are then the nearest ones for the scale that readers multiply by, and the model in memory
    computes with the stored weights. Enter the context before `layer.read` and for the comparison of logits.

    Args:
        core: The model; the quantizers of its layers with packed integers are changed inside the context.
        dtype: The checkpoint's dtype.
    """
    kept: list[tuple[Any, torch.Tensor]] = []
    try:
        for module in core.modules():
            settings = settings_of(module)
            quantizer: Any = getattr(module, "weight_quantizer", None)
            if settings is None or algorithm_of(*settings) not in _PACKED_INT or quantizer.amax is None:
                continue
            scale = positive_scale(quantizer._amax, quantizer.maxbound)
            kept.append((quantizer, quantizer._amax))
            # Products of a scale in 16 bits and the largest code are exact in fp32.
            quantizer._amax = stored_scale(scale, dtype).float() * quantizer.maxbound
        yield
    finally:
        for quantizer, amax in kept:
            quantizer._amax = amax


# --- configuration ----------------------------------------------------------------------------------------------------


def section(formats: Formats, excluded: list[str], kv_cache: str | None) -> dict[str, Any]:
    """Return ``quantization_config`` of ``config.json``.

    Args:
        formats: Name of the format in `HF_FORMATS`, and further facts, of each quantized linear layer by its name.
        excluded: Names of the linear layers in 16 bits.
        kv_cache: "FP8" if the KV cache is quantized to FP8, or None.
    """
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for name, (algorithm, facts) in formats.items():
        group = _group(algorithm, facts)
        names = next((names for known, names in groups if known == group), None)
        if names is None:
            groups.append((group, names := []))
        names.append(name)
    kinds = {group["format"] for group, _ in groups}
    return {
        "quant_method": NAME,
        "format": next(iter(kinds), "dense") if len(kinds) <= 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {**group, "targets": ["Linear"] if len(groups) == 1 else sorted(names)}
            for number, (group, names) in enumerate(groups)
        },
        "ignore": sorted(excluded),
        "kv_cache_scheme": _arguments(8, "float", "tensor") if kv_cache == "FP8" else None,
        "global_compression_ratio": None,
        "version": _version(),
    }


def _version() -> str:
    import compressed_tensors

    return compressed_tensors.__version__


def _group(algorithm: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the layers of a format are quantized."""
    kind, weights, inputs = _SCHEMES[algorithm]
    weights = dict(weights)
    if "group_size" in facts:
        weights["group_size"] = facts["group_size"]
    return {
        "weights": weights,
        "input_activations": inputs and dict(inputs),
        "output_activations": None,
        "format": kind,
    }


def formats_of(section: Mapping[str, Any]) -> dict[str | None, tuple[str, dict[str, Any]]]:
    """Return the formats in a ``quantization_config`` by the layer's name; None is the name for all layers."""
    found: dict[str | None, tuple[str, dict[str, Any]]] = {}
    for group in section["config_groups"].values():
        entry = _format(group)
        names = [None] if group["targets"] == ["Linear"] else group["targets"]
        found.update(dict.fromkeys(names, entry))
    return found


def _format(group: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the format of a group that `section` wrote."""
    size = group["weights"].get("group_size")
    facts = {"group_size": size} if size else {}
    parts = {key: group[key] for key in ("weights", "input_activations", "output_activations", "format")}
    return next(name for name in _SCHEMES if _group(name, {"group_size": size}) == parts), facts

"""Names of `layouts` for the writer that extends modelopt's, which supports fewer formats than `layouts`."""

from __future__ import annotations

from typing import Any

import torch

from .layouts import layer as _layer
from .layouts.inputs import static_quantizer
from .layouts.layer import SMALLEST_SCALE, Layer, codes_of, values_of
from .layouts.modelopt import (
    DECODABLE,
    config_section,
    configuration,
    decode,
    encode,
    is_encoded_here,
    kv_cache_scheme,
    unpack,
)

__all__ = [
    "DECODABLE",
    "SMALLEST_SCALE",
    "Layer",
    "algorithm_of",
    "codes_of",
    "config_section",
    "configuration",
    "decode",
    "encode",
    "is_encoded_here",
    "kv_cache_scheme",
    "read",
    "settings_of",
    "static_quantizer",
    "unpack",
    "values_of",
]

_ENCODED = frozenset({"FP8", "W8A8_SQ_PER_CHANNEL", "W8A16", "W4A16_AWQ", "W4A8_AWQ"})


def algorithm_of(weight: list[dict[str, Any]], has_input: bool, has_pre_quant_scale: bool) -> str | None:
    """Return `layer.algorithm_of` if the writer encodes the format, or None."""
    found = _layer.algorithm_of(weight, has_input, has_pre_quant_scale)
    return found if found in _ENCODED else None


def settings_of(module: torch.nn.Module) -> tuple[list[dict[str, Any]], bool, bool] | None:
    """Return the arguments of `algorithm_of` for a layer, or None if its weight is not quantized."""
    found = _layer.settings_of(module)
    return None if found is None else found[:3]


def read(module: torch.nn.Module) -> Layer | None:
    """Return `layer.read` if the writer encodes the format, or None."""
    settings = settings_of(module)
    return _layer.read(module) if settings and algorithm_of(*settings) else None

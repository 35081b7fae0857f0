"""Names of `layouts` for the modules of today's writer."""

from __future__ import annotations

from .layouts.layer import (
    SMALLEST_SCALE,
    Layer,
    algorithm_of,
    codes_of,
    read,
    settings_of,
    static_quantizer,
    values_of,
)
from .layouts.layer import per_element as _per_element
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
    "_per_element",
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

"""Read a quant_cfg from a JSON file and restore what JSON cannot express: integer keys and tuples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo.utils.cast_utils import maybe_cast_to_type

from ..errors import MissingFileError, ModelOptConfigError

_TUPLE_KEYS = frozenset({"num_bits", "scale_bits"})


def standardize_json_config(quant_cfg: dict[str, Any]) -> None:
    """Convert a quant_cfg that was read from JSON to the form modelopt expects, in place.

    Numbers among the keys of ``block_sizes`` become ``int`` (axes); lists in ``num_bits`` and ``scale_bits`` become
    tuples (exponent and mantissa bits).

    Args:
        quant_cfg: The dictionary; nested dictionaries and lists of dictionaries are converted too.
    """
    for key in list(quant_cfg):
        value = quant_cfg[key]
        if key in _TUPLE_KEYS and isinstance(value, list):
            quant_cfg[key] = tuple(value)
        elif key == "block_sizes" and isinstance(value, dict):
            quant_cfg[key] = {maybe_cast_to_type(axis, int): size for axis, size in value.items()}
            standardize_json_config(quant_cfg[key])
        elif isinstance(value, dict):
            standardize_json_config(value)
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, dict):
                    standardize_json_config(item)


def load_quant_cfg(cfg_path: str | Path) -> dict[str, Any]:
    """Read a quant_cfg from a JSON file.

    Args:
        cfg_path: The file.

    Returns:
        The dictionary with keys "quant_cfg" and "algorithm".

    Raises:
        ModelOptConfigError: If the file cannot be read or is not a JSON object.
    """
    try:
        with open(cfg_path) as file:
            quant_cfg = json.load(file)
    except (OSError, UnicodeDecodeError) as error:
        kind = MissingFileError if isinstance(error, FileNotFoundError) else ModelOptConfigError
        raise kind(f"The quantization config {cfg_path} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise ModelOptConfigError(
            f"The quantization config {cfg_path} is not valid JSON ({error}); use one of the named algorithms or a "
            'file like {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}}, "algorithm": "max"}.'
        ) from error
    if not isinstance(quant_cfg, dict):
        raise ModelOptConfigError(
            f"The quantization config {cfg_path} holds a {type(quant_cfg).__name__}, not an object."
        )
    standardize_json_config(quant_cfg)
    return quant_cfg

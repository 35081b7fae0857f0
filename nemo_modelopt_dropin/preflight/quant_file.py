"""Check the form of a JSON file with a quant_cfg before modelopt is imported, which checks the fields itself."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_modelopt_dropin.errors import did_you_mean

_KEYS = ("quant_cfg", "algorithm")


def problems(path: str) -> list[str]:
    """Return what is wrong with the form of a file.

    Args:
        path: The file, which exists.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror or error}"]
    except ValueError as error:
        return [f"{path} is not valid JSON: {error}"]
    if not isinstance(content, dict) or not isinstance(content.get("quant_cfg"), (dict, list)):
        return [
            f'{path} must hold an object "quant_cfg" (patterns of quantizer names and their attributes) or a list of '
            "its entries"
        ]
    return [f"{path}: unknown field {name!r}{did_you_mean(name, _KEYS)}" for name in content if name not in _KEYS]

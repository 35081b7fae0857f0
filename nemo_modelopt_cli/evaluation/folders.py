"""Hugging Face folders: whether the program that will load a model reads its format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_modelopt_cli.evaluation.harness_settings import BACKENDS, unreadable
from nemo_modelopt_dropin.preflight import checkpoint_files, readers


def problems(folder: str | Path, backend: str) -> list[str]:
    """Return why lm-eval cannot score the model in a folder with a backend.

    Args:
        folder: a Hugging Face folder.
        backend: name of the backend.
    """
    if found := checkpoint_files.problems(folder):
        return found
    if found := checkpoint_files.tokenizer_problems(str(folder)):
        return found
    name, layout = quantization(folder)
    if layout == readers.MODELOPT and BACKENDS[backend] == readers.TRANSFORMERS:
        name = name if (name, layout) in readers.TABLE else "FP8"  # no format of this layout is read
    if name is None or layout is None:
        return []
    reason = unreadable(name, layout, BACKENDS[backend])
    if reason is None:
        return []
    others = [other for other, reader in BACKENDS.items() if other != backend and reader in readers.of(name, layout)]
    remedy = f"use --backend {others[0]}" if others else "export it with another --hf-layout"
    return [f"{folder} ({name} in the layout {layout}): {BACKENDS[backend]} cannot load it: {reason}; {remedy}"]


def quantization(folder: str | Path) -> tuple[str | None, str | None]:
    """Return format and layout of a folder that modelopt's or compressed-tensors' settings describe.

    The format is None if it is not quantized, or if its name does not follow from the settings.
    """
    own = _json(Path(folder) / "config.json").get("quantization_config") or {}
    if own.get("quant_method") == readers.COMPRESSED_TENSORS:
        return None, readers.COMPRESSED_TENSORS
    beside = _json(Path(folder) / "hf_quant_config.json").get("quantization") or {}
    if own.get("quant_method") == readers.MODELOPT or beside:
        return own.get("quant_algo") or beside.get("quant_algo"), readers.MODELOPT
    return None, None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

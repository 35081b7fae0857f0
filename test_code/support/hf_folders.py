"""Readers of a written Hugging Face folder, for the tests of exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder, by name."""
    from nemo.collections.llm.modelopt.quantization.export import hf_files

    return dict(hf_files.read_tensors(folder))


def configurations(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what ``hf_quant_config.json`` and the section in ``config.json`` say of the quantization."""
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    return json.loads((folder / "hf_quant_config.json").read_text())["quantization"], section

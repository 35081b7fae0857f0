"""Layouts of quantized layers in Hugging Face files."""

from __future__ import annotations

from types import ModuleType

from . import compressed_tensors, modelopt

# By the name that readers know, ``quant_method`` of ``config.json``.
LAYOUTS: dict[str, ModuleType] = {layout.NAME: layout for layout in (modelopt, compressed_tensors)}

"""Write the configuration of a Hugging Face checkpoint: architecture, formats, and layers in 16 bits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from . import hf_files


def write_generation_config(model: Any, folder: Path) -> None:
    """Write ``generation_config.json``: the one the model was imported with, or one from its tokenizer.

    Its special tokens also replace those in ``config.json``, where NeMo's exporters write those of the tokenizer, the
    defaults of the class, or constants.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    own = getattr(getattr(model, "config", None), "generation_config", None)
    if not isinstance(own, GenerationConfig):
        tokenizer = getattr(getattr(model, "tokenizer", None), "tokenizer", None)
        found = {name: getattr(tokenizer, name, None) for name in names}
        own = GenerationConfig(**{name: value for name, value in found.items() if isinstance(value, int)})
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content |= {name: value for name in names if (value := getattr(own, name, None)) is not None}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    own.save_pretrained(str(folder))


def describe(
    folder: Path, layout: Any, formats: Mapping[str, tuple[str, dict[str, Any]]], cache: str | None, head: str
) -> None:
    """Write the quantized formats and the list of layers in 16 bits into the configuration files.

    Args:
        folder: The checkpoint.
        layout: A module of `layouts`.
        formats: Format and facts of each quantized layer by name.
        cache: ``kv_cache_quant_algo``.
        head: Name of the output layer.
    """
    if not formats and cache is None:
        return
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    excluded = unquantized(folder, head, set(formats))
    if hasattr(layout, "quant_config"):
        content = layout.quant_config(formats, excluded, cache)
        (folder / "hf_quant_config.json").write_text(json.dumps(content, indent=4), encoding="utf-8")
    config["quantization_config"] = layout.section(formats, excluded, cache)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def unquantized(folder: Path, head: str, quantized: set[str] | None = None) -> list[str]:
    """Return the names of the linear layers that are not quantized, including those that are not stored.

    modelopt excludes the parent of fused layers: with `linear_qkv` in 16 bits it lists the whole ``self_attn``, and a
    reader would load the codes of its other layers as weights. An output layer that shares the embedding's weight is
    not stored, but readers build it as a linear layer.

    Args:
        folder: The checkpoint.
        head: Name of the output layer.
        quantized: Names of the quantized layers; by default those with a stored scale.
    """
    shapes = hf_files.stored_shapes(folder)
    stored = {name.removesuffix(".weight") for name, shape in shapes.items() if _is_matrix(name, shape)}
    linear = {name for name in stored if "embed" not in name} | hf_files.linear_layers(folder) | ({head} - {""})
    if quantized is None:
        quantized = {name for name in linear if f"{name}.weight_scale" in shapes}
    return sorted(linear - quantized)


def _is_matrix(name: str, shape: list[int]) -> bool:
    return name.endswith(".weight") and len(shape) == 2

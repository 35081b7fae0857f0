"""Write the configuration of a Hugging Face checkpoint: architecture, formats, and layers in 16 bits."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, GenerationConfig

from ...errors import ModelOptConfigError
from . import hf_encoding, hf_files, support


@dataclass(frozen=True)
class Names:
    """Names in an architecture's files.

    Attributes:
        attention: Prefix of the tensors of attention, with ``{}`` for the layer's number.
        head: Name of the output layer.
    """

    attention: str
    head: str


def names_of(hf_config) -> Names:
    """Return the names of modelopt's mapping for an architecture.

    Raises:
        ModelOptConfigError: If modelopt has no mapping for it.
    """
    from modelopt.torch.export.plugins.mcore_common import all_mcore_hf_export_mapping

    architecture = (getattr(hf_config, "architectures", None) or [None])[0]
    rules = all_mcore_hf_export_mapping.get(architecture)
    if rules is None:
        raise ModelOptConfigError(
            f"modelopt cannot write {architecture}; supported architectures: {sorted(support.known_architectures())}."
        )
    names = [getattr(rules.get(rule), "target_name_or_prefix", "") for rule in ("linear_qkv", "output_layer")]
    return Names(names[0], names[1].rstrip("."))


def with_architecture(hf_config):
    """Return a configuration that names its class of ``transformers``.

    NeMo's exporters name none for Nemotron, and the dense class for Qwen3 with experts.
    """
    classes = AutoModelForCausalLM._model_mapping
    name = classes[type(hf_config)].__name__ if type(hf_config) in classes else None
    if name in support.known_architectures():
        hf_config = copy.copy(hf_config)
        hf_config.architectures = [name]
    return hf_config


def name_tied(path: Path, model) -> None:
    """Write into ``config.json`` whether the output layer is tied; NeMo's exporter of Qwen2 writes false for all."""
    tied = getattr(model, "share_embeddings_and_output_weights", None)
    if isinstance(tied, bool):
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**content, "tie_word_embeddings": tied}, indent=2), encoding="utf-8")


def write_generation_config(model: Any, folder: Path) -> None:
    """Write ``generation_config.json``: the one the model was imported with, or one from its tokenizer.

    If the model was imported with one, its special tokens also replace those in ``config.json``, which NeMo's exporters
    take from the tokenizer.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    own = getattr(getattr(model, "config", None), "generation_config", None)
    if isinstance(own, GenerationConfig):
        path = folder / "config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content |= {name: value for name in names if (value := getattr(own, name, None)) is not None}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    else:
        tokenizer = getattr(getattr(model, "tokenizer", None), "tokenizer", None)
        found = {name: getattr(tokenizer, name, None) for name in names}
        own = GenerationConfig(**{name: value for name, value in found.items() if isinstance(value, int)})
    own.save_pretrained(str(folder))


def describe(folder: Path, layers: dict[int, hf_encoding.Layer], cache: str | None, head: str) -> None:
    """Write the quantized formats and the list of layers in 16 bits into the configuration files.

    Args:
        folder: The checkpoint.
        layers: What was stored for each layer of this rank.
        cache: ``kv_cache_quant_algo``.
        head: Name of the output layer.
    """
    path = folder / "hf_quant_config.json"
    named = json.loads(path.read_text())["quantization"]["quant_algo"] if path.exists() else None
    if named is None:
        # modelopt 0.37 also writes one if it has no name for the format, or if the model is not quantized.
        path.unlink(missing_ok=True)
    if not layers and named is None and cache is None:
        return
    config = json.loads((folder / "config.json").read_text())
    excluded = unquantized(folder, head)
    if named and ("quantization_config" in config or not layers):
        _amend(path, folder / "config.json", excluded, cache)
        return
    first = next(iter(layers.values()), None)
    content = hf_encoding.configuration(
        first.algorithm if first else None, first.facts if first else {}, excluded, cache
    )
    path.write_text(json.dumps(content, indent=4))
    config["quantization_config"] = hf_encoding.config_section(content)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def unquantized(folder: Path, head: str) -> list[str]:
    """Return the names of the linear layers that are not quantized, including those that are not stored.

    modelopt excludes the parent of fused layers: with `linear_qkv` in 16 bits it lists the whole ``self_attn``, and a
    reader would load the codes of its other layers as weights. An output layer that shares the embedding's weight is
    not stored, but readers build it as a linear layer.

    Args:
        folder: The checkpoint.
        head: Name of the output layer.
    """
    shapes = hf_files.stored_shapes(folder)
    stored = {name.removesuffix(".weight") for name, shape in shapes.items() if _is_matrix(name, shape)}
    linear = {name for name in stored if "embed" not in name} | hf_files.linear_layers(folder) | ({head} - {""})
    return sorted(name for name in linear if f"{name}.weight_scale" not in shapes)


def _amend(quant_config: Path, config: Path, names: list[str], cache: str | None) -> None:
    """Write the names of the layers in 16 bits and the format of the KV cache into both of modelopt's files."""
    content = json.loads(quant_config.read_text())
    quantization = content["quantization"]
    quantization["exclude_modules"] = names
    quantization.pop("kv_cache_quant_algo", None)
    if cache:
        quantization["kv_cache_quant_algo"] = cache
    quant_config.write_text(json.dumps(content, indent=4))
    content = json.loads(config.read_text())
    section = content.get("quantization_config", {})
    if "ignore" in section:
        section["ignore"] = names
        section.pop("kv_cache_scheme", None)
        if cache:
            section["kv_cache_scheme"] = hf_encoding.kv_cache_scheme(cache)
        config.write_text(json.dumps(content, indent=2))


def _is_matrix(name: str, shape: list[int]) -> bool:
    return name.endswith(".weight") and len(shape) == 2

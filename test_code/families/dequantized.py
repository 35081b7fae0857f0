"""Read a written Hugging Face folder into a `transformers` model, decoded by this file alone.

Nothing of the package, of modelopt or of compressed-tensors is used: names, packing and scales are written down here as
the documentation of both layouts has them, so that an error that writer and reader of the package share shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FP8, FP8_MAX, INT8_MAX = torch.float8_e4m3fn, 448.0, 127.0
_SCALES = ("weight_scale", "weight_shape", "input_scale", "pre_quant_scale")


class Switch:
    """Whether the inputs of layers are rounded."""

    on = True


def stored(folder: str | Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder by name."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(str(file))
    return found


def layout(folder: str | Path) -> str:
    """Return the layout of a folder; modelopt's for one that is not quantized."""
    content = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return content.get("quantization_config", {}).get("quant_method", "modelopt")


def nibbles(packed: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return INT4 codes `[o, i]`: eight columns in a word with an offset of 8, or two rows in a byte, signed."""
    if packed.dtype == torch.int32:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        return (((packed[..., None] >> shifts) & 15).flatten(1)[:, :columns] - 8).float()
    pairs = torch.stack((packed & 15, packed >> 4), 1).flatten(0, 1)[:rows].to(torch.int16)
    return torch.where(pairs > 7, pairs - 16, pairs).float()


def weight_of(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the fp32 weight `[o, i]` of a layer from its tensors by the last part of their names."""
    scale = parts["weight_scale"].float()
    codes = parts.get("weight_packed", parts.get("weight"))
    assert codes is not None
    if codes.dtype == FP8:
        assert scale.numel() == 1
        return codes.float() * scale
    if codes.dtype == torch.int8:
        return codes.float() * scale.reshape(-1, 1)
    rows = scale.shape[0]
    columns = int(parts["weight_shape"][1]) if "weight_shape" in parts else codes.shape[1]
    values = nibbles(codes, rows, columns)
    return values * scale.repeat_interleave(columns // scale.shape[1], 1)


def is_dynamic(section: dict[str, Any], layer: str) -> bool:
    """Return whether the inputs of a layer have a scale for each token that is not stored, in compressed-tensors."""
    groups = section.get("config_groups") or {}
    named = [group for group in groups.values() if layer in group["targets"]]
    found = named or [group for group in groups.values() if "Linear" in group["targets"]]
    return any((group.get("input_activations") or {}).get("dynamic") is True for group in found)


def input_of(parts: dict[str, torch.Tensor], switch: Switch, dynamic: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that a layer applies to its input: its factors, and rounding if the switch is on."""
    factors, scale, codes = parts.get("pre_quant_scale"), parts.get("input_scale"), parts.get("weight")

    def function(x: torch.Tensor) -> torch.Tensor:
        x = x if factors is None else x * factors.float()
        if (scale is None and not dynamic) or not switch.on:
            return x
        assert codes is not None
        if scale is None:
            assert codes.dtype == torch.int8
            by_token = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / INT8_MAX
            return (x / by_token).round() * by_token
        assert scale.numel() == 1 and not dynamic
        step = scale.float().reshape(())
        if codes.dtype == FP8:
            return (x / step).clamp(-FP8_MAX, FP8_MAX).to(FP8).float() * step
        return (x / step).round().clamp(-INT8_MAX - 1, INT8_MAX) * step

    return function


def load(folder: str | Path) -> tuple[Any, Switch, list[str]]:
    """Return the model of a folder in fp32, the switch of its inputs, and the names of its quantized layers.

    Each tensor of the model has a value in the folder, and each value has a place in the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, switch = Path(folder), Switch()
    config = AutoConfig.from_pretrained(folder)
    section = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32, attn_implementation="eager").eval()
    tensors = stored(folder)
    layers = sorted(name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale"))
    assert bool(layers) == bool(section), section
    weights = {}
    for layer in layers:
        names = [name for name in (*_SCALES, "weight", "weight_packed") if f"{layer}.{name}" in tensors]
        parts = {name: tensors.pop(f"{layer}.{name}") for name in names}
        weights[f"{layer}.weight"] = weight_of(parts)
        into = input_of(parts, switch, is_dynamic(section or {}, layer))
        model.get_submodule(layer).register_forward_pre_hook(lambda _, args, into=into: (into(args[0]), *args[1:]))
    weights |= {name: value.float() for name, value in tensors.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    return model, switch, layers

"""What readers take, as data, each rule with the file of the reader's source code that it was read from.

A rule says what a folder in one format and one layout must hold for one reader. `problems` compares a folder with it.
Shapes are text: o outputs, i inputs of a linear layer of the Hugging Face model; a quotient is rounded up.
"""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nemo_modelopt_dropin.preflight.readers import (
    COMPRESSED_TENSORS,
    MODELOPT,
    SGLANG,
    TENSORRT_LLM,
    TRANSFORMERS,
    VLLM,
)
from test_code.support.hf_folders import tensors_of

FP8, F32, U8, I8, I32, I64, BF16 = "float8_e4m3fn", "float32", "uint8", "int8", "int32", "int64", "bfloat16"
# Layers that servers fuse into one matrix.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass(frozen=True)
class Rule:
    """What one reader takes in one format and layout.

    Attributes:
        source: The file of the reader's source code.
        tensors: Dtype and shape of each tensor of a quantized layer by the last part of its name.
        optional: The same of tensors that may be missing.
        shared: Tensors that must be equal in layers that are fused.
        only: Last parts of the names of layers, and a tensor that these must have.
        entries: Entries of ``quantization_config``.
    """

    source: str
    tensors: dict[str, tuple[str, str]]
    optional: dict[str, tuple[str, str]] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    only: tuple[tuple[str, ...], str] = ((), "")
    entries: dict[str, Any] = field(default_factory=dict)


def _group(kind: str, bits: int, strategy: str, dynamic: Any = False, size: int | None = None) -> dict[str, Any]:
    """Return what a reader of compressed-tensors compares in ``weights`` or ``input_activations``."""
    return {"type": kind, "num_bits": bits, "strategy": strategy, "dynamic": dynamic, "symmetric": True} | (
        {"group_size": size} if size else {}
    )


_FP8 = {"weight": (FP8, "o,i"), "weight_scale": (F32, ""), "input_scale": (F32, "")}
_CHANNEL = {"weight": (FP8, "o,i"), "weight_scale": (F32, "o")}
_NVFP4 = {"weight": (U8, "o,i/2"), "weight_scale": (FP8, "o,i/16"), "weight_scale_2": (F32, "")}
_NVFP4_INPUT = {**_NVFP4, "input_scale": (F32, "")}
_MXFP8 = {"weight": (FP8, "o,i"), "weight_scale": (U8, "o,i/32")}
_INT4 = {"weight": (U8, "o/2,i"), "weight_scale": (F32, "o,i/128")}
_PRE = {"pre_quant_scale": (BF16, "i")}
_GLOBAL = {"weight_packed": (U8, "o,i/2"), "weight_scale": (FP8, "o,i/16"), "weight_global_scale": (F32, "1")}
_GLOBAL_INPUT = {**_GLOBAL, "input_global_scale": (F32, "1")}
_PACKED4 = {"weight_packed": (I32, "o,i/8"), "weight_scale": (BF16, "o,i/128"), "weight_shape": (I64, "2")}
_PACKED8 = {"weight_packed": (I32, "o,i/4"), "weight_scale": (BF16, "o,1"), "weight_shape": (I64, "2")}
_W_NVFP4 = _group("float", 4, "tensor_group", size=16)

# The files that rules were read from.
_V = "vllm/model_executor/layers/quantization/"
_S = "sglang/srt/layers/quantization/"
_T = "tensorrt_llm/_torch/modules/linear.py"
_V_MODELOPT, _V_CT = _V + "modelopt.py", _V + "compressed_tensors/"
_S_MODELOPT, _S_CT = _S + "modelopt_quant.py", _S + "compressed_tensors/compressed_tensors.py"
_H = "transformers/quantizers/quantizer_compressed_tensors.py, compressed_tensors/quantization/"


def _modelopt(algorithm: str, **entries: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, **entries}


def _ct(kind: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "group": {"format": kind, "weights": weights, "inputs": inputs}}


_NV_INPUTS = _group("float", 4, "tensor_group", "local", size=16)
# Format -> tensors, tensors that fused layers share, and the group, of the layout of compressed-tensors.
_CT: dict[str, tuple[dict[str, tuple[str, str]], tuple[str, ...], dict[str, Any]]] = {
    "FP8": (
        {"weight": (FP8, "o,i"), "weight_scale": (F32, "1"), "input_scale": (F32, "1")},
        ("weight_scale", "input_scale"),
        _ct("float-quantized", _group("float", 8, "tensor"), _group("float", 8, "tensor")),
    ),
    "FP8_PER_CHANNEL_PER_TOKEN": (
        {"weight": (FP8, "o,i"), "weight_scale": (F32, "o,1")},
        (),
        _ct("float-quantized", _group("float", 8, "channel"), _group("float", 8, "token", True)),
    ),
    "FP8_WO": (
        {"weight": (FP8, "o,i"), "weight_scale": (F32, "o,1")},
        (),
        _ct("float-quantized", _group("float", 8, "channel"), None),
    ),
    "FP8_PB_WO": (
        {"weight": (FP8, "o,i"), "weight_scale": (F32, "o/128,i/128")},
        (),
        _ct("float-quantized", _group("float", 8, "block"), _group("float", 8, "group", True, 128)),
    ),
    "W8A8_SQ_PER_CHANNEL": (
        {"weight": (I8, "o,i"), "weight_scale": (F32, "o,1"), "input_scale": (F32, "1")},
        # vLLM keeps the last one that it loads.
        ("input_scale",),
        _ct("int-quantized", _group("int", 8, "channel"), _group("int", 8, "tensor")),
    ),
    "W8A8_PER_CHANNEL_PER_TOKEN": (
        {"weight": (I8, "o,i"), "weight_scale": (F32, "o,1")},
        (),
        _ct("int-quantized", _group("int", 8, "channel"), _group("int", 8, "token", True)),
    ),
    "W8A16": (_PACKED8, (), _ct("pack-quantized", _group("int", 8, "channel"), None)),
    "W4A16_AWQ": (_PACKED4, (), _ct("pack-quantized", _group("int", 4, "group", size=128), None)),
    "NVFP4": (
        _GLOBAL_INPUT,
        ("weight_global_scale", "input_global_scale"),
        _ct("nvfp4-pack-quantized", _W_NVFP4, _NV_INPUTS),
    ),
    "W4A16_NVFP4": (_GLOBAL, ("weight_global_scale",), _ct("nvfp4-pack-quantized", _W_NVFP4, None)),
    "MXFP8": (
        _MXFP8,
        (),
        _ct("mxfp8-quantized", _group("float", 8, "group", size=32), _group("float", 8, "group", True, 32)),
    ),
}


def _ct_rules(source: str, formats: tuple[str, ...]) -> dict[str, Rule]:
    return {
        name: Rule(source, tensors, shared=shared, entries=entries)
        for name, (tensors, shared, entries) in _CT.items()
        if name in formats
    }


_ALL = tuple(_CT)
# (reader, layout) -> format -> rule. A format that is missing is not supported.
RULES: dict[tuple[str, str], dict[str, Rule]] = {
    (VLLM, MODELOPT): {
        "FP8": Rule(_V_MODELOPT, _FP8, shared=("weight_scale", "input_scale"), entries=_modelopt("FP8")),
        "FP8_PER_CHANNEL_PER_TOKEN": Rule(_V_MODELOPT, _CHANNEL, entries=_modelopt("FP8_PER_CHANNEL_PER_TOKEN")),
        "FP8_PB_WO": Rule(
            _V_MODELOPT,
            {"weight": (FP8, "o,i"), "weight_scale": (F32, "o/128,1,i/128,1")},
            entries=_modelopt("fp8_pb_wo"),
        ),
        "NVFP4": Rule(
            _V_MODELOPT,
            _NVFP4_INPUT,
            shared=("weight_scale_2", "input_scale"),
            entries=_modelopt("NVFP4"),
        ),
        "W4A16_NVFP4": Rule(_V_MODELOPT, _NVFP4, shared=("weight_scale_2",), entries=_modelopt("W4A16_NVFP4")),
        "MXFP8": Rule(_V_MODELOPT, _MXFP8, entries=_modelopt("MXFP8")),
    },
    (VLLM, COMPRESSED_TENSORS): _ct_rules(_V_CT, _ALL),
    (SGLANG, MODELOPT): {
        "FP8": Rule(_S_MODELOPT, _FP8, entries=_modelopt("FP8")),
        "NVFP4": Rule(_S_MODELOPT, _NVFP4_INPUT, entries=_modelopt("NVFP4")),
        "NVFP4_AWQ": Rule(_S_MODELOPT, _NVFP4_INPUT, _PRE, entries=_modelopt("NVFP4_AWQ")),
        "W4A16_NVFP4": Rule(_S_MODELOPT, _NVFP4, entries=_modelopt("W4A16_NVFP4")),
        "MXFP8": Rule(_S + "fp8.py", _MXFP8, entries=_modelopt("MXFP8")),
    },
    (SGLANG, COMPRESSED_TENSORS): _ct_rules(
        _S_CT, tuple(name for name in _ALL if name not in ("MXFP8", "W8A8_PER_CHANNEL_PER_TOKEN"))
    ),
    (TENSORRT_LLM, MODELOPT): {
        "FP8": Rule(_T, _FP8, entries=_modelopt("FP8")),
        "FP8_PER_CHANNEL_PER_TOKEN": Rule(_T, _CHANNEL, entries=_modelopt("FP8_PER_CHANNEL_PER_TOKEN")),
        "FP8_PB_WO": Rule(
            _T,
            {"weight": (FP8, "o,i"), "weight_scale": (F32, "o/128,1,i/128,1")},
            entries=_modelopt("fp8_pb_wo"),
        ),
        "W8A16": Rule(_T, {"weight": (I8, "o,i"), "weight_scale": (F32, "o")}, entries=_modelopt("W8A16")),
        # It reads the factors of inputs of these two layers without asking whether there are any.
        "W4A16_AWQ": Rule(
            _T,
            _INT4,
            _PRE,
            only=(("o_proj", "down_proj"), "pre_quant_scale"),
            entries=_modelopt("W4A16_AWQ", group_size=128, has_zero_point=False),
        ),
        "W4A8_AWQ": Rule(
            _T,
            {**_INT4, "weight_scale_2": (F32, ""), "input_scale": (F32, "")},
            _PRE,
            shared=("weight_scale_2", "input_scale"),
            only=(("o_proj", "down_proj"), "pre_quant_scale"),
            entries=_modelopt("W4A8_AWQ", group_size=128, has_zero_point=False),
        ),
        # Equal scales are asserted.
        "NVFP4": Rule(_T, _NVFP4_INPUT, shared=("weight_scale_2", "input_scale"), entries=_modelopt("NVFP4")),
        "NVFP4_AWQ": Rule(
            _T, _NVFP4_INPUT, _PRE, shared=("weight_scale_2", "input_scale"), entries=_modelopt("NVFP4_AWQ")
        ),
        "W4A16_NVFP4": Rule(_T, _NVFP4, shared=("weight_scale_2",), entries=_modelopt("W4A16_NVFP4")),
        "MXFP8": Rule(_T, _MXFP8, entries=_modelopt("MXFP8")),
    },
    (TENSORRT_LLM, COMPRESSED_TENSORS): _ct_rules(
        "tensorrt_llm/quantization/, " + _T, ("FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
    ),
    (TRANSFORMERS, COMPRESSED_TENSORS): _ct_rules(_H, _ALL),
}


# --- comparison -------------------------------------------------------------------------------------------------------


def shape_of(text: str, outputs: int, inputs: int) -> tuple[int, ...]:
    """Return a shape of a rule for a layer."""
    sizes = []
    for part in filter(None, text.split(",")):
        name, _, divisor = part.partition("/")
        size = {"o": outputs, "i": inputs}.get(name) or int(name)
        sizes.append(-(-size // int(divisor or 1)))
    return tuple(sizes)


def ignored(name: str, patterns: list[str], layout: str) -> bool:
    """Return whether a reader leaves a layer unquantized by the list of exceptions."""
    if layout == COMPRESSED_TENSORS:
        return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns)
    # vLLM also takes a part of a name.
    return any(p in name or fnmatch.fnmatch(name, p) for p in patterns)


def problems(rule: Rule, layout: str, folder: Path, original: Path, experts: Rule | None = None) -> list[str]:
    """Return what a reader would not take of a folder.

    Args:
        rule: The reader's rule.
        experts: Its rule for experts, if that is another one.
        layout: Name of the layout.
        folder: The folder.
        original: The model before quantization, for the sizes of its layers.
    """
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors, sizes = tensors_of(folder), {name: value.shape for name, value in tensors_of(original).items()}
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        prefix = name.removesuffix("weight_scale")
        parts = {leaf.removeprefix(prefix): value for leaf, value in tensors.items() if leaf.startswith(prefix)}
        layers[prefix.removesuffix(".")] = parts
    found = _section_problems([rule, experts or rule], section)
    for name, parts in layers.items():
        own = experts if experts and ".experts." in name else rule
        found += [f"{name}: {text}" for text in _layer_problems(own, name, parts, sizes[f"{name}.weight"])]
        if ignored(name, section["ignore"], layout):
            found.append(f"{name} is quantized and in `ignore`")
        found += [f"{name}: {text}" for text in _different_parts(own, name, layers)]
    for name, shape in sizes.items():
        layer = name.removesuffix(".weight")
        linear = len(shape) == 2 and name.endswith(".weight") and "embed" not in name and layer not in layers
        if linear and name in tensors and not ignored(layer, section["ignore"], layout):
            found.append(f"{layer} is not quantized and not in `ignore`")
    return found


def _section_problems(taken: list[Rule], section: dict[str, Any]) -> list[str]:
    entries = {key: value for key, value in taken[0].entries.items() if key != "group"}
    found = [f"{key} is {section.get(key)!r}" for key, value in entries.items() if section.get(key) != value]
    groups = [rule.entries["group"] for rule in taken if "group" in rule.entries]
    if groups:
        found += [
            f"no group like {written}"
            for written in section["config_groups"].values()
            if not any(_is_group(group, written) for group in groups)
        ]
    return found


def _is_group(group: dict[str, Any], written: dict[str, Any]) -> bool:
    parts = (("weights", group["weights"]), ("input_activations", group["inputs"]))
    return written["format"] == group["format"] and all(
        (written[key] is None) is (part is None)
        and all(written[key][name] == value for name, value in (part or {}).items())
        for key, part in parts
    )


def _layer_problems(rule: Rule, name: str, parts: dict[str, torch.Tensor], size) -> list[str]:
    allowed = {**rule.tensors, **rule.optional, "bias": ("", "")}
    found = [f"{leaf} is missing" for leaf in rule.tensors if leaf not in parts]
    layers, leaf = rule.only
    if name.rpartition(".")[2] in layers and leaf not in parts:
        found.append(f"{leaf} is missing")
    for leaf, value in parts.items():
        if leaf not in allowed:
            # Scales of the KV cache are those of attention, and stand at its projections.
            found += [] if leaf in ("k_scale", "v_scale") else [f"{leaf} is not known"]
            continue
        dtype, text = allowed[leaf]
        written = str(value.dtype).removeprefix("torch."), tuple(value.shape)
        if dtype and written != (dtype, shape_of(text, *size)):
            found.append(f"{leaf} is {written}, not {(dtype, shape_of(text, *size))}")
    return found


def _different_parts(rule: Rule, name: str, layers: dict[str, dict[str, torch.Tensor]]) -> list[str]:
    parent, _, last = name.rpartition(".")
    first = next((fused[0] for fused in FUSED if last in fused), last)
    other = layers.get(f"{parent}.{first}")
    if other is None:
        return [f"{first} is not quantized"]
    return [
        f"{leaf} differs from that of {first}"
        for leaf in rule.shared
        if leaf in other and leaf in layers[name] and not torch.equal(other[leaf], layers[name][leaf])
    ]

"""Compute the bytes of a Hugging Face folder: codes, scales, what stays in 16 bits, and the other files.

The tensors of a quantized matrix `[o, i]` are those that `quantization/export/layouts` writes; a test compares both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_modelopt_dropin.fit import formats
from nemo_modelopt_dropin.fit.formats import ATTENTION, MLP, Format
from nemo_modelopt_dropin.preflight import algorithms, readers
from nemo_modelopt_dropin.preflight.model_sizes import Shape

WIDTHS = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8}
_BLOCK_2D, _NVFP4_BLOCK, _MXFP8_BLOCK = 128, 16, 32
# Config, generation config and model card. Of a mixture, two files list every matrix; of a model that is quantized in
# part, the names of the others.
_TEXT_BYTES, _MIXED_BYTES_OF_MATRIX, _EXCLUDED_BYTES_OF_MATRIX = 4_000, 320, 70
# What an entry of the header has besides name, dtype, shape and offsets: {"dtype":"","shape":[],"data_offsets":[,]}
_ENTRY = 46
# The longest usual beginning of the names of a layer's tensors.
_LAYER_NAME = "model.layers.10."
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "*.model", "chat_template*")

Tensor = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Matrix:
    """A matrix of a layer that quantization stores in fewer bits.

    Attributes:
        name: Its name within the layer of a Llama; other families have names of similar length.
        group: One of `formats.GROUPS`.
        outputs: Rows.
        inputs: Columns.
        count: How often a layer has it: once, or once for each expert.
        is_fused: Whether readers fuse it with others, so that factors of its input are stored in the norm before it.
    """

    name: str
    group: str
    outputs: int
    inputs: int
    count: int = 1
    is_fused: bool = True


def matrices(shape: Shape) -> list[Matrix]:
    """Return the matrices of one layer."""
    queries, keys = shape.num_attention_heads * shape.kv_channels, shape.num_query_groups * shape.kv_channels
    h, found = shape.hidden_size, []
    for name, outputs in (("q", queries), ("k", keys), ("v", keys)):
        found.append(Matrix(f"self_attn.{name}_proj", ATTENTION, outputs, h))
    found.append(Matrix("self_attn.o_proj", ATTENTION, h, queries, is_fused=False))
    mlps = [("mlp.experts.10" if shape.experts else "mlp", shape.ffn_hidden_size, max(1, shape.experts))]
    mlps += [("mlp.shared_expert", shape.shared_expert_size, 1)] if shape.shared_expert_size else []
    for prefix, inner, count in mlps:
        for name in ("gate_proj", "up_proj") if shape.gated else ("up_proj",):
            found.append(Matrix(f"{prefix}.{name}", MLP, inner, h, count))
        found.append(Matrix(f"{prefix}.down_proj", MLP, h, inner, count, is_fused=False))
    return found


def stored(matrix: Matrix, algorithm: str, block: int | None, layout: str) -> Iterator[Tensor]:
    """Yield name, dtype and shape of the tensors that hold a matrix.

    Args:
        matrix: The matrix `[o, i]`.
        algorithm: Its algorithm, or `NO_QUANT`.
        block: Weights that share an INT4 scale.
        layout: One of `readers.LAYOUTS`.
    """
    o, i = matrix.outputs, matrix.inputs
    found = algorithms.hf_format_of(algorithm)
    if found is None:
        yield "weight", "BF16", (o, i)
        return
    if layout == readers.COMPRESSED_TENSORS:
        yield from _compressed_tensors(found, o, i, block)
    else:
        yield from _modelopt(found, o, i, block)
        has_factors = found in ("W4A16_AWQ", "W4A8_AWQ", "NVFP4_AWQ") or algorithm == "int8_sq"
        if has_factors and not matrix.is_fused:
            yield "pre_quant_scale", "BF16", (i,)


def _modelopt(found: str, o: int, i: int, block: int | None) -> Iterator[Tensor]:
    if found in ("W4A16_AWQ", "W4A8_AWQ"):
        yield "weight", "U8", (o // 2, i)
        yield "weight_scale", "F32", (o, i // (block or i))
    elif "NVFP4" in found:
        yield "weight", "U8", (o, i // 2)
        yield "weight_scale", "F8_E4M3", (o, i // _NVFP4_BLOCK)
        yield "weight_scale_2", "F32", ()
    else:
        yield "weight", "I8" if found.startswith("W8") else "F8_E4M3", (o, i)
        yield "weight_scale", *_scales(found, o, i, ())
    if found == "W4A8_AWQ":
        yield "weight_scale_2", "F32", ()
    if found in ("FP8", "W8A8_SQ_PER_CHANNEL", "W4A8_AWQ", "NVFP4", "NVFP4_AWQ"):
        yield "input_scale", "F32", ()


def _compressed_tensors(found: str, o: int, i: int, block: int | None) -> Iterator[Tensor]:
    if found in ("W4A16_AWQ", "W8A16"):
        share = 8 if found == "W4A16_AWQ" else 4
        yield "weight_packed", "I32", (o, math.ceil(i / share))
        yield "weight_scale", "BF16", (o, i // (block or i) if share == 8 else 1)
        yield "weight_shape", "I64", (2,)
    elif "NVFP4" in found:
        yield "weight_packed", "U8", (o, i // 2)
        yield "weight_scale", "F8_E4M3", (o, i // _NVFP4_BLOCK)
        yield "weight_global_scale", "F32", (1,)
        if found == "NVFP4":
            yield "input_global_scale", "F32", (1,)
    else:
        yield "weight", "I8" if found.startswith("W8") else "F8_E4M3", (o, i)
        yield "weight_scale", *_scales(found, o, i, (1,))
        if found in ("FP8", "W8A8_SQ_PER_CHANNEL"):
            yield "input_scale", "F32", (1,)


def _scales(found: str, o: int, i: int, single: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return dtype and shape of the scales of a weight of 8 bits."""
    if found == "MXFP8":
        return "U8", (o, i // _MXFP8_BLOCK)
    if found == "FP8_PB_WO":
        return "F32", (o // _BLOCK_2D, i // _BLOCK_2D)
    return "F32", single if found == "FP8" else (o, 1)


def tensors_of_layer(shape: Shape, found: Format, layout: str = algorithms.AUTO) -> Iterator[tuple[Tensor, int]]:
    """Yield the tensors of a layer's matrices and KV cache, with their number."""
    used = formats.layout_of(found, layout)
    for matrix in matrices(shape):
        algorithm, block = found.algorithm(matrix.group), found.needed_block(matrix.group)
        for leaf, dtype, sizes in stored(matrix, algorithm, block, used):
            yield (f"{_LAYER_NAME}{matrix.name}.{leaf}", dtype, sizes), matrix.count
    if found.fp8_cache:
        for name in ("k", "v"):
            leaf = f"{name}_scale" if used == readers.COMPRESSED_TENSORS else f"{name}_proj.{name}_scale"
            yield (f"{_LAYER_NAME}self_attn.{leaf}", "F32", (1,)), 1


@functools.lru_cache(maxsize=4096)
def layer_bytes(shape: Shape, found: Format, group: str | None = None, layout: str = algorithms.AUTO) -> int:
    """Return the bytes of a layer's matrices with their scales.

    Args:
        shape: The sizes of the model.
        found: The format.
        group: Only the matrices of this group; None for all.
        layout: Layout of the Hugging Face files.
    """
    used = formats.layout_of(found, layout)
    total = 0
    for matrix in matrices(shape):
        if group in (None, matrix.group):
            algorithm, block = found.algorithm(matrix.group), found.needed_block(matrix.group)
            total += matrix.count * sum(map(_bytes, stored(matrix, algorithm, block, used)))
    return total


def _bytes(tensor: Tensor) -> int:
    return WIDTHS[tensor[1]] * math.prod(tensor[2])


def weight_bytes(shape: Shape, found: Format, layout: str = algorithms.AUTO) -> int:
    """Return the bytes of all tensors, which a server holds in memory."""
    plain = 2 * (shape.parameters - shape.linear_parameters)
    return plain + shape.num_layers * layer_bytes(shape, found, None, layout)


def header_bytes(shape: Shape, found: Format, layout: str = algorithms.AUTO) -> int:
    """Return the bytes of the headers of the weight files, which have a name for each tensor."""
    digits = len(str(weight_bytes(shape, found, layout)))

    def entry(tensor: Tensor) -> int:
        name, dtype, sizes = tensor
        # Offsets grow: those in the first tenth of a file have a digit less, which is left out here.
        return _ENTRY + len(name) + len(dtype) + len(",".join(map(str, sizes))) + 2 * digits

    # Names of one layer in ten have a digit less if there are more than ten layers.
    one_digit = min(shape.num_layers, 10) / shape.num_layers
    in_layer = sum(count * (entry(tensor) - one_digit) for tensor, count in tensors_of_layer(shape, found, layout))
    plain = [("input_layernorm.weight", 1), ("post_attention_layernorm.weight", 1)]
    plain += [("self_attn.q_norm.weight", 2)] if shape.qk_norm else []
    plain += [("self_attn.q_proj.bias", 3)] if shape.bias or shape.qkv_bias else []
    plain += [("mlp.down_proj.bias", 3)] if shape.bias else []
    plain += [("mlp.gate.weight", 1)] if shape.experts else []
    in_layer += sum(count * (entry((_LAYER_NAME + name, "BF16", (10**3,))) - one_digit) for name, count in plain)
    outside = ["model.embed_tokens.weight", "model.norm.weight"] + ([] if shape.tied else ["lm_head.weight"])
    whole = sum(entry((name, "BF16", (shape.vocab_size, shape.hidden_size))) for name in outside)
    return math.ceil(shape.num_layers * in_layer + whole) + 8 + len('{"__metadata__":{"format":"pt"}}')


def disk_bytes(shape: Shape, found: Format, tokenizer: int = 0, layout: str = algorithms.AUTO) -> int:
    """Return the bytes of a Hugging Face folder.

    Args:
        shape: The sizes of the model.
        found: The format.
        tokenizer: Bytes of the tokenizer's files.
        layout: Layout of the Hugging Face files.
    """
    text = _TEXT_BYTES + _listed_bytes(shape, found)
    return weight_bytes(shape, found, layout) + header_bytes(shape, found, layout) + text + tokenizer


def _listed_bytes(shape: Shape, found: Format) -> int:
    """Return the bytes of names of matrices in the configuration."""
    if not found.is_mixed:
        return 0
    plain = {group for group in formats.GROUPS if found.algorithm(group) == algorithms.NO_QUANT}
    size = _EXCLUDED_BYTES_OF_MATRIX if plain else _MIXED_BYTES_OF_MATRIX
    return size * shape.num_layers * sum(one.count for one in matrices(shape) if not plain or one.group in plain)


def tokenizer_bytes(checkpoint: str | Path) -> int:
    """Return the bytes of the tokenizer's files in a NeMo checkpoint, which are exported with the model."""
    folder = Path(checkpoint) / "context"
    found = {file for pattern in _TOKENIZER_FILES for file in folder.rglob(pattern) if file.is_file()}
    return sum(file.stat().st_size for file in found)

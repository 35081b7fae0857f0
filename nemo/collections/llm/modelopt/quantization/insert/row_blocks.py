"""Check blocks of INT4 weights along rows that tensor-parallel ranks split.

A block is a run of inputs that share a scale. If blocks do not divide a row, its end is a shorter block.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...errors import ModelOptConfigError
from .. import quant_cfg_choices as choices
from ..export.layouts import layer as layers


def check(export_format: str, quant_cfg: dict[str, Any], model: torch.nn.Module) -> None:
    """Check that INT4 blocks divide the inputs of this rank's part of each layer.

    No reader of Hugging Face files supports a shorter block. In the other formats it may be at the end of a row, but
    not where tensor-parallel ranks split the row: another tensor-parallel size has other blocks and could not restore
    the scales.

    Raises:
        ModelOptConfigError: With the first layer that they do not divide.
    """
    steps = [a for pattern, a in choices.quantizer_settings(quant_cfg) if "weight_quantizer" in pattern]
    for name, module in model.named_modules():
        if name.rpartition(".")[2].startswith("linear_") and (export_format == "hf" or _is_cut(module)):
            problem = uneven(name, module, int4_block(steps))
            if problem:
                raise ModelOptConfigError(f'export_format="{export_format}": {problem}.')
            enabled = choices.enabled_quantizers(quant_cfg, name, ("weight_quantizer",))
            problem = cut_blocks(name, module, [*enabled.values()]) if export_format == "hf" else None
            if problem:
                raise ModelOptConfigError(f'export_format="hf": {problem}.')


def cut_blocks(name: str, module: torch.nn.Module, steps: list[dict[str, Any]]) -> str | None:
    """Return a problem if the blocks of a format are not whole in each Hugging Face tensor of a layer, or None.

    Args:
        name: The layer's name.
        module: The layer, one of Megatron's.
        steps: Settings of its weight quantizer.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None
    rows, inputs = (_largest_block(steps, axis) for axis in (-2, -1))
    # A Hugging Face tensor has whole heads of q, k or v, or one half of a gated layer.
    config, leaf = getattr(module, "config", None), name.rpartition(".")[2]
    part, what = int(weight.shape[0]), "rows"
    if leaf == "linear_qkv":
        part, what = int(getattr(config, "kv_channels", None) or part), "rows of a head"
    elif leaf == "linear_fc1" and getattr(config, "gated_linear_unit", False):
        part, what = part // 2, "rows of one half"
    for size, length, kind in ((rows, part, what), (inputs, int(weight.shape[1]), "inputs")):
        if size and length % size:
            return (
                f"blocks of {size} weights do not divide the {length} {kind} of {name} on each rank. Use a format "
                'without such blocks (algorithm="fp8" or "fp8_pc_pt"), or export_format="nemo"'
            )
    return None


def _largest_block(steps: list[dict[str, Any]], axis: int) -> int:
    """Return the largest size of blocks along an axis, 0 if there are none."""
    return max(((step.get("block_sizes") or {}).get(axis) or 0 for step in steps), default=0)


def _is_cut(module: torch.nn.Module) -> bool:
    """Return whether tensor-parallel ranks split a layer's inputs."""
    return _holds_parts(module) and getattr(getattr(module, "config", None), "tensor_model_parallel_size", 1) > 1


def _holds_parts(module: torch.nn.Module) -> bool:
    """Return whether tensor-parallel ranks would split a layer's inputs if there were several."""
    weight = getattr(module, "weight", None)
    return bool(getattr(weight, "tensor_model_parallel", False)) and getattr(weight, "partition_dim", 0) == 1


def int4_block(steps: list[dict[str, Any]]) -> int:
    """Return the size of INT4 blocks along a row, 0 if there are none."""
    return max(((step.get("block_sizes") or {}).get(-1) or 0 for step in steps if step["num_bits"] == 4), default=0)


def uneven(name: str, module: torch.nn.Module, size: int) -> str | None:
    """Return a problem if blocks do not divide a layer's inputs, or None."""
    weight = getattr(module, "weight", None)
    if not size or not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.shape[-1] % size == 0:
        return None
    return (
        f"blocks of {size} do not divide the {weight.shape[-1]} inputs of {name} on each rank. Choose an "
        "awq_block_size that does, or a smaller calibration_tp"
    )


def check_restorable(core: torch.nn.Module, weights: Path) -> None:
    """Check that rows are split between the same blocks as at the tensor-parallel size of the checkpoint.

    The number of blocks may be the same anyway, and then each rank would load the scales of other inputs.

    Args:
        core: This rank's Megatron-Core model, converted.
        weights: The checkpoint's folder of weights.

    Raises:
        ModelOptConfigError: With the first layer for which they are not, and the size at which to restore.
    """
    size = int(getattr(getattr(core, "config", None), "tensor_model_parallel_size", 1))
    written = written_size(weights)
    if written in (None, size):
        return
    for name, module in core.named_modules():
        settings = layers.settings_of(module)
        block = int4_block(settings[0]) if settings and _holds_parts(module) else 0
        if block:
            weight: Any = module.weight
            width = int(weight.shape[-1]) * size
            if any(ranks > 1 and width // ranks % block for ranks in (written, size)):
                raise ModelOptConfigError(
                    f"The checkpoint {weights.parent} was quantized in blocks of {block} inputs at tensor parallel "
                    f"size {written}. At size {size} ranks would cut the {width} inputs of {name} into other blocks: "
                    f"restore it at size {written}, or quantize the original with an awq_block_size that divides "
                    f"{width // size}."
                )


def written_size(weights: Path) -> int | None:
    """Return the tensor-parallel size of a checkpoint, None if it is unknown."""
    from torch.distributed.checkpoint import FileSystemReader

    if not (Path(weights) / ".metadata").exists():
        return None
    names = FileSystemReader(str(weights)).read_metadata().state_dict_metadata
    chunks = (getattr(value, "chunks", ()) for name, value in names.items() if name.endswith("linear_proj.weight"))
    return max((len({chunk.offsets[-1] for chunk in part}) for part in chunks), default=None)

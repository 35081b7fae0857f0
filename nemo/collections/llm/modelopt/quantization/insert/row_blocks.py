"""Blocks of INT4 weights along a row, and the tensor-parallel ranks that cut rows.

A block is a run of inputs that share a scale. Of a row that blocks do not divide, the rest is a block of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices
from nemo.collections.llm.modelopt.quantization.export import hf_encoding


def check(export_format: str, quant_cfg: dict[str, Any], model: torch.nn.Module) -> None:
    """Refuse blocks of INT4 that do not divide the inputs of this rank's part of a layer.

    The rest of a row is a block of its own. No reader of Hugging Face files expects that. In the other formats it may
    stand at the end of a row, but not where tensor-parallel ranks cut the row: another tensor-parallel size has other
    blocks, and could not restore the scales.

    Raises:
        ModelOptConfigError: Naming the first such layer.
    """
    steps = [a for pattern, a in choices.quantizer_settings(quant_cfg) if "weight_quantizer" in pattern]
    for name, module in model.named_modules():
        if name.rpartition(".")[2].startswith("linear_") and (export_format == "hf" or _is_cut(module)):
            found = uneven(name, module, int4_block(steps))
            if found:
                raise ModelOptConfigError(f'export_format="{export_format}": {found}.')


def _is_cut(module: torch.nn.Module) -> bool:
    """Return whether tensor-parallel ranks hold parts of a layer's inputs."""
    return _holds_parts(module) and getattr(getattr(module, "config", None), "tensor_model_parallel_size", 1) > 1


def _holds_parts(module: torch.nn.Module) -> bool:
    """Return whether tensor-parallel ranks, if there are several, hold parts of a layer's inputs."""
    weight = getattr(module, "weight", None)
    return bool(getattr(weight, "tensor_model_parallel", False)) and getattr(weight, "partition_dim", 0) == 1


def int4_block(steps: list[dict[str, Any]]) -> int:
    """Return the size of INT4 blocks along a row, 0 where there are none."""
    return max(((step.get("block_sizes") or {}).get(-1) or 0 for step in steps if step["num_bits"] == 4), default=0)


def uneven(name: str, module: torch.nn.Module, size: int) -> str | None:
    """Return what is wrong where blocks do not divide a layer's inputs, or None."""
    weight = getattr(module, "weight", None)
    if not size or not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.shape[-1] % size == 0:
        return None
    return (
        f"blocks of {size} do not divide the {weight.shape[-1]} inputs of {name} on each rank. Choose an "
        "awq_block_size that does, or a smaller calibration_tp"
    )


def check_restorable(core: torch.nn.Module, weights: Path) -> None:
    """Refuse to restore blocks at a tensor-parallel size that cuts rows elsewhere than the one they were written at.

    The numbers of blocks may even agree, and then each rank would take over scales of other inputs.

    Args:
        core: This rank's Megatron-Core model, converted.
        weights: The checkpoint's folder of weights.

    Raises:
        ModelOptConfigError: Naming the first such layer and the size to restore at.
    """
    size = int(getattr(getattr(core, "config", None), "tensor_model_parallel_size", 1))
    written = written_size(weights)
    if written in (None, size):
        return
    for name, module in core.named_modules():
        settings = hf_encoding.settings_of(module)
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
    """Return the tensor-parallel size that a checkpoint was written at, None if it cannot be known."""
    from torch.distributed.checkpoint import FileSystemReader

    if not (Path(weights) / ".metadata").exists():
        return None
    names = FileSystemReader(str(weights)).read_metadata().state_dict_metadata
    chunks = (getattr(value, "chunks", ()) for name, value in names.items() if name.endswith("linear_proj.weight"))
    return max((len({chunk.offsets[-1] for chunk in part}) for part in chunks), default=None)

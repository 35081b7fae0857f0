"""Gather whole tensors from tensor-parallel ranks for a Hugging Face checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from ..._staging import ExportError
from . import hf_encoding


@contextlib.contextmanager
def whole_tensors(model, layers: dict[int, hf_encoding.Layer], writes: bool) -> Iterator[None]:
    """Replace tensor-parallel parts by whole tensors inside the context, on the rank that writes.

    They are in host memory, to which modelopt's writer copies tensors anyway.
    """
    if not parallel_state.model_parallel_is_initialized() or parallel_state.get_tensor_model_parallel_world_size() == 1:
        yield
        return
    replaced: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    try:
        for name, module in model.named_modules():
            gated = name.endswith("linear_fc1") and bool(model.config.gated_linear_unit)
            for parameter in module.parameters(recurse=False):
                if not getattr(parameter, "tensor_model_parallel", False):
                    continue
                axis = int(parameter.partition_dim)
                if id(module) in layers and parameter is module.weight:
                    layer = layers[id(module)]
                    codes = gather(hf_encoding.codes_of(module, layer), axis, gated)
                    layer.codes = codes if writes else None
                    _gather_scales(layer, axis, gated)
                    continue
                whole = gather(parameter.data, axis, gated)
                if writes:
                    replaced.append((parameter, parameter.data))
                    parameter.data = whole
        yield
    finally:
        for parameter, part in replaced:
            parameter.data = part


def gather(part: torch.Tensor, axis: int, gated: bool = False) -> torch.Tensor:
    """Return a whole tensor in host memory, gathered from all tensor-parallel ranks.

    Args:
        part: This rank's part.
        axis: The axis along which the tensor is split.
        gated: Whether each part holds its share of the gate, followed by its share of the up projection.
    """
    size = parallel_state.get_tensor_model_parallel_world_size()
    # Backends cannot send FP8, so its bytes are sent.
    sent = part.contiguous().view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part.contiguous()
    parts = [torch.empty_like(sent) for _ in range(size)]
    torch.distributed.all_gather(parts, sent, group=parallel_state.get_tensor_model_parallel_group())
    parts = [p.cpu().view(part.dtype) for p in parts]
    if gated and axis == 0:
        halves = [p.chunk(2, dim=0) for p in parts]
        parts = [half[0] for half in halves] + [half[1] for half in halves]
    return torch.cat(parts, dim=axis)


def _gather_scales(layer: hf_encoding.Layer, axis: int, gated: bool) -> None:
    """Replace the scales of a rank's part of a layer by those of the whole layer.

    Raises:
        ExportError: If a scale that must be equal on all ranks differs.
    """
    # INT8 has one scale for each output; ranks that split the inputs hold the same scales.
    per_part = layer.scale.dim() == 2 and (axis == 0 or layer.algorithm.startswith("W4"))
    if per_part:
        layer.scale = gather(layer.scale, axis, gated)
    elif layer.scale.numel():
        _check_common(layer.scale, "weight scale")
    if layer.pre_quant_scale is not None:
        if axis == 1:
            layer.pre_quant_scale = gather(layer.pre_quant_scale, 0)
        else:
            _check_common(layer.pre_quant_scale, "scale of the input")
    if layer.input_scale is not None:
        _check_common(layer.input_scale, "input scale")


def _check_common(value: torch.Tensor, what: str) -> None:
    parts = gather(value.reshape(1, -1), 0)
    if not bool((parts == parts[0]).all()):
        raise ExportError(
            f"Tensor-parallel ranks calibrated different values for the {what} of one layer, and a Hugging Face "
            "checkpoint holds one: calibrate with calibration_tp=1."
        )

"""Gather whole tensors from tensor-parallel ranks."""

from __future__ import annotations

import torch
from megatron.core import parallel_state


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

"""Gather whole tensors from tensor-parallel ranks."""

from __future__ import annotations

import torch
from megatron.core import parallel_state


def gather(part: torch.Tensor, axis: int) -> torch.Tensor:
    """Return a whole tensor, gathered from all tensor-parallel ranks, on the device of the parts.

    Args:
        part: This rank's part.
        axis: The axis along which the tensor is split.
    """
    size = parallel_state.get_tensor_model_parallel_world_size()
    sent = part.contiguous()
    parts = [torch.empty_like(sent) for _ in range(size)]
    torch.distributed.all_gather(parts, sent, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=axis)

"""Exchange tensors between the ranks that share a vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def all_gather(local: Tensor, group) -> Tensor:
    """Return the tensors [r, ...] of all ranks of a group, with one collective; ``local`` has one shape on all."""
    size = torch.distributed.get_world_size(group)
    gathered = local.new_empty(size * local.shape[0], *local.shape[1:])
    torch.distributed.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered.view(size, *local.shape)

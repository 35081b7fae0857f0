"""Read weights that a checkpoint holds in parts, such as those of gated MLPs, into the model's own memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory


def merge_in_place(sharded: Any) -> None:
    """Let the parts of weights that are about to be read be merged in the model's own memory.

    The parts are views of the model's weights, so after reading the model already holds the numbers. Megatron's own
    merge would allocate a new tensor for each such weight, half of a Llama.

    Args:
        sharded: A sharded state dict, changed in place; in parts if the pipeline is interleaved.
    """
    if not isinstance(sharded, dict):
        return
    for value in sharded.values():
        if isinstance(value, ShardedTensorFactory):
            value.merge_fn = partial(_whole, value.data, value.merge_fn)
        else:
            merge_in_place(value)


@torch.no_grad()
def _whole(weight: Any, merge: Callable[[Any], Any], parts: Any) -> Any:
    """Return the weight if its parts are views of it, otherwise a merge of the parts."""
    if not _is_plain(weight) or not isinstance(parts, (list, tuple)) or not all(map(_is_plain, parts)):
        return merge(parts)
    storage = weight.untyped_storage().data_ptr()
    views = all(part.untyped_storage().data_ptr() == storage for part in parts)
    return weight if views and sum(part.numel() for part in parts) == weight.numel() else merge(parts)


def _is_plain(value: Any) -> bool:
    """Return whether this is a tensor with a memory of its own; quantized weights of other packages are wrappers."""
    return type(value) in (torch.Tensor, torch.nn.Parameter)

"""Collectives and names that hold for all ranks: thin wrappers of torch.distributed and Megatron's groups.

Without a process group each function answers for this process alone. All ranks of a group must call them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import distributed_c10d

# Seconds between two questions to the store.
_STORE_INTERVAL = 0.05


def is_distributed() -> bool:
    """Return whether this process has a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Return the value of each rank of a group in order, by default of all ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def gather_over_stages(value: Any) -> list[Any]:
    """Return the value of each pipeline stage in order."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return [value]
    return gather_objects(value, parallel_state.get_pipeline_model_parallel_group())


def from_rank_zero(value: Any) -> Any:
    """Return rank zero's value; what the other ranks pass is ignored."""
    shared = [value]
    if is_distributed():
        torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def any_rank(flags: Sequence[bool]) -> list[bool]:
    """Return, for each flag, whether it is set on at least one rank."""
    if not flags or not is_distributed():
        return list(flags)
    tensor = torch.tensor(flags, dtype=torch.int32, device=device())
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]


def any_rank_on_device(flag: Tensor) -> bool:
    """Return whether a flag on the device is set on at least one rank; it waits for the device once."""
    flag = flag.to(torch.int32)
    if is_distributed():
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)


def model_parallel_sum(values: list[float]) -> list[float]:
    """Return each value summed over tensor- and pipeline-parallel ranks."""
    if not parallel_state.model_parallel_is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device())
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return total.tolist()


def gather_tensors(local: Tensor, group: Any) -> Tensor:
    """Return the tensors [r, ...] of all ranks of a group, by one collective; ``local`` has the same shape on all."""
    size = torch.distributed.get_world_size(group)
    gathered = local.new_empty(size * local.shape[0], *local.shape[1:])
    torch.distributed.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered.view(size, *local.shape)


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        torch.distributed.barrier()


@contextlib.contextmanager
def while_rank_zero_works() -> Iterator[None]:
    """Let the other ranks wait at the end of the context until rank zero has left it, for as long as that takes.

    They ask the store of the process group. In a collective, for example one that shares the outcome, NCCL would end
    the job after ten minutes. Rank zero leaves the context with an error, too.
    """
    if not is_distributed() or torch.distributed.get_world_size() == 1:
        yield
        return
    store, rank = distributed_c10d._get_default_store(), torch.distributed.get_rank()
    # Counted by the store of this group: processes that change groups would disagree on a count of their own.
    key = f"rank_zero_works/{store.add(f'rank_zero_works_of/{rank}', 1)}"
    try:
        yield
    finally:
        if rank == 0:
            store.set(key, b"done")
    while rank != 0 and not store.check([key]):
        time.sleep(_STORE_INTERVAL)


def global_name(core: torch.nn.Module, name: str) -> str:
    """Return a layer's name with its number in the whole model; a pipeline stage counts its layers from zero."""
    head, marker, tail = name.partition("layers.")
    if not marker:
        return name
    number, _, rest = tail.partition(".")
    layer = core.get_submodule(f"{head}layers.{number}")
    return f"{head}layers.{layer.layer_number - 1}.{rest}" if hasattr(layer, "layer_number") else name


def own_parameters(core: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters that this rank counts: their elements, summed over TP and PP ranks, are the whole model's.

    Replicas on other tensor-parallel ranks and the copy of tied embeddings on the last pipeline stage do not count.
    """
    parallel = parallel_state.model_parallel_is_initialized()
    first = not parallel or parallel_state.get_tensor_model_parallel_rank() == 0
    tied = getattr(core, "share_embeddings_and_output_weights", False) and not getattr(core, "pre_process", True)
    for name, parameter in core.named_parameters():
        replica = not first and not getattr(parameter, "tensor_model_parallel", False)
        if not replica and not (tied and name.startswith("output_layer")):
            yield name, parameter


def device() -> str:
    """Return the device on which collectives of the default group take tensors."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_of(core: torch.nn.Module) -> torch.device:
    """Return the device of a rank's part of a model, `device` if that part has no parameters.

    A pipeline stage between the first and the last has none once all its layers are pruned.
    """
    return next((parameter.device for parameter in core.parameters()), torch.device(device()))

"""Read large tensors of a checkpoint in pieces, so that no second copy of one is in memory while it is loaded."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import IO, Any

import torch

# Bytes that are read at a time. Tensors that are smaller are left to PyTorch.
PIECE = 1 << 24


def reading(read_data: Callable[..., Any]) -> Callable[..., Any]:
    """Return PyTorch's method of a reader of checkpoints in files, which reads large tensors in pieces.

    Args:
        read_data: ``torch.distributed.checkpoint.FileSystemReader.read_data``; it reads all else.
    """

    @functools.wraps(read_data)
    def read(self, plan, planner):
        left = [item for item in plan.items if not _copied(self, item, planner)]
        return read_data(self, dataclasses.replace(plan, items=left), planner)

    return read


def _copied(reader: Any, item: Any, planner: Any) -> bool:
    """Copy a tensor into the memory that the planner names; return False if it was left as it is."""
    from torch.distributed.checkpoint.planner import LoadItemType

    info = reader.storage_data[item.storage_index]
    encoded = getattr(info, "transform_descriptors", None)  # compressed, for example
    if item.type == LoadItemType.BYTE_IO or info.length <= PIECE or encoded:
        return False
    with reader.fs.create_stream(reader.fs.concat_path(reader.path, info.relative_path), "rb") as stream:
        stored, start = _described(reader._slice_file(stream, info))
        if start is None or not stored.dim() or not stored.is_contiguous():
            return False
        target = planner.resolve_tensor(item).detach()
        assert target.size() == torch.Size(item.lengths), (item.storage_index, item.lengths, target.size())
        _copy(stream, info.offset + start, stored, item, target)
    planner.commit_tensor(item, target)
    return True


def _described(stream: Any) -> tuple[torch.Tensor, int | None]:
    """Return a tensor without values that is like the stored one, and where its values begin; None if unknown."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        stored = torch.load(stream, map_location="cpu", weights_only=True)
    start = getattr(stored.untyped_storage(), "_checkpoint_offset", None)
    return stored, None if start is None else start + stored.storage_offset() * stored.element_size()


def _copy(stream: IO[bytes], start: int, stored: torch.Tensor, item: Any, target: torch.Tensor) -> None:
    """Copy the part of a stored tensor that an item names, some rows at a time.

    Args:
        stream: The file.
        start: Where the values of the stored tensor begin.
        stored: Has its shape and dtype.
        item: Names the part by its ``storage_offsets`` and ``lengths`` along each axis.
        target: Gets the part.
    """
    (first, *offsets), (rows, *lengths) = item.storage_offsets, item.lengths
    width = math.prod(stored.shape[1:]) * stored.element_size()
    at_once = max(1, PIECE // max(1, width))
    buffer = torch.empty(min(at_once, rows) * width, dtype=torch.uint8)
    for begin in range(0, rows, at_once):
        count = min(at_once, rows - begin)
        piece = buffer[: count * width]
        stream.seek(start + (first + begin) * width)
        _fill(stream, memoryview(piece.numpy()))
        values = piece.view(stored.dtype).view(count, *stored.shape[1:])
        for axis, (offset, length) in enumerate(zip(offsets, lengths, strict=True), 1):
            values = values.narrow(axis, offset, length)
        target[begin : begin + count].copy_(values)


def _fill(stream: Any, buffer: memoryview) -> None:
    """Read until the buffer is full: a file may return less than asked for."""
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:])
        if not count:
            raise EOFError(f"The checkpoint file {getattr(stream, 'name', '')} ends early.")
        done += count

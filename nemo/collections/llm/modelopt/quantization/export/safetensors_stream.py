"""Write a safetensors file one tensor at a time: what is written need not be in memory together.

The file starts with the length of its header, 8 bytes, and the header, a JSON object with dtype, shape and place of
each tensor; spaces may follow the object. Its length is therefore reserved, and it is written last; in a small file the
tensors are then moved to its end. Readers view the bytes of a tensor in its dtype, so its place must be a multiple of
the size of an element: tensors whose size is no multiple of 8 bytes, which are small in practice, are written last,
larger elements first.

Source: https://huggingface.co/docs/safetensors (format).
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

# Names of dtypes in the format.
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):
    _DTYPES[torch.float8_e8m0fnu] = "F8_E8M0"
# Bytes of a header for each tensor in addition to its name: dtype, shape and two places.
_ENTRY = 160
_ALIGNMENT = 8
# An unused part of the header stays in a file of which it is less than one part in as many.
_SLACK = 1000
_CHUNK = 1 << 24


class Writer:
    """A file that is being written; use it as a context.

    Attributes:
        names: The tensors so far.
        bytes: Their size.
    """

    def __init__(self, path: Path, names: list[str]):
        """Reserve the header.

        Args:
            path: The file, which is created with the permissions of the user's umask.
            names: The names of the tensors, or of more tensors.
        """
        self.names: list[str] = []
        self.bytes = 0
        self._path, self._odd = path, dict[str, Tensor]()
        room = _ENTRY + sum(len(json.dumps(name)) + _ENTRY for name in names)
        self._room = -(-room // _ALIGNMENT) * _ALIGNMENT
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}

    def __enter__(self) -> Writer:
        self._file: BinaryIO = self._path.open("w+b")
        self._file.seek(8 + self._room)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with self._file:
            if error is None:
                for name, value in sorted(self._odd.items(), key=lambda item: -item[1].element_size()):
                    self._write(name, value, value.dtype)
                self._finish()

    def add(self, name: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
        """Write a tensor; one of an odd size is kept until the end.

        Args:
            name: Its name.
            value: The tensor, which is converted and copied to host memory in pieces.
            dtype: The dtype to write, by default the tensor's own.
        """
        dtype = value.dtype if dtype is None else dtype
        size = value.numel() * dtype.itemsize
        self.names.append(name)
        self.bytes += size
        if size % _ALIGNMENT:
            # A copy: it may be a part of something large.
            self._odd[name] = value.to(device="cpu", dtype=dtype, copy=True)
        else:
            self._write(name, value, dtype)

    def _write(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        start = self._file.tell() - 8 - self._room
        if not value.is_contiguous():
            value = value.to(dtype).contiguous()
        for part in value.reshape(-1).split(_CHUNK // value.element_size()):
            part = part.to(device="cpu", dtype=dtype)
            self._file.write(memoryview(part.view(torch.uint8).numpy()))
        place = [start, self._file.tell() - 8 - self._room]
        self._header[name] = {"dtype": _DTYPES[dtype], "shape": list(value.shape), "data_offsets": place}

    def _finish(self) -> None:
        header = json.dumps(self._header, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise ValueError(f"{self._path.name}: the header takes {len(header)} bytes, {self._room} are reserved")
        needed = -(-len(header) // _ALIGNMENT) * _ALIGNMENT
        if (self._room - needed) * _SLACK > self.bytes:
            self._move_tensors(8 + self._room, 8 + needed)
            self._room = needed
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))

    def _move_tensors(self, start: int, to: int) -> None:
        """Move the tensors towards the begin of the file, over the part of the header that is not needed."""
        for offset in range(0, self.bytes, _CHUNK):
            self._file.seek(start + offset)
            part = self._file.read(min(_CHUNK, self.bytes - offset))
            self._file.seek(to + offset)
            self._file.write(part)
        self._file.truncate(to + self.bytes)

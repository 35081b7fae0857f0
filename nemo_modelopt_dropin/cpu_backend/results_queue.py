"""A queue between a rank and the processes that it forks to write checkpoints, without a process of its own.

Megatron's queue is one of a manager, a process that it spawns for each rank: with a CUDA context none can be forked.
That process imports PyTorch, which takes seconds at the first checkpoint. CPU ranks have no such context.
"""

from __future__ import annotations

import os
import pickle
import queue
import struct
from typing import Any

_LENGTH = struct.Struct("<Q")
_of_process: dict[int, ResultsQueue] = {}


class ResultsQueue:
    """Keep what was put in memory that forked processes share; the process that made the queue takes it out."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("results", os.MFD_CLOEXEC)
        self._position = 0

    def put(self, value: Any) -> None:
        """Add a value, which must be picklable; it can be taken when this returns.

        Only one process puts a value at a time, as Megatron writes one checkpoint at a time.
        """
        content = pickle.dumps(value)
        left = memoryview(_LENGTH.pack(len(content)) + content)
        os.lseek(self._descriptor, 0, os.SEEK_END)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def get_nowait(self) -> Any:
        """Return the first value that was not taken yet.

        Raises:
            queue.Empty: If there is none.
        """
        header = os.pread(self._descriptor, _LENGTH.size, self._position)
        if not header:
            raise queue.Empty
        (length,) = _LENGTH.unpack(header)
        content = os.pread(self._descriptor, length, self._position + _LENGTH.size)
        self._position += _LENGTH.size + length
        if self._position == os.fstat(self._descriptor).st_size:
            os.ftruncate(self._descriptor, 0)
            self._position = 0
        return pickle.loads(content)


def of_this_process() -> ResultsQueue:
    """Return this process's queue; a forked rank does not share that of its parent."""
    if os.getpid() not in _of_process:
        _of_process.clear()
        _of_process[os.getpid()] = ResultsQueue()
    return _of_process[os.getpid()]

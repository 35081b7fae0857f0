"""Patches of torch and torch.distributed for CPU ranks; `cpu_backend.PATCHES` lists them."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nemo_modelopt_dropin.cpu_backend import pieces

_CPU = torch.device("cpu")
# Looked up once: every operation is compared with them.
_TO, _TYPE = torch.Tensor.to, torch.Tensor.type


class _Stream:
    """A stand-in for a CUDA stream: work is synchronous, so it has finished when a call returns."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or _Event()

    def synchronize(self):
        pass

    def query(self):
        return True

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False


class _Event:
    """A stand-in for a CUDA event: it has already happened, and elapsed times are zero."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


def _answer(value=None):
    """Return a new function that returns ``value``; torch.compile's tables need a separate object for each name."""
    return lambda *args, **kwargs: value


def patch_cuda_runtime() -> None:
    """Replace streams, events and devices, which Megatron's schedules, DDP buckets and checkpoint writers use."""
    cuda = torch.cuda
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = lambda *args, **kwargs: _Stream()
    cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.current_device = lambda: _CPU
    cuda.is_current_stream_capturing = lambda: False
    for name in ("synchronize", "empty_cache", "set_device", "set_stream", "ipc_collect", "init"):
        setattr(cuda, name, _answer())


def patch_cuda_memory() -> None:
    """Return zero for memory statistics, which NeMo's callbacks and Megatron's reports read; a CPU has none."""
    for name in (
        "max_memory_allocated",
        "memory_allocated",
        "max_memory_reserved",
        "memory_reserved",
    ):
        setattr(torch.cuda, name, _answer(0))
    torch.cuda.memory_stats = lambda *args, **kwargs: {}
    torch.cuda.reset_peak_memory_stats = _answer()


def patch_random_state() -> None:
    """Let Megatron's tracker fork the CPU generator, from which dropout and initialisation draw here.

    The tracker's warning that the CPU state changed inside a fork is then expected on every fork, and is dropped.
    """
    import megatron.core.tensor_parallel.random as mcore_random

    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # torch.manual_seed calls both of these itself, so they must not call it back.
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed)) and None
    torch.cuda.manual_seed_all = _answer()
    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    logging.getLogger(mcore_random.__name__).addFilter(_drop_fork_warning)


def _drop_fork_warning(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _is_cuda(device) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class _CudaMeansCpu(TorchFunctionMode):
    """Read ``device="cuda"`` as the CPU, drop ``pin_memory``, and name tensor types as Megatron's optimizers do.

    Gradient clipping and the distributed optimizer compare type names such as ``torch.cuda.FloatTensor``. This is a
    mode instead of patched functions because TorchScript recognises ``torch.empty`` and similar ones by identity.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # Every operation and every attribute of a tensor comes here: almost all end with the next two lines.
        if not kwargs and func is not _TO and func is not _TYPE:
            return func(*args)
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is _TO and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is _TYPE:
            return self._tensor_type(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _tensor_type(tensor, dtype=None, **kwargs):
        if dtype is None:
            return _TYPE(tensor).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return _TYPE(tensor, dtype, **kwargs)


def patch_devices() -> None:
    """Ignore ``device="cuda"``, ``.cuda()`` and pinned memory: models, buffers and batches stay where they are."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    # Also called: NeMo's data sets for fine-tuning count the ranks with a LongTensor.
    torch.cuda.FloatTensor, torch.cuda.LongTensor = torch.FloatTensor, torch.LongTensor
    _CudaMeansCpu().__enter__()


def patch_compilation() -> None:
    """Run the functions that Megatron fuses with ``torch.compile`` as plain PyTorch.

    To compile them takes 3 s in each process and half a minute the first time, and needs a C++ compiler, which many
    containers lack; it saves a third of a millisecond of SwiGLU of ``[64, 2, 512]``. A program that compiles its own
    functions calls ``torch.compiler.set_stance("default")`` after `enable`.
    """
    torch.compiler.set_stance("force_eager")


def patch_gloo_scalars() -> None:
    """Gather 0-dimensional tensors as 1-dimensional: modelopt's depth importance has such, and gloo fails on them."""
    import torch.distributed as dist

    gather = dist.all_gather_into_tensor

    @functools.wraps(gather)
    def all_gather_into_tensor(output_tensor, input_tensor, *args, **kwargs):
        if input_tensor.dim() == 0:
            input_tensor = input_tensor.reshape(1)
        return gather(output_tensor, input_tensor, *args, **kwargs)

    dist.all_gather_into_tensor = all_gather_into_tensor


def patch_gloo_devices() -> None:
    """Let all process groups of a process share one thread for their connections.

    Gloo gives each group a thread that wakes up a hundred times a second. Megatron creates dozens of groups, which
    would take 5 % of a core on each idle rank.
    """
    from torch.distributed import distributed_c10d

    gloo: Any = distributed_c10d.ProcessGroupGloo

    @functools.cache
    def devices(process: int):
        # torch's own rule for the interfaces.
        names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
        return [gloo.create_device(interface=name) for name in names] or [gloo.create_default_device()]

    class SharingGloo(gloo):
        def __init__(self, store, rank, size, timeout):
            options = gloo._Options()
            # Threads do not outlive a fork, so that a forked process needs devices of its own.
            options._devices = devices(os.getpid())
            options._threads = 2 * len(options._devices)
            options._timeout = timeout
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = SharingGloo


def patch_checkpoint_reading() -> None:
    """Read large tensors of checkpoints in pieces; see `pieces`.

    PyTorch reads a tensor as it is stored and copies it then: half of the fp32 weights once more for an embedding in
    bf16 that is half of the model.
    """
    from torch.distributed.checkpoint import FileSystemReader

    FileSystemReader.read_data = pieces.reading(FileSystemReader.read_data)

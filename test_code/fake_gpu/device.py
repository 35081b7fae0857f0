"""The fake GPU: a device whose tensors hold no numbers, process groups of any size, and the watch for host waits."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from test_code.fake_gpu import truth

GPU = "fakegpu"
# Older versions have no such devices.
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
DEVICES = 8
_PRODUCT = str(Path(__file__).parents[2] / "nemo")
_TORCH = os.path.dirname(torch.__file__)
_aten = torch.ops.aten
_device_of = torch.ops.prim.device.default

_NUMBER, _SIZE = "reads a number", "its size depends on the data"
_READS = {
    _aten._local_scalar_dense.default: _NUMBER,
    _aten.equal.default: _NUMBER,
    _aten.nonzero.default: _SIZE,
    _aten.masked_select.default: _SIZE,
    _aten._unique2.default: _SIZE,
    _aten.unique_consecutive.default: _SIZE,
    _aten.unique_dim.default: _SIZE,
    _aten.bincount.default: _SIZE,
    _aten.repeat_interleave.Tensor: _SIZE,
}
_GETS = (_aten.index.Tensor,)
_PUTS = (_aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default)


class HostSync(RuntimeError):
    """The host waited for the device."""


class Wait(NamedTuple):
    """A wait of the host for the device.

    Attributes:
        what: operator and reason.
        where: file, line and function, outside of torch.
        ours: whether that is in the product.
    """

    what: str
    where: str
    ours: bool


def install(rank: int) -> None:
    """Make ``device="cuda"`` the fake GPU in this process, for good. Models are built in `session` afterwards.

    Args:
        rank: number of the process in its pool.
    """
    backend_registration._setup_privateuseone_for_python_backend(GPU)
    # These look up torch functions by identity, so they are imported before torch is patched.
    import torch._dynamo
    import torch.distributed._tools.fake_collectives
    import torch.testing._internal.distributed.fake_pg  # noqa: F401

    import nemo.collections.llm  # noqa: F401
    from nemo_modelopt_dropin.cpu_backend import attention_patches, megatron_patches, torch_patches

    # Streams and events, and what Megatron's local layers lack without Transformer Engine, as on CPU ranks.
    torch_patches.patch_cuda_runtime()
    torch_patches.patch_cuda_memory()
    megatron_patches.patch_transformer_config()
    megatron_patches.patch_torch_norms()
    megatron_patches.patch_moe_router()
    attention_patches.patch_local_attention()
    _patch_cuda()
    _patch_initialization()
    _patch_product()


def _patch_cuda() -> None:
    """Answer questions to ``torch.cuda`` as on a machine with GPUs, and move tensors to the fake one."""
    import megatron.core.tensor_parallel.random as mcore_random

    cuda = torch.cuda
    cuda.current_device = lambda: torch.device(GPU, 0)
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.device_count = lambda: DEVICES
    cuda.get_rng_state = lambda *args, **kwargs: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = cuda.manual_seed = cuda.manual_seed_all = lambda *args, **kwargs: None
    cuda.mem_get_info = lambda *args, **kwargs: (64 << 30, 80 << 30)
    cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
    mcore_random._get_cuda_rng_state, mcore_random._set_cuda_rng_state = cuda.get_rng_state, cuda.set_rng_state

    def to_gpu(self, device=None, non_blocking=False, **kwargs):
        return self.to(torch.device(GPU, 0), non_blocking=non_blocking)

    torch.Tensor.cuda, torch.nn.Module.cuda, torch.nn.Module.bfloat16 = to_gpu, _move, _to_bf16
    # torch reads fake tensors number by number.
    FakeTensor.tolist = lambda self: self.cpu().tolist()
    torch.Tensor.is_cuda = property(lambda self: self.device.type == GPU)
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self


def _move(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """Move the parameters and buffers of a module that are on the host; torch cannot replace those without numbers."""
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not on_gpu(parameter):
                moved = torch.nn.Parameter(parameter.detach().cuda(), parameter.requires_grad)
                vars(moved).update(vars(parameter))
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.cuda()
    return self


def _to_bf16(self: torch.nn.Module) -> torch.nn.Module:
    """Convert the parameters of a module; torch cannot replace those without numbers."""
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype != torch.bfloat16:
                converted = torch.nn.Parameter(parameter.detach().bfloat16(), parameter.requires_grad)
                vars(converted).update(vars(parameter))
                module._parameters[name] = converted
    return self


def _patch_initialization() -> None:
    """Create weights on the fake GPU: norms too, which torch creates on the CPU and NeMo moves later."""
    from megatron.core.transformer import torch_norm
    from megatron.core.transformer.transformer_config import TransformerConfig

    check, create = TransformerConfig.__post_init__, torch_norm.WrappedTorchNorm.__new__

    @functools.wraps(check)
    def __post_init__(self):
        check(self)
        self.use_cpu_initialization = False

    def __new__(cls, *args, **kwargs):
        with torch.device(GPU, 0):
            return create(cls, *args, **kwargs)

    TransformerConfig.__post_init__ = __post_init__
    torch_norm.WrappedTorchNorm.__new__ = __new__


def _patch_product() -> None:
    """Let the product check fake tensors for NaN as it checks those of a GPU; it skips them elsewhere."""
    from nemo.collections.llm.modelopt.distill import _finite

    _finite.FakeTensor = ()


@functools.cache
def _mode() -> FakeTensorMode:
    """Return the mode of this process: Megatron caches tensors, which cannot be used in another mode."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextlib.contextmanager
def session(world_size: int = 1, rank: int = 0, **parallel_sizes: int) -> Iterator[None]:
    """Be one rank of a fake process group with Megatron's groups, and compute on the fake GPU.

    Args:
        world_size: number of ranks.
        rank: this rank.
        **parallel_sizes: ``tensor_model_parallel_size`` and others of ``initialize_model_parallel``.
    """
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _largest_double[0] = 0
    backends = f"cpu:fake,{GPU}:fake"
    torch.distributed.init_process_group(backends, rank=rank, world_size=world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(**parallel_sizes, create_gloo_process_groups=False)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        with _CudaMeansFake(), _mode(), _Watch(), mock.patch.multiple(torch.distributed, **_OBJECTS):
            yield
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_global_memory_buffer()
        tensor_parallel.get_cuda_rng_tracker().reset()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def count() -> Iterator[list[Wait]]:
    """Note waits of the host inside the context instead of raising an error; inside a `session`.

    The host reads that all is well, see `truth`.
    """
    waits: list[Wait] = []
    _watching.append(waits)
    try:
        yield waits
    finally:
        _watching.pop()


def largest_double() -> int:
    """Return the numbers of the largest tensor in fp64, for which most GPUs are slow, in this or the last session."""
    return _largest_double[0]


_largest_double = [0]
# Lists of the contexts of `count`, the innermost last.
_watching: list[list[Wait]] = []


class _CudaMeansFake(TorchFunctionMode):
    """Read ``device="cuda"`` as the fake GPU, and drop pinned memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device(GPU, 0)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], torch.device(GPU, 0), *args[2:])
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            # torch creates these on the host and copies them, out of sight of other modes.
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs.get("device") or "cpu")
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, bool):
        return False
    return isinstance(device, int) or (isinstance(device, str | torch.device) and str(device).startswith("cuda"))


class _Watch(TorchDispatchMode):
    """Raise `HostSync` if the host waits for the device, or note it in the list of `count`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _device_of and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # a third of all calls
        if torch.is_inference_mode_enabled():
            # Only there composite operators arrive whole, such as `item` and `to`.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if not any(issubclass(kind, FakeTensor) for kind in types) and not _names_gpu(kwargs.get("device")):
            # Tensors of the host keep their numbers.
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        what = _wait(func, args, kwargs)
        if what is not None:
            _note(f"{func}: {what}")
            if func is _aten._local_scalar_dense.default:
                return truth.number(args[0])
            if func is _aten.equal.default:
                return True
            if _to_host(func, args, kwargs):
                return truth.of(args[0])
        if func is torch.ops.c10d.allreduce_coalesced_.default:
            # Megatron's data parallelism uses it; torch has no fake of it.
            assert all(map(on_gpu, args[0])), "a tensor of the host"
            return torch._C._distributed_c10d.FakeWork().boxed()
        if func is _aten._to_copy.default and not isinstance(args[0], FakeTensor):
            out = func(_mode().from_tensor(args[0]), **kwargs)
            truth.write(out, args[0])
            return out
        out = func(*args, **kwargs)
        truth.follow(func, args, out)
        if isinstance(out, FakeTensor) and out.dtype == torch.float64 and on_gpu(out):
            _largest_double[0] = max(_largest_double[0], out.numel())
        return out


def _wait(func: Any, args: tuple, kwargs: dict) -> str | None:
    """Return why the host waits for the device in an operator, or None."""
    if func in _READS:
        return _READS[func] if on_gpu(args[0]) else None
    if func is _aten._to_copy.default or func is _aten.copy_.default:
        target = args[0] if func is _aten.copy_.default else None
        source = args[1] if target is not None else args[0]
        to = target.device if target is not None else torch.device(kwargs.get("device") or source.device)
        pinned = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if on_gpu(source) and to.type == "cpu":
            return "copies to the host"
        if source.device.type == "cpu" and to.type == GPU and not pinned:
            return "copies from memory of the host that is not pinned"
        return None
    if func in _GETS or func in _PUTS:
        return _wait_of_index(func, *args[:3])
    return None


def _wait_of_index(func: Any, tensor: Any, indices: Any, values: Any = None) -> str | None:
    """Return why the host waits in an operator with indices, or None."""
    given = [index for index in indices if index is not None]
    if not on_gpu(tensor):
        return None
    if any(index.device.type == "cpu" for index in given):
        return "copies the index from the host"
    # A number is filled in by a mask, without the positions.
    if any(index.dtype in (torch.bool, torch.uint8) for index in given) and (func in _GETS or values.numel() > 1):
        return _SIZE
    return None


def _names_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == GPU


def on_gpu(tensor: Any) -> bool:
    """Return whether a tensor is on the fake GPU."""
    return isinstance(tensor, torch.Tensor) and tensor.device.type == GPU


def _to_host(func: Any, args: tuple, kwargs: dict) -> bool:
    return func is _aten._to_copy.default and on_gpu(args[0]) and torch.device(kwargs["device"]).type == "cpu"


def _place() -> tuple[str, bool]:
    """Return the innermost frame outside of torch, and whether it is in the product."""
    frame: Any = sys._getframe(3)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_TORCH) and name != __file__ and not name.startswith("<"):
            break
        frame = frame.f_back
    assert frame is not None
    return f"{name}:{frame.f_lineno} {frame.f_code.co_name}", name.startswith(_PRODUCT)


def _gather_objects(gathered: list[Any], value: Any, group: Any = None) -> None:
    """Gather a value of this rank as if the others had the same; torch would pickle it and unpickle what it got."""
    _note("all_gather_object: copies to the host")
    gathered[:] = [value] * len(gathered)


def _broadcast_objects(values: list[Any], *args: Any, **kwargs: Any) -> None:
    """Leave the values as they are, as if the sending rank had the same."""
    _note("broadcast_object_list: copies to the host")


_OBJECTS = {"all_gather_object": _gather_objects, "broadcast_object_list": _broadcast_objects}


def _note(what: str) -> None:
    if not _watching:
        raise HostSync(what)
    _watching[-1].append(Wait(what, *_place()))

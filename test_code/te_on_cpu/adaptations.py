"""What has to change in TE's Python code, and in the CPU backend, for modules to run on CPU tensors."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from unittest import mock

import torch

from nemo_modelopt_dropin.cpu_backend import megatron_patches
from test_code.te_on_cpu import cross_entropy, permutation

_PERMUTATIONS = (
    "moe_permute",
    "moe_permute_with_probs",
    "moe_unpermute",
    "moe_sort_chunks_by_index",
    "moe_sort_chunks_by_index_with_probs",
)


def apply() -> None:
    """Adapt the imported package; called once, by the import hook."""
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch import permutation as te_permutation
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
    from transformer_engine.pytorch.triton import cross_entropy as loss_kernels
    from transformer_engine.pytorch.triton import permutation as kernels

    TransformerEngineBaseModule.__init__ = _with_cuda_available(TransformerEngineBaseModule.__init__)
    for module in (te.Linear, te.LayerNormLinear, te.GroupedLinear, te.DotProductAttention):
        module.forward = _with_cuda_tensors(module.forward)
    for name in _PERMUTATIONS:
        adapted = _with_cuda_tensors(getattr(te_permutation, name))
        setattr(te_permutation, name, adapted)
        setattr(te, name, adapted)
    for kernel in permutation.KERNELS:
        setattr(kernels, kernel.__name__, kernel)
    for kernel in cross_entropy.KERNELS:
        setattr(loss_kernels, kernel.__name__, kernel)
    _describe_a_device()
    # These two have references here; a configuration that sets them keeps them.
    fusions = set(megatron_patches._GPU_ONLY_FUSIONS) - {"moe_grouped_gemm", "moe_permute_fusion"}
    megatron_patches._GPU_ONLY_FUSIONS = tuple(sorted(fusions))


def _with_cuda_available(function):
    """Return a function during which torch reports a GPU: modules check it when they are created."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with mock.patch.object(torch.cuda, "is_available", return_value=True):
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def _cuda_tensors() -> Iterator[None]:
    """Let every tensor report that it is on a GPU: modules check their inputs."""
    if "is_cuda" in vars(torch.Tensor):  # an outer module's
        yield
        return
    torch.Tensor.is_cuda = property(lambda self: True)
    try:
        yield
    finally:
        del torch.Tensor.is_cuda


def _with_cuda_tensors(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with _cuda_tensors():
            return function(*args, **kwargs)

    return call


class _Device(contextlib.nullcontext):
    """A stand-in for ``torch.cuda.device``, which accepts CUDA devices only."""

    def __init__(self, device=None):
        super().__init__(device)


def _describe_a_device() -> None:
    """Describe an H100, by which TE chooses sizes of workspaces and kernels; ranges for profilers do nothing."""
    properties = types.SimpleNamespace(major=9, minor=0, name="CPU", total_memory=80 << 30, multi_processor_count=132)
    torch.cuda.get_device_properties = lambda *args, **kwargs: properties
    torch.cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
    torch.cuda.device = _Device
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args, **kwargs: None

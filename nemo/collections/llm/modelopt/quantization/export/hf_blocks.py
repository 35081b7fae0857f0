"""Correct what modelopt's writer stores for layers in NVFP4, which `hf_encoding` does not encode.

modelopt's writer rounds the weight to the export's dtype before it encodes it, so its codes differ from those of the
quantizer in memory. For layers and blocks of zeros its scales are zero or NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import hf_encoding

# NVFP4 divides amax by the largest block scale times the largest code: the result must not fall below the smallest.
_SMALLEST_AMAX = hf_encoding.SMALLEST_SCALE * 448.0 * 6.0


def state_of(write: Callable, *args: Any, **kwargs: Any) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """Return what modelopt's writer stores for a layer, with the codes of the quantizer in memory and positive scales.

    Args:
        write: ``get_quantized_state`` of modelopt.
        *args: Its arguments; the last two are the layer and the export's dtype.
        **kwargs: Its further arguments.
    """
    module, dtype = args[-2:]
    if not _is_quantized(module):
        return write(*args, **kwargs)
    with _positive_amax(module.weight_quantizer):
        state, *facts = write(*args[:-1], torch.float32, **kwargs)
    for name in ("bias", "expert_bias"):
        if name in state:
            state[name] = state[name].to(dtype)
    if state["weight"].dim() == 2 and module.weight.is_cuda:
        # The kernels that quantize to NVFP4 need CUDA. Encoding their result restores their codes.
        state["weight"] = module.weight_quantizer(module.weight.detach().float()).cpu()
    _mend(state)
    return (state, *facts)


def _is_quantized(module: Any) -> bool:
    settings = hf_encoding.settings_of(module)
    return settings is not None and isinstance(getattr(module, "weight", None), torch.Tensor)


@contextlib.contextmanager
def _positive_amax(quantizer: Any) -> Iterator[None]:
    """Raise an amax of zero to the smallest positive one inside the context."""
    names = ("_amax", "_global_amax")
    kept = [(name, value) for name in names if (value := getattr(quantizer, name, None)) is not None]
    try:
        for name, value in kept:
            setattr(quantizer, name, value.detach().clamp_min(_SMALLEST_AMAX))
        yield
    finally:
        for name, value in kept:
            setattr(quantizer, name, value)


def _mend(state: dict[str, torch.Tensor]) -> None:
    """Replace scales of zero by the smallest positive one, and the weights of their blocks by zeros, in place."""
    weight, scale = state["weight"], state.get("weight_scale")
    if scale is None:
        return
    empty = scale.float() == 0
    if not bool(empty.any()):
        return
    smallest = torch.finfo(scale.dtype).smallest_normal
    if scale.dtype == torch.float8_e4m3fn:
        smallest = 2.0**-9
    state["weight_scale"] = torch.where(empty, smallest, scale.float()).to(scale.dtype)
    width = weight.shape[-1]
    blocks = empty if empty.dim() < 2 else empty.repeat_interleave(width // empty.shape[-1], dim=-1)
    state["weight"] = weight.masked_fill(blocks.to(weight.device), 0.0)

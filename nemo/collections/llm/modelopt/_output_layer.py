"""Restore quantized models whose checkpoints have no state of the output layer's quantizers.

Megatron's ``GPTModel`` saves none. Until 0.44, modelopt does not look for it; from 0.45 it does, and Megatron's check
of what it is about to load fails on the quantizers that a converted model has at first, which are all enabled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

import modelopt.torch.opt as opt
from modelopt.torch.quantization.nn import TensorQuantizer

from . import _functions

NAME = "output_layer"


def has_state() -> bool:
    """Return whether the installed modelopt looks for state of the output layer's quantizers."""
    with contextlib.suppress(ImportError):
        from modelopt.torch.quantization.plugins import megatron

        return hasattr(megatron, "keep_gpt_output_layer_extra_state")
    return False


def quantizers(model: nn.Module) -> Iterator[TensorQuantizer]:
    """Yield the quantizers of a model's output layer."""
    for name, module in model.named_modules():
        if NAME in name.split(".") and isinstance(module, TensorQuantizer):
            yield module


def restored_unquantized() -> AbstractContextManager[None]:
    """Return a context in which modelopt restores a model's modes with the output layer's quantizers disabled."""
    if not has_state():
        return contextlib.nullcontext()
    name = "restore_from_modelopt_state"
    return _functions.replaced(opt, name, _then_disabled(getattr(opt, name)))


def _then_disabled(restore: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def restored(*args: Any, **kwargs: Any) -> nn.Module:
        model = restore(*args, **kwargs)
        for quantizer in quantizers(model):
            quantizer.disable()
        return model

    return restored

"""Checks for NaN and infinity in the teacher: once after loading, and in the first training step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..errors import ModelOptConfigError
from ._deferred_logits import DeferredLogits

_SHOWN = 3
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_weights(model: Any, where: Any) -> None:
    """Raise if weights of the teacher are not finite; the training would show it as its own NaN loss.

    Args:
        model: the teacher, its weights loaded.
        where: its checkpoint.

    Raises:
        ModelOptConfigError: Naming the first such weights.
    """
    if not issubclass(type(model), torch.nn.Module):  # a mock with its spec has nothing to look at
        return
    named = [(name, weight) for name, weight in model.named_parameters() if _can_check(weight)]
    if not named:
        return
    # One transfer to the host for all weights.
    finite = torch.stack([_is_finite(weight) for _, weight in named]).tolist()
    wrong = [name for (name, _), whole in zip(named, finite, strict=True) if not whole]
    if wrong:
        raise ModelOptConfigError(
            f"The teacher's weights are not finite: {len(wrong)} of {len(named)} hold NaN or infinity, first "
            f"{wrong[:_SHOWN]}. The checkpoint {where} is damaged; use an earlier one."
        )


def check_outputs(layers: Iterable[Any]) -> None:
    """Raise if what was captured of the teacher is not finite. Waits for the device: call it in the first step only.

    Args:
        layers: layers of the teacher whose outputs modelopt captured.

    Raises:
        ModelOptConfigError: If an output holds NaN or infinity.
    """
    for layer in layers:
        output = getattr(layer, "_intermediate_output", None)
        output = output[0] if isinstance(output, tuple) else output
        value = output.hidden if isinstance(output, DeferredLogits) else output
        if isinstance(value, Tensor) and _can_check(value) and not bool(_is_finite(value)):
            raise ModelOptConfigError(
                f"The teacher's output of {type(layer).__name__} holds NaN or infinity in the first step, although its "
                "weights are finite. Use a precision with more range (bf16 or fp32 rather than fp16), and check that "
                "the teacher's configuration is the one that it was trained with."
            )


def _can_check(tensor: Tensor) -> bool:
    # Meta and fake tensors, with which memory is simulated, hold no numbers.
    has_numbers = not tensor.is_meta and not isinstance(tensor, FakeTensor)
    return tensor.dtype in _DTYPES and tensor.numel() > 0 and has_numbers


@torch.no_grad()
def _is_finite(tensor: Tensor) -> Tensor:
    """Return whether all numbers are finite, without a temporary of the tensor's size: NaN goes through aminmax."""
    least, most = torch.aminmax(tensor)
    return torch.isfinite(least) & torch.isfinite(most)

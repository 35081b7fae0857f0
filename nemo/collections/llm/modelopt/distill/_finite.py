"""Check the teacher for NaN and infinity: once after loading, and in the first training step."""

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
    """Raise an error if weights of the teacher are not finite; the training would only show a NaN loss.

    Args:
        model: the teacher with its weights loaded.
        where: its checkpoint.

    Raises:
        ModelOptConfigError: With the first such weights.
    """
    if not issubclass(type(model), torch.nn.Module):  # a mock with the spec of a module has no weights
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
    """Raise an error if captured outputs of the teacher are not finite.

    It waits for the device, so call it only in the first step.

    Args:
        layers: layers of the teacher with outputs that modelopt captured.

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
    # Meta and fake tensors, which simulate memory, hold no numbers.
    has_numbers = not tensor.is_meta and not isinstance(tensor, FakeTensor)
    return tensor.dtype in _DTYPES and tensor.numel() > 0 and has_numbers


@torch.no_grad()
def _is_finite(tensor: Tensor) -> Tensor:
    """Return whether all numbers are finite, without a temporary of the tensor's size: aminmax propagates NaN."""
    least, most = torch.aminmax(tensor)
    return torch.isfinite(least) & torch.isfinite(most)

"""Check for NaN and infinity: the teacher after loading and in the first step, the loss of every micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from nemo.utils import logging
from torch import Tensor
from torch._subclasses import FakeTensor

from .._divergence.recorded_topk import RecordedLogits
from ..errors import ModelOptConfigError
from ._deferred_logits import DeferredLogits
from ._state import DistillationState

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


def finite_outputs(student: Any, teacher: Any) -> dict[str, Tensor]:
    """Return by model whether the outputs of a micro-batch are finite, without waiting for the device.

    A hidden state with NaN or infinity makes all logits of its token so; one entry of each token is enough.

    Args:
        student: logits [s, b, v] or deferred logits.
        teacher: the same, or recorded logits.
    """
    found = {}
    for whose, output in (("teacher", teacher), ("student", student)):
        if isinstance(output, DeferredLogits):
            output = output.hidden
        elif isinstance(output, RecordedLogits):
            output = output.values
        if isinstance(output, Tensor) and _can_check(output):
            found[whose] = torch.isfinite(output.detach()[..., 0]).all()
    return found


_REASONS = {
    "data": "the loss mask of the batch holds NaN or infinity. Check the data",
    "teacher": "the teacher's outputs hold NaN or infinity. Use a precision with more range, and check the data",
    "student": "the student's outputs hold NaN or infinity. Its training diverges: resume with a lower learning rate",
    None: "the outputs of both models are finite. Resume with a lower learning rate or a precision with more range",
}


def check_loss(losses: Mapping[str, Tensor], mask: Tensor, state: DistillationState) -> None:
    """Raise an error if the loss of a training micro-batch is not finite, before the weights are updated with it.

    It waits for the device, as Megatron's own check of the loss does.

    Args:
        losses: the total ``kd_loss`` and its parts.
        mask: loss mask [b, s].
        state: state of the distillation.

    Raises:
        ModelOptConfigError: With the losses, and what they come from.
    """
    total = losses["kd_loss"]
    if not total.requires_grad or not _can_check(total) or bool(torch.isfinite(total)):
        return
    wrong = [whose for whose, finite in state.finite.items() if not bool(finite)]
    culprit = "data" if not bool(torch.isfinite(mask.float()).all()) else next(iter(wrong), None)
    parts = ", ".join(f"{name}={float(value.detach()):.4g}" for name, value in losses.items() if value.numel() == 1)
    step = f" of step {state.step}" if state.step is not None else ""
    raise ModelOptConfigError(
        f"The loss{step} is not finite ({parts}): {_REASONS[culprit]}. The weights are not updated with it, and the "
        "last checkpoint is kept; the same command resumes from it."
    )


class LossWatch:
    """Warns once if the logged losses rise far above their lowest mean."""

    _WINDOW, _FACTOR = 5, 1.5

    def __init__(self):
        self._recent: list[float] = []
        self._lowest = float("inf")
        self._warned = False

    def see(self, loss: float, step: int | None) -> None:
        """Take the loss of a logged step.

        Args:
            loss: mean over the tokens of the global batch.
            step: number of the step.
        """
        self._recent = [*self._recent[1 - self._WINDOW :], loss]
        if len(self._recent) < self._WINDOW or self._warned:
            return
        mean = sum(self._recent) / self._WINDOW
        self._lowest = min(self._lowest, mean)
        if mean > self._FACTOR * self._lowest:
            self._warned = True
            logging.warning(
                f"Distillation: the logits loss rises: {mean:.4g} on average over {self._WINDOW} logged steps up to "
                f"step {step}, {self._lowest:.4g} at its lowest. If it keeps rising, resume from an earlier checkpoint "
                "with a lower learning rate."
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

"""Check for NaN and infinity: the teacher after loading and in the first step, losses and gradients of every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from nemo.utils import logging
from torch import Tensor
from torch._subclasses import FakeTensor

from .._divergence.recorded_topk import RecordedLogits
from .._parallel import any_rank_on_device, device, gather_objects
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


_REASONS = {
    "data": "the loss mask of the batch holds NaN or infinity. Check the data",
    "teacher": "the teacher's outputs hold NaN or infinity. Use a precision with more range, and check the data",
    "student": "the student's outputs hold NaN or infinity. Its training diverges: resume with a lower learning rate",
    None: "the outputs of both models are finite. Resume with a lower learning rate or a precision with more range",
}
_KEPT = "The weights are not updated with it, and the last checkpoint is kept; the same command resumes from it."


class FiniteFlags:
    """Whether what this rank computed in a training step is finite, collected without waiting for the device."""

    def __init__(self):
        self._outputs: dict[str, Tensor] = {}
        self._layers: dict[str, Tensor] = {}
        self._names: list[str] = []
        # Of the first micro-batch whose loss is not finite: whether there is one, and whether its mask, the teacher's
        # outputs and the student's are the cause; and the losses by name.
        self._loss: Tensor | None = None
        self._values: Tensor | None = None

    def see_layers(self, layers: Iterable[Any]) -> None:
        """Check captured outputs of the teacher, as in the first step.

        Args:
            layers: layers of the teacher with outputs that modelopt captured.
        """
        for layer in layers:
            output = getattr(layer, "_intermediate_output", None)
            output = output[0] if isinstance(output, tuple) else output
            value = output.hidden if isinstance(output, DeferredLogits) else output
            if isinstance(value, Tensor) and _can_check(value):
                name = type(layer).__name__
                finite = _is_finite(value)
                self._layers[name] = self._layers[name] & finite if name in self._layers else finite

    def see_outputs(self, student: Any, teacher: Any) -> None:
        """Check the outputs of a micro-batch.

        A hidden state with NaN or infinity makes all logits of its token so; one entry of each token is enough.

        Args:
            student: logits [s, b, v] or deferred logits.
            teacher: the same, or recorded logits.
        """
        self._outputs = {}
        for whose, output in (("teacher", teacher), ("student", student)):
            if isinstance(output, DeferredLogits):
                output = output.hidden
            elif isinstance(output, RecordedLogits):
                output = output.values
            if isinstance(output, Tensor) and _can_check(output):
                self._outputs[whose] = torch.isfinite(output.detach()[..., 0]).all()

    def see_loss(self, losses: Mapping[str, Tensor], mask: Tensor) -> None:
        """Check the loss of a micro-batch that is trained on.

        Args:
            losses: the total ``kd_loss`` and its parts.
            mask: loss mask [b, s].
        """
        total = losses["kd_loss"]
        if not total.requires_grad or not _can_check(total):
            return
        broken = ~torch.isfinite(total.detach()).all()
        none = torch.zeros_like(broken)
        causes = [~self._outputs[whose] if whose in self._outputs else none for whose in ("teacher", "student")]
        now = torch.stack([broken, ~torch.isfinite(mask.float()).all(), *causes]) & broken
        parts = {name: value.detach().float().reshape(()) for name, value in losses.items() if value.numel() == 1}
        values = torch.stack(list(parts.values()))
        if self._loss is None or self._values is None or self._names != list(parts):
            self._loss, self._values, self._names = now, values, list(parts)
            return
        fine = ~self._loss[0]
        self._loss, self._values = torch.where(fine, now, self._loss), torch.where(fine, values, self._values)

    def broken(self) -> Tensor | None:
        """Return whether anything is not finite, as a tensor on the device; None if nothing was checked."""
        flags = [~finite for finite in self._layers.values()]
        if self._loss is not None:
            flags.append(self._loss[0])
        return torch.stack(flags).any() if flags else None

    def report(self, step: int | None) -> tuple[int, str] | None:
        """Return what is not finite on this rank, and how near it is to the cause (lowest first); it waits.

        Args:
            step: number of the training step.
        """
        for name, finite in self._layers.items():
            if not bool(finite):
                return 0, (
                    f"The teacher's output of {name} holds NaN or infinity in the first step, although its weights are "
                    "finite. Use a precision with more range (bf16 or fp32 rather than fp16), and check that the "
                    "teacher's configuration is the one that it was trained with."
                )
        if self._loss is None or self._values is None or not bool(self._loss[0]):
            return None
        causes = dict(zip(("data", "teacher", "student"), self._loss[1:].tolist(), strict=True))
        cause = next((name for name, is_cause in causes.items() if is_cause), None)
        named = zip(self._names, self._values.tolist(), strict=True)
        parts = ", ".join(f"{name}={value:.4g}" for name, value in named)
        of_step = f" of step {step}" if step is not None else ""
        return 1, f"The loss{of_step} is not finite ({parts}): {_REASONS[cause]}. {_KEPT}"


def raise_on_all_ranks(flags: FiniteFlags, gradients: Sequence[Tensor], step: int | None) -> None:
    """Raise an error on every rank if losses or gradients of a step are not finite on any.

    All ranks call it after the last micro-batch, before the weights are updated. It takes one collective and waits for
    the device once. A rank that raised alone would leave the others waiting in their next collective.

    Args:
        flags: what this rank computed.
        gradients: reduced gradients to check as well.
        step: number of the training step.

    Raises:
        ModelOptConfigError: With the losses and their cause, and the rank if only some are affected.
    """
    finite = [_is_finite(gradient) for gradient in gradients if _can_check(gradient)]
    own = [flag for flag in (flags.broken(), *(~each for each in finite)) if flag is not None]
    broken = torch.stack(own).any() if own else torch.zeros((), dtype=torch.bool, device=device())
    if not any_rank_on_device(broken):
        return
    report = flags.report(step)
    if report is None and not all(bool(each) for each in finite):
        of_step = f" of step {step}" if step is not None else ""
        report = 2, f"The gradient{of_step} is not finite, although the losses are: {_REASONS[None]}. {_KEPT}"
    reports = gather_objects(report)
    nearest = min(found[0] for found in reports if found is not None)
    ranks = [rank for rank, found in enumerate(reports) if found is not None and found[0] == nearest]
    where = f" (On {len(ranks)} of {len(reports)} ranks, first on rank {ranks[0]}.)" if ranks[0] else ""
    raise ModelOptConfigError(reports[ranks[0]][1] + where)


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

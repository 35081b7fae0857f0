"""Logits that are not computed yet: hidden states and output weights, from which the fused loss computes the losses.

An output layer that defers its logits returns its hidden states and weight instead (`DeferredLogits`). modelopt's hooks
capture them like logits, the logits loss pairs them (`PairedLogits`), and the reduction of the losses, which has the
loss mask, computes the losses (`fused_linear`).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from .._divergence.fused_linear import FusedLosses, Objective, fused_linear_losses


class DeferredLogits:
    """The factors of the logits [s, b, v] of one model.

    Attributes:
        input: [s, b, h], what the layer was called with.
        hidden: [s, b, h], the whole sequence.
        weight: [v, h], this rank's shard.
        layer: the output layer.
        labels: next tokens [b, s] if the language-model loss is needed.
        pair: the pair with the other model's deferred logits, once it exists.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, layer: Any):
        """Store them; a student's gradients are reduced over the tensor-parallel ranks as its layer would.

        Args:
            hidden: input of the layer: [s, b, h], or this rank's part of it under sequence parallelism.
            weight: [v, h].
            layer: the layer.
        """
        self.input = hidden
        if layer.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=layer.tp_group
            )
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=layer.tp_group)
        self.hidden, self.weight, self.layer = hidden, weight, layer
        self.labels: Tensor | None = None
        self.pair: PairedLogits | None = None
        self.dtype = hidden.dtype  # of the logits

    def compute(self) -> Tensor:
        """Return the logits [s, b, v], as the layer would have."""
        return type(self.layer).forward(self.layer, self.input, weight=self.weight)[0]


class PairedLogits:
    """Both models' deferred logits and their objective; the losses are computed once, when the mask is known."""

    def __init__(self, student: DeferredLogits, teacher: DeferredLogits, objective: dict[str, Any], factor: float):
        """Store them.

        Args:
            student: deferred logits of the student.
            teacher: deferred logits of the teacher.
            objective: fields of an ``Objective``.
            factor: multiplies the divergence.
        """
        self._student, self._teacher, self._factor = student, teacher, factor
        group = student.layer.tp_group
        self._objective = Objective(
            **objective,
            group=group if group is not None and torch.distributed.get_world_size(group) > 1 else None,
            student_cap=softcap(student.layer),
            teacher_cap=softcap(teacher.layer),
            main_grad=bool(student.layer.gradient_accumulation_fusion),
        )
        self._losses: FusedLosses | None = None

    def sums(self, mask: Tensor) -> FusedLosses:
        """Return the losses summed over the unmasked tokens.

        Args:
            mask: [b, s], zero for masked tokens.
        """
        if self._losses is None:
            labels = self._student.labels
            losses = fused_linear_losses(
                self._student.hidden.flatten(0, 1),
                self._student.weight,
                self._teacher.hidden.flatten(0, 1),
                self._teacher.weight,
                mask.t().reshape(-1),
                self._objective,
                None if labels is None else labels.t().reshape(-1),
            )
            self._losses = losses._replace(divergence=losses.divergence * self._factor)
            # They refer to this pair; the cycle would keep them until garbage collection.
            del self._student, self._teacher
        return self._losses


class SummedLoss:
    """One of the fused losses; a reduction calls ``masked_sum`` with its mask."""

    def __init__(self, pair: PairedLogits, name: str):
        """Choose the loss.

        Args:
            pair: both models' logits.
            name: a field of ``FusedLosses``.
        """
        self._pair, self._name = pair, name

    def masked_sum(self, mask: Tensor) -> Tensor:
        """Return the loss summed over the unmasked tokens, a scalar.

        Args:
            mask: [b, s].
        """
        return getattr(self._pair.sums(mask), self._name)


def sums_tokens(reduction: Any) -> Any:
    """Mark a loss reduction, a function or a method, as one that takes a `SummedLoss` in place of a tensor."""
    reduction.takes_summed_loss = True
    return reduction


def takes_summed_loss(reduction: Any) -> bool:
    """Return whether a loss reduction has the mark of `sums_tokens`; all others need the loss of every token."""
    return getattr(getattr(reduction, "func", reduction), "takes_summed_loss", False) is True


def softcap(layer: Any) -> float | None:
    """Return the value at which the logits of Gemma 2 and 3 are capped, or None."""
    return getattr(layer.config, "final_logit_softcapping", None) if type(layer) is not ColumnParallelLinear else None

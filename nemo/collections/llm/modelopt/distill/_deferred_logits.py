"""Logits that are not computed yet: hidden states and output weight, which the fused loss turns into losses.

An output layer that defers gives its hidden states and weight in the place of logits (`DeferredLogits`). modelopt's
hooks capture them as they capture logits, the logits loss pairs them (`PairedLogits`), and the reduction of the losses,
which knows the loss mask, has them computed (`_fused_linear`).
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
    """What makes the logits [s, b, v] of one model.

    Attributes:
        hidden: [s, b, h], the whole sequence.
        weight: [v, h], this rank's shard.
        layer: the output layer.
        labels: next tokens [b, s] where the language-model loss is wanted.
        pair: with the other model's, once they were brought together.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, layer: Any):
        """Keep them; a student's gradients will be reduced over the tensor-parallel ranks as its layer would.

        Args:
            hidden: what the layer was given: [s, b, h], or this rank's stretch of it under sequence parallelism.
            weight: [v, h].
            layer: the layer.
        """
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


class PairedLogits:
    """Both models' deferred logits with what is to be computed of them; computed once, when the mask is known."""

    def __init__(self, student: DeferredLogits, teacher: DeferredLogits, objective: dict[str, Any], factor: float):
        """Remember them.

        Args:
            student: its deferred logits.
            teacher: its deferred logits.
            objective: fields of an ``Objective``.
            factor: the divergence is multiplied by it.
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
        """Return the losses summed over the tokens that count.

        Args:
            mask: [b, s], zero where a token does not count.
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
            # They know this pair: a cycle would keep them until the garbage is collected.
            del self._student, self._teacher
        return self._losses


class SummedLoss:
    """One of the fused losses, for a reduction to ask for with its mask: ``masked_sum(mask)``."""

    def __init__(self, pair: PairedLogits, name: str):
        """Choose.

        Args:
            pair: both models' logits.
            name: a field of ``FusedLosses``.
        """
        self._pair, self._name = pair, name

    def masked_sum(self, mask: Tensor) -> Tensor:
        """Return the loss summed over the tokens that count, a scalar.

        Args:
            mask: [b, s].
        """
        return getattr(self._pair.sums(mask), self._name)


def softcap(layer: Any) -> float | None:
    """Return at which value the logits of Gemma 2 and 3 are capped."""
    return getattr(layer.config, "final_logit_softcapping", None) if type(layer) is not ColumnParallelLinear else None

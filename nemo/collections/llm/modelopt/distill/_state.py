"""The state of a distillation between the methods that it adds to modelopt's model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ._finite import FiniteFlags


@dataclass
class DistillationState:
    """What a distillation remembers on this rank: one object, kept as ``_distillation``.

    ``adjust_distillation_model_for_mcore`` sets it on the ``DistillationModel``, and `fuse_output_layers` on both
    output layers if they defer their logits. The width of the student's part of a pipeline message is not in it: that
    is the model's ``_tensor_split_idx``, as in the stock subpackage.

    Attributes:
        settings: the ``DistillationConfig``; fields of it are read when they are needed.
        stage: this rank's pipeline stage if intermediate losses are computed on several stages, else None.
        pair_stages: pipeline stage of each intermediate layer pair, in the order of the settings.
        early_pairs: the entries of ``pair_stages`` before the last stage. Each such pair has a column in the pipeline
            messages (see ``_pipeline_losses``).
        early_losses: the columns of the last message received, [s, b, early pairs].
        observing: whether metrics that cost time are computed for the next micro-batches.
        labels: next tokens of the last micro-batch [b, s], for the metrics.
        fused: whether logits and logits loss are fused on this rank; None before the first training step decides.
        mtp_heads: multi-token-prediction heads whose losses Megatron has yet to compute in this forward pass.
        finite: whether outputs and losses of this training step are finite.
        step: number of the training step, from 1; None outside a training.
        deferring: whether the output layers return `DeferredLogits` at the moment.
        teacher_inputs: arguments of the teacher's next forward pass if it reads its own tokens, else None.
    """

    settings: Any = None
    stage: int | None = None
    pair_stages: list[int] = field(default_factory=list)
    early_pairs: list[int] = field(default_factory=list)
    early_losses: Tensor | None = None
    observing: bool = False
    labels: Tensor | None = None
    fused: bool | None = None
    mtp_heads: int = 0
    finite: FiniteFlags = field(default_factory=FiniteFlags)
    step: int | None = None
    deferring: bool = False
    teacher_inputs: dict[str, Tensor] | None = None


def state_of(model: Any) -> DistillationState:
    """Return the state of a distillation model; a new one for any other model, stand-ins of tests included."""
    state = getattr(model, "_distillation", None)
    return state if isinstance(state, DistillationState) else DistillationState()

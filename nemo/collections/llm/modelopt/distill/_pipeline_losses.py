"""Pipeline messages of student and teacher, which also carry the intermediate losses of earlier stages.

A message between stages is [s, b, h of the student + h of the teacher + pairs]. Each pair of layers before the last
stage has one more column. It is zero until the stage of the pair writes the loss of each token. The last stage treats
the columns like its own losses: it masks, balances and logs them, and Megatron's schedule returns their gradient with
that of the hidden states. (They have the type of the messages, as everything that is sent between stages.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._state import DistillationState
from .recorded.teacher import is_recorded


def set_student_input_tensor_shape(self, shapes: list[tuple[int, ...]]) -> None:
    """Store the size of the student's part of a tensor's last axis, for `set_input_tensor`."""
    self._tensor_split_idx = shapes[0][-1]


def set_input_tensor(self, input_tensors: list[Tensor]) -> None:
    """Pass each model its part of the previous stage's message, and store the columns of losses.

    Before the first training step, and in validation, a message holds only the student's part.
    """
    student: list[Tensor | None] = []
    teacher: list[Tensor | None] = []
    state: DistillationState = self._distillation
    pairs = len(state.early_pairs) if state.early_pairs and self.training else 0
    state.early_losses = None
    for tensor in input_tensors:
        if tensor is None:
            student.append(None)
            teacher.append(None)
            continue
        split = tensor.shape[-1] if self._tensor_split_idx is None else self._tensor_split_idx
        student.append(tensor[..., :split])
        teacher.append(teacher_part(tensor, split, pairs) if pairs else tensor[..., split:])
        state.early_losses = tensor[..., tensor.shape[-1] - pairs :] if pairs else None
    if not is_recorded(self):
        type(self).set_input_tensor(self.teacher_model, teacher)
    type(self).set_input_tensor(self, student)


def teacher_part(tensor: Tensor, split: int, pairs: int) -> Tensor:
    """Return the teacher's part of a message [s, b, h + h_teacher + pairs]."""
    return tensor[..., split : tensor.shape[-1] - pairs]


def own_columns(model: Any) -> list[Tensor]:
    """Return the losses [s, b] of the layer pairs captured on this stage, in order, and delete the captured outputs.

    Args:
        model: a ``DistillationModel`` after a forward pass.
    """
    columns = []
    for (student, teacher), loss in model._layers_to_loss.items():
        outputs = student._intermediate_output, teacher._intermediate_output
        student._intermediate_output = teacher._intermediate_output = None
        columns.append(loss(*outputs)[0].transpose(0, 1))
    return columns


def message(model: Any, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the message of this stage: [s, b, h of the student + h of the teacher + pairs].

    Args:
        model: a ``DistillationModel`` with its ``DistillationState``.
        student: hidden states of the student [s, b, h].
        teacher: hidden states of the teacher.
    """
    parts = [student, teacher.to(student.dtype)]
    state: DistillationState = model._distillation
    if state.early_pairs:
        received = state.early_losses
        columns = [student.new_zeros(student.shape[:-1])] * len(state.early_pairs)
        if received is not None:
            columns = list(received.unbind(-1))
        own = iter(own_columns(model))
        for place, stage in enumerate(state.early_pairs):
            if stage == state.stage:
                columns[place] = next(own).to(student.dtype)
        parts.append(torch.stack(columns, dim=-1))
    return torch.cat(parts, dim=-1)


def losses_of_stages(model: Any, loss_reduction_fn: Any) -> dict[str, Tensor]:
    """Return the reduced losses that earlier stages have sent, by name, and delete them.

    Args:
        model: a ``DistillationModel`` on the last stage.
        loss_reduction_fn: reduces (loss [b, s], tp_reduce, is_sequence_parallel) to a scalar.
    """
    state: DistillationState = model._distillation
    received, state.early_losses = state.early_losses, None
    if received is None:
        return {}
    split = bool(model.config.sequence_parallel)
    return {
        f"IntermediateLoss_of_stage_{stage}_{place}": loss_reduction_fn(
            (column.transpose(0, 1).contiguous(), False, split)
        )
        for place, (stage, column) in enumerate(zip(state.early_pairs, received.unbind(-1), strict=True))
    }

"""Distill from a teacher with another tokenizer: both models read one text, each in its own tokens.

Such a batch holds, besides the student's tokens, ``teacher_tokens`` [b, s] and ``counterparts`` [b, s]: for each token
of the student the place of the teacher's token before which the text is the same, or -1 if the teacher has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.lightning import io
from nemo.lightning.ckpt_utils import ckpt_to_context_subdir
from nemo.utils import logging
from torch import Tensor

from nemo_modelopt_dropin.preflight import loss_file

from .._divergence.sorted_probabilities import sorted_distance
from ..errors import ModelOptConfigError
from ._state import DistillationState
from ._teacher import padded_vocab_size
from .loss import BaseLoss

TEACHER_TOKENS, COUNTERPARTS = "teacher_tokens", "counterparts"


class SortedLogitsLoss(BaseLoss):
    """Distance of both models' sorted probabilities (see ``_divergence.sorted_probabilities``)."""

    # A part of the class of every logits loss that the other modules read.
    reuse_teacher = False
    entries: int | None = None

    def __init__(self, model_config: Any, temperature: float = 1.0):
        """Choose the temperature.

        Args:
            model_config: Megatron-Core configuration of the student.
            temperature: divides both logits.
        """
        super().__init__(model_config)
        self._temperature = temperature
        # Of the micro-batch, [b, s] on the host; set before each forward pass.
        self.counterparts: Tensor | None = None

    def forward(self, predictions: Tensor, targets: Tensor) -> Any:
        """Return the distance of each token, zero for tokens without a counterpart.

        Args:
            predictions: student logits [s, b, v].
            targets: teacher logits [s, b, w].

        Returns:
            ([b, s] loss, tp_reduce, is_sequence_parallel).
        """
        student, teacher = self.pre_forward(predictions, targets)
        assert self.counterparts is not None, "no batch was shown"
        places = self.counterparts.t()
        samples = places.shape[1]
        # The teacher's token j of sample k is row j * b + k of its logits.
        rows = torch.where(places < 0, -1, places * samples + torch.arange(samples, device=places.device)).flatten()
        split = self._config.tensor_model_parallel_size > 1
        group = parallel_state.get_tensor_model_parallel_group() if split else None
        loss = sorted_distance(student.flatten(0, 1), teacher.flatten(0, 1), rows, self._temperature, group)
        return self.post_forward(loss.view(student.shape[:2]))


def is_aligned(settings: Any) -> bool:
    """Return whether the settings compare models with different tokenizers; stand-ins for settings do not."""
    return getattr(settings, "logit_kl_vocabulary", None) == loss_file.ALIGNED_TEXT


def check_aligned(settings: Any, model: Any, recorded: bool) -> None:
    """Raise an error if a training cannot compare models with different tokenizers.

    Args:
        settings: a ``DistillationConfig`` with ``logit_kl_vocabulary: aligned-text``.
        model: a ``DistillationGPTModel`` with a trainer.
        recorded: whether the teacher is recorded.

    Raises:
        ModelOptConfigError: With everything that has to change.
    """
    found = loss_file.aligned_problems({name: getattr(settings, name) for name in loss_file.NOT_ALIGNED})
    for name in ("pipeline_model_parallel_size", "context_parallel_size"):
        if getattr(model.config, name) > 1:
            found.append(f"{name}={getattr(model.config, name)} is not supported; use 1")
    if recorded:
        found.append("a recorded teacher has logits over the student's tokens; use the teacher's checkpoint")
    data = getattr(model.trainer, "datamodule", None)
    if not getattr(data, "has_teacher_tokens", False):
        found.append(
            f"the data ({type(data).__name__}) has no text to encode for the teacher; use --text of the command, or "
            "nemo_modelopt_cli.aligned.AlignedTextDataModule"
        )
    if found:
        raise ModelOptConfigError(f"logit_kl_vocabulary={loss_file.ALIGNED_TEXT}: {'; '.join(found)}.")


def set_vocabulary(teacher: Any, path: Any) -> None:
    """Set the size of the teacher's vocabulary from its own tokenizer if its configuration has none.

    Args:
        teacher: configuration of the teacher, changed in place.
        path: checkpoint of the teacher.
    """
    if teacher.vocab_size is None:
        tokenizer = io.load_context(ckpt_to_context_subdir(path), subpath="model.tokenizer")
        teacher.vocab_size = padded_vocab_size(teacher, tokenizer)
    logging.info(
        f"Distillation: the teacher reads its own tokens of a vocabulary of {teacher.vocab_size}; sorted probabilities "
        "are compared where the texts before both tokens are the same."
    )


def see(state: DistillationState, loss: Any, batch: Mapping[str, Any]) -> None:
    """Keep the teacher's part of the next micro-batch.

    Args:
        state: state of the distillation.
        loss: the `SortedLogitsLoss`.
        batch: a whole micro-batch of the data loader.

    Raises:
        ModelOptConfigError: If the batch has no tokens of the teacher.
    """
    if TEACHER_TOKENS not in batch or COUNTERPARTS not in batch:
        raise ModelOptConfigError(
            f"logit_kl_vocabulary={loss_file.ALIGNED_TEXT} needs batches with {TEACHER_TOKENS} and {COUNTERPARTS}, got "
            f"{sorted(batch)}. Use nemo_modelopt_cli.aligned.AlignedTextDataModule, or --text of the command."
        )
    device = torch.cuda.current_device()
    tokens = batch[TEACHER_TOKENS].to(device, non_blocking=True)
    loss.counterparts = batch[COUNTERPARTS]
    state.teacher_inputs = {
        "input_ids": tokens,
        "position_ids": torch.arange(tokens.shape[1], device=device).expand_as(tokens),
        # With labels, Megatron does not copy the logits to return them.
        "labels": tokens,
    }

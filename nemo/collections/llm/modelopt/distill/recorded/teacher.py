"""A stand-in teacher that replays recorded top-k logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.transformer import MegatronModule
from nemo.utils import logging
from torch import nn

from ...errors import ModelOptConfigError
from .._config import DistillationConfig
from .store import Recording, checkpoint_digests, read_manifest, sample_keys, tokenizer_digest

_LAYER = "output_layer"


class _Recorded(nn.Module):
    """Replace the teacher's output layer, from which modelopt captures the input of the loss."""

    def forward(self, logits: Any) -> Any:
        return logits


class RecordedTeacher(MegatronModule):
    """Return the recorded logits of the last micro-batch passed to `see`; it has no weights and sends no messages."""

    def __init__(self, config: Any, path: str):
        """Open the files on the last pipeline stage, the only one that needs them.

        Args:
            config: configuration of the teacher.
            path: folder of the recorded teacher.
        """
        super().__init__(config=config)
        self._recording = Recording(path) if parallel_state.is_pipeline_last_stage() else None
        self._keys: np.ndarray | None = None
        self.output_layer = _Recorded()

    def see(self, batch: Mapping[str, Any]) -> None:
        """Remember the samples of the next forward pass.

        Args:
            batch: a whole micro-batch of the data loader.
        """
        if self._recording is not None:
            self._keys = sample_keys(batch)

    def forward(self, *args, **kwargs) -> None:
        """Pass the recorded logits through the output layer.

        Raises:
            ModelOptConfigError: If a sample was not recorded.
        """
        if self._recording is None:
            return
        assert self._keys is not None, "see() was not called with a batch"
        self.output_layer(self._recording.find(self._keys, torch.cuda.current_device()))


def is_recorded(model: Any) -> bool:
    """Return whether the teacher of a ``DistillationModel`` is a recorded teacher."""
    return isinstance(getattr(model, "_teacher_model", None), RecordedTeacher)


def recorded_teacher(config: Any, path: str) -> RecordedTeacher:
    """Return a recorded teacher (top-level, so that it can be pickled)."""
    manifest = read_manifest(path)
    logging.info(
        f"Distillation: no teacher is loaded; {manifest.samples} samples were recorded with the teacher's "
        f"{manifest.topk} largest logits."
    )
    return RecordedTeacher(config, path)


def check_recording(path: str, settings: DistillationConfig, student: Any, vocab_size: int, tokenizer: Any) -> None:
    """Raise an error if a recorded teacher does not fit a training; it reads only the manifest.

    Args:
        path: folder of the recorded teacher.
        settings: settings of the distillation.
        student: Megatron-Core configuration of the student.
        vocab_size: size of its vocabulary, with padding.
        tokenizer: tokenizer of the student.

    Raises:
        ModelOptConfigError: With both values of each difference.
    """
    found = read_manifest(path)
    problems = []
    if settings.intermediate_layer_pairs:
        problems.append(
            "intermediate_layer_pairs need the teacher's activations, and only logits were recorded; remove them"
        )
    if settings.logit_layers[1] != _LAYER:
        problems.append(f"the outputs of {_LAYER!r} were recorded, the settings have {settings.logit_layers[1]!r}")
    if settings.logit_kl_temperature != found.temperature:
        problems.append(
            f"it was recorded for logit_kl_temperature={found.temperature}, the settings have "
            f"{settings.logit_kl_temperature}"
        )
    if (settings.logit_kl_topk or 0) > found.topk:
        problems.append(f"{found.topk} entries were recorded, logit_kl_topk={settings.logit_kl_topk} needs more")
    if settings.fused_logits == "on":
        problems.append("fused_logits='on' needs the teacher's output layer; use 'auto'")
    if settings.validation_metrics:
        problems.append("validation_metrics needs the teacher in validation; remove it")
    if getattr(student, "context_parallel_size", 1) > 1:
        problems.append(f"context_parallel_size={student.context_parallel_size} is not supported; use 1")
    own = tokenizer_digest(tokenizer)
    if own != found.tokenizer:
        problems.append(f"its tokenizer was {found.tokenizer}, the student's is {own}")
    if found.largest_entry >= vocab_size:
        problems.append(f"entry {found.largest_entry} was recorded, the student's vocabulary has {vocab_size}")
    if problems:
        raise ModelOptConfigError(f"The recorded teacher {str(path)!r} does not fit: {'; '.join(problems)}.")


def check_teacher(path: str, teacher_path: str) -> None:
    """Raise an error if a recorded teacher was not recorded from this checkpoint.

    Raises:
        ModelOptConfigError: With the first file that differs.
    """
    recorded, found = read_manifest(path).teacher, checkpoint_digests(teacher_path)
    for name in [*recorded, *found]:
        if recorded.get(name) != found.get(name):
            raise ModelOptConfigError(
                f"{str(path)!r} was not recorded from the teacher {str(teacher_path)!r}: {name} had "
                f"{recorded.get(name, 'no such file')}, now {found.get(name, 'no such file')}. Record "
                "the teacher again."
            )

"""A teacher that is not there: in its place what was recorded of it."""

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
    """Stands for the teacher's output layer, where modelopt captures what the loss compares."""

    def forward(self, logits: Any) -> Any:
        return logits


class RecordedTeacher(MegatronModule):
    """Give the recorded logits of the micro-batch that was shown last; it has no weights and sends nothing."""

    def __init__(self, config: Any, path: str):
        """Open the recording on the last pipeline stage, the only one that needs it.

        Args:
            config: configuration of the teacher.
            path: the recording.
        """
        super().__init__(config=config)
        self._recording = Recording(path) if parallel_state.is_pipeline_last_stage() else None
        self._keys: np.ndarray | None = None
        self.output_layer = _Recorded()

    def see(self, batch: Mapping[str, Any]) -> None:
        """Note which samples the next forward pass is about.

        Args:
            batch: a whole micro-batch, as the data loader gives it.
        """
        if self._recording is not None:
            self._keys = sample_keys(batch)

    def forward(self, *args, **kwargs) -> None:
        """Let the output layer give what was recorded.

        Raises:
            ModelOptConfigError: where a sample was not recorded.
        """
        if self._recording is None:
            return
        assert self._keys is not None, "no batch was shown"
        self.output_layer(self._recording.find(self._keys, torch.cuda.current_device()))


def is_recorded(model: Any) -> bool:
    """Return whether a ``DistillationModel`` has a recording in the place of its teacher."""
    return isinstance(getattr(model, "_teacher_model", None), RecordedTeacher)


def recorded_teacher(config: Any, path: str) -> RecordedTeacher:
    """Return the stand-in for a teacher (top-level, so that it can be pickled)."""
    manifest = read_manifest(path)
    logging.info(
        f"Distillation: no teacher is loaded; {manifest.samples} samples were recorded with its {manifest.topk} "
        "likeliest entries."
    )
    return RecordedTeacher(config, path)


def check_recording(path: str, settings: DistillationConfig, student: Any, vocab_size: int, tokenizer: Any) -> None:
    """Raise where a recording does not fit the settings of a training. Reads the manifest alone.

    Args:
        path: the recording.
        settings: of the distillation.
        student: Megatron-Core configuration of the student.
        vocab_size: its vocabulary, with padding.
        tokenizer: of the student.

    Raises:
        ModelOptConfigError: naming the two values.
    """
    found = read_manifest(path)
    problems = []
    if settings.intermediate_layer_pairs:
        problems.append(
            "intermediate_layer_pairs need the teacher's activations, and only logits were recorded; take them out"
        )
    if settings.logit_layers[1] != _LAYER:
        problems.append(f"the outputs of {_LAYER!r} were recorded, the settings ask for {settings.logit_layers[1]!r}")
    if settings.logit_kl_temperature != found.temperature:
        problems.append(
            f"it was recorded for logit_kl_temperature={found.temperature}, the settings have "
            f"{settings.logit_kl_temperature}"
        )
    if (settings.logit_kl_topk or 0) > found.topk:
        problems.append(f"{found.topk} entries were recorded, logit_kl_topk={settings.logit_kl_topk} asks for more")
    if settings.fused_logits == "on":
        problems.append("fused_logits='on' needs the teacher's output layer; take 'auto'")
    if settings.validation_metrics:
        problems.append("validation_metrics needs the teacher in validation; leave it out")
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
    """Raise where a recording is not of this checkpoint.

    Raises:
        ModelOptConfigError: naming the first file that differs.
    """
    recorded, found = read_manifest(path).teacher, checkpoint_digests(teacher_path)
    for name in [*recorded, *found]:
        if recorded.get(name) != found.get(name):
            raise ModelOptConfigError(
                f"{str(path)!r} was not recorded of the teacher {str(teacher_path)!r}: {name} had "
                f"{recorded.get(name, 'no such file')}, now {found.get(name, 'no such file')}. Record "
                "the teacher again."
            )

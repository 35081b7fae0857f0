"""Check that a model can be trained on packed sequences."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import gpt_layer_specs

from nemo_modelopt_dropin.cpu_backend import state

from ..errors import ModelOptConfigError


def is_packed(data: Any) -> bool:
    """Return whether a data module packs several samples into one sequence, as NeMo's modules for fine-tuning can."""
    size = getattr(data, "packed_sequence_size", None)
    return isinstance(size, int) and size > 0


def check_packed(data: Any, student: Any) -> None:
    """Raise an error if a data module packs samples and a model cannot keep them apart.

    Args:
        data: data module of the training.
        student: Megatron-Core configuration of the student; the teacher runs with the same layers.

    Raises:
        ModelOptConfigError: Before any model is built.
    """
    if not is_packed(data):
        return
    packed = f"The data is packed into sequences of {data.packed_sequence_size} tokens (packed_sequence_size)"
    if getattr(student, "mtp_num_layers", None):
        raise ModelOptConfigError(
            f"{packed}, and the student has {student.mtp_num_layers} multi-token-prediction layers, which do not take "
            "packed sequences: they would predict tokens of the next sample. Use data that is not packed."
        )
    if not gpt_layer_specs.HAVE_TE and not state.is_enabled():
        raise ModelOptConfigError(
            f"{packed}. Only Transformer Engine's attention, which is not installed, keeps the samples apart; "
            "Megatron's local attention raises an error. Install Transformer Engine, use data that is not packed, or "
            "run on CPU ranks (cpu_backend.enable(), --cpu)."
        )

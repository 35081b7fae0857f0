"""Handle multi-token prediction: the student's heads keep their own losses, and the teacher's block does not run.

Megatron computes the language-model loss once for each multi-token-prediction head, and last for the main head. Only
the main head is compared with the teacher.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor

from ._kd_loss import captured_layers


def number_of_heads(model: Any) -> int:
    """Return the number of language-model losses that a forward pass computes before that of the main head."""
    if getattr(model, "mtp_process", False) is not True or not model.post_process:
        return 0
    return model.config.mtp_num_layers


def forget_head(model: Any) -> None:
    """Delete the output of a multi-token-prediction head, which shares the captured output layer with the main head."""
    for layer, _ in captured_layers(model):
        if layer is model.output_layer:
            layer._intermediate_output = None


def skip_block(model: Any) -> None:
    """Leave the multi-token-prediction block out of the forward pass of a model that only predicts the next token.

    Args:
        model: Megatron-Core model with its weights loaded.
    """
    if getattr(model, "mtp_process", False) is not True:
        return
    if model.share_embeddings_and_output_weights and not model.pre_process:
        # Without the block, Megatron would look for the tied weight in the output layer.
        model.shared_embedding_or_output_weight = MethodType(_embedding_weight, model)
    model.mtp_process = False


def _embedding_weight(self) -> Tensor:
    return self.embedding.word_embeddings.weight

"""Decide whether the logits loss is fused with Megatron's output layers, and let these defer their logits."""

from __future__ import annotations

from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.num_microbatches_calculator import get_micro_batch_size
from megatron.core.tensor_parallel import ColumnParallelLinear
from nemo.utils import logging
from torch import Tensor

from nemo_modelopt_dropin.preflight import loss_memory

from ..errors import ModelOptConfigError
from ._deferred_logits import DeferredLogits
from ._state import DistillationState
from .loss import LogitsKLLoss

OFF, ON, AUTO = "off", "on", "auto"
FUSED_LOGITS = (AUTO, ON, OFF)
# Bytes saved that are worth the time of two more matrix products.
_WORTH_IT = 512 << 20
_OUTPUT_LAYERS = ("output_layer", "output_layer")


def why_not_fused(student: Any, teacher: Any, criterion: Any, settings: Any) -> str | None:
    """Return the reason why the logits loss cannot be fused with the output layers of two models, or None.

    Args:
        student: Megatron-Core model on the last pipeline stage.
        teacher: Megatron-Core model.
        criterion: loss of the logits pair.
        settings: a ``DistillationConfig``.
    """
    if not hasattr(teacher, "decoder"):
        return "the teacher is recorded"
    if settings.logit_pair != _OUTPUT_LAYERS:
        return f"logit_layers={settings.logit_layers} are not the output layers"
    if type(criterion) is not LogitsKLLoss:
        return f"the logits loss is a {type(criterion).__name__}"
    if criterion.entries is not None:
        return "the vocabularies of student and teacher are padded differently"
    if getattr(student, "mtp_process", False) or getattr(teacher, "mtp_process", False):
        return "multi-token prediction uses the output layer several times"
    if not settings.skip_lm_loss:
        if (
            getattr(type(student), "compute_language_model_loss", None)
            is not LanguageModule.compute_language_model_loss
        ):
            return "the student has a language-model loss of its own"
        if getattr(student, "fp16_lm_cross_entropy", False):
            return "fp16_lm_cross_entropy is set"
    for whose, model in (("student", student), ("teacher", teacher)):
        reason = _why_not_deferred(getattr(model, "output_layer", None), model)
        if reason:
            return f"the {whose}'s output layer {reason}"
    return None


def _why_not_deferred(layer: Any, model: Any) -> str | None:
    """Return the reason why an output layer is more than a product with a shard of the vocabulary, or None."""
    name = type(layer).__name__
    if type(layer) is not ColumnParallelLinear and name != "Gemma2OutputLayer":
        return f"is a {name} (quantized, adapted or of another implementation)"
    config = layer.config
    if layer.bias is not None or layer.skip_bias_add:
        return "has a bias"
    if layer.gather_output and torch.distributed.get_world_size(layer.tp_group) > 1:
        return "gathers the logits"
    if layer.is_expert or layer.disable_grad_reduce:
        return "has communication of its own"
    if getattr(config, "defer_embedding_wgrad_compute", False):
        return "defers its weight gradient (defer_embedding_wgrad_compute)"
    if getattr(config, "cpu_offloading", False):
        return "offloads activations to the CPU"
    if getattr(model, "share_embeddings_and_output_weights", False) and layer.weight is None and not model.pre_process:
        return "has no weight"
    # modelopt adds one hook.
    if len(layer._forward_hooks) > 1 or layer._backward_hooks:
        return "has hooks that read its logits"
    return None


def settings_for(strategy: Any, settings: Any) -> Any:
    """Return the settings with which a strategy can train: the logits loss is not fused under Megatron-FSDP.

    There the output weights are whole only while their layers run, and the fused loss reads them later.

    Args:
        strategy: the trainer's ``MegatronStrategy``.
        settings: a ``DistillationConfig``; not changed.

    Raises:
        ModelOptConfigError: If the settings demand the fused loss.
    """
    if settings.fused_logits == OFF or not _shards_weights(strategy):
        return settings
    if settings.fused_logits == ON:
        raise ModelOptConfigError(
            "fused_logits='on' is not supported with Megatron-FSDP (fsdp='megatron' of the strategy), which shards the "
            "output weights outside of their layers. Use 'auto' or 'off', or a strategy without fsdp."
        )
    logging.info("Distillation: output layers and logits loss are not fused: Megatron-FSDP shards the output weights.")
    return replace(settings, fused_logits=OFF)


def _shards_weights(strategy: Any) -> bool:
    ddp = getattr(strategy, "ddp_config", None)
    flags = ("use_megatron_fsdp", "use_custom_fsdp")
    return getattr(strategy, "_fsdp", None) is not None or any(getattr(ddp, flag, False) for flag in flags)


def slower_by(settings: Any) -> str | None:
    """Return the reason why the fused loss is slower than the chunked one with these settings, or None."""
    if settings.skip_lm_loss:
        return None
    return "with a language-model loss the logits are computed a second time in the backward pass"


def sample_length(data: Any) -> int | None:
    """Return the number of tokens in a sample of a data module, None if it is unknown."""
    sampler = getattr(data, "data_sampler", None)
    for holder, name in ((sampler, "seq_len"), (data, "seq_length")):
        length = getattr(holder, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def choose_fused(student: Any, teacher: Any, settings: Any) -> bool:
    """Return whether the logits loss is fused, and log the reason.

    Args:
        student: Megatron-Core model on the last pipeline stage.
        teacher: Megatron-Core model.
        settings: a ``DistillationConfig`` that holds its losses.

    Raises:
        ModelOptConfigError: If the settings demand it and it would not be exact.
    """
    if settings.fused_logits == OFF:
        return False
    reason = why_not_fused(student, teacher, settings.criterion.get(settings.logit_pair), settings)
    if reason and settings.fused_logits == ON:
        raise ModelOptConfigError(
            f"fused_logits='on' is not exact for this model: {reason}. Use 'auto', or change the model."
        )
    slower, sizes = slower_by(settings), None if reason else _sizes(student, teacher, settings)
    if not reason and settings.fused_logits == AUTO:
        unknown = "the length of the samples is unknown (seq_length of the student's configuration)"
        reason = unknown if sizes is None else _not_worth_it(sizes, slower)
    if reason:
        logging.info(f"Distillation: output layers and logits loss are not fused: {reason}.")
        return False
    size = f" ({_mebibytes(sizes.logits)} for each model)" if sizes is not None else ""
    logging.info(
        f"Distillation: output layers and logits loss are fused; the logits of a micro-batch{size} are never held"
        + (f"; {slower}." if slower else ".")
    )
    return True


def _not_worth_it(sizes: loss_memory.Sizes, slower: str | None) -> str | None:
    """Return the reason why a fused loss would not pay with these sizes, or None if it would."""
    chunked, fused = sizes.chunked(), sizes.fused()
    if fused >= chunked:
        return (
            f"logits and loss take about {_mebibytes(chunked)} a micro-batch, and would take {_mebibytes(fused)}, "
            "mostly for the output weight's gradient in fp32"
        )
    if slower and chunked - fused < _WORTH_IT:
        return f"{slower}, and only {_mebibytes(chunked - fused)} would be saved"
    return None


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _sizes(student: Any, teacher: Any, settings: Any) -> loss_memory.Sizes | None:
    """Return the sizes that decide the memory of logits and loss on this rank; None if the sample length is unknown."""
    config, layer = student.config, student.output_layer
    try:
        sequences = get_micro_batch_size()
    except AttributeError:  # not set up
        sequences = 1
    # The length of the samples; a model's own is the most that it can process, and some have none.
    length = getattr(settings, "sample_length", None) or getattr(config, "seq_length", None) or 0
    tokens = length * sequences // config.context_parallel_size
    if not tokens:
        return None
    weight = layer.weight if layer.weight is not None else student.shared_embedding_or_output_weight()
    return loss_memory.Sizes(
        tokens,
        layer.output_size_per_partition,
        config.hidden_size,
        teacher.config.hidden_size,
        config.params_dtype.itemsize,
        config.tensor_model_parallel_size,
        weight.device.type,
        not settings.skip_lm_loss,
        weight.requires_grad,
    )


def fuse_output_layers(student: Any, teacher: Any, state: DistillationState) -> bool:
    """Let both output layers return `DeferredLogits` while the state is ``deferring``, if that is exact and pays.

    Otherwise the memory of the teacher's logits is reused if possible.

    Args:
        student: Megatron-Core model; before the last pipeline stage nothing is changed.
        teacher: Megatron-Core model.
        state: state of the distillation; its settings hold their losses.

    Returns:
        Whether the output layers can defer their logits.

    Raises:
        ModelOptConfigError: If the settings demand it and it would not be exact.
    """
    settings = state.settings
    if not isinstance(getattr(settings, "criterion", None), dict) or not settings.criterion:
        return False
    if not getattr(student, "post_process", False):
        return False
    if not choose_fused(student, teacher, settings):
        _reuse_teacher_logits(student, teacher, settings)
        return False
    for layer in (student.output_layer, teacher.output_layer):
        layer._distillation = state
        layer.forward = MethodType(_forward_of_output_layer, layer)
    return True


def _reuse_teacher_logits(student: Any, teacher: Any, settings: Any) -> None:
    """Let the logits loss write its gradient over the teacher's logits if only modelopt's hook reads them."""
    criterion = settings.criterion.get(settings.logit_pair)
    layer = getattr(teacher, "output_layer", None)
    if settings.logit_pair != _OUTPUT_LAYERS or layer is None or type(criterion) is not LogitsKLLoss:
        return
    pairs = [pair for pair in getattr(student, "_layers_to_loss", {}) if pair[1] is layer]
    criterion.reuse_teacher = len(pairs) == 1 and len(layer._forward_hooks) == 1


def _forward_of_output_layer(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output=None):
    if not self._distillation.deferring or runtime_gather_output:
        return type(self).forward(self, input_, weight=weight, runtime_gather_output=runtime_gather_output)
    return DeferredLogits(input_, self.weight if weight is None else weight, self), None

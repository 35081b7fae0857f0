"""Derive the teacher's configuration, align its vocabulary, and load its weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.validation import StrictHandling, parse_strict_flag
from nemo.lightning import get_vocab_size
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from nemo.utils import logging

from nemo_modelopt_dropin.preflight import tokenizer_files
from nemo_modelopt_dropin.preflight.model_sizes import stage_layers

from ..errors import ModelOptConfigError

# Copied from the student, because both share the ranks and the schedule. Pipeline splits are derived below.
_FOLLOWS_STUDENT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "hierarchical_context_parallel_sizes",
    "cp_comm_type",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
    "pipeline_dtype",
    "variable_seq_lengths",
    "params_dtype",
    "bf16",
    "fp16",
    "attention_backend",
    "parallel_output",
    "use_cpu_initialization",
    "calculate_per_token_loss",
)
_SPLIT = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
_LENIENT = (StrictHandling.LOG_UNEXPECTED, StrictHandling.LOG_ALL, StrictHandling.IGNORE_ALL)
# Vocabularies are padded to a multiple of a few hundred entries per tensor-parallel rank.
_MOST_PADDING = 2048
_EXTRA_STATE = "_extra_state"


def derive_teacher_config(student: Any, teacher: Any) -> Any:
    """Return a copy of the teacher's configuration that fits the student's ranks, schedule and precision.

    The teacher runs without gradients, so its recomputation is turned off.

    Args:
        student: Megatron-Core configuration of the student, with its parallel sizes.
        teacher: configuration from the teacher's checkpoint; not changed.

    Raises:
        ModelOptConfigError: If the teacher's layers cannot be split over the student's pipeline stages.
    """
    derived = copy.copy(teacher)
    for name in _FOLLOWS_STUDENT:
        if hasattr(student, name) and hasattr(derived, name):
            setattr(derived, name, getattr(student, name))
    for name, value in _pipeline_split(student, teacher).items():
        if hasattr(derived, name):
            setattr(derived, name, value)
    for name in ("recompute_granularity", "recompute_method", "recompute_num_layers"):
        if hasattr(derived, name):
            setattr(derived, name, None)
    return derived


def _pipeline_split(student: Any, teacher: Any) -> dict[str, Any]:
    """Return the split of the teacher's layers: the student's if both have equally many, otherwise an even one."""
    stages = student.pipeline_model_parallel_size
    if teacher.num_layers == student.num_layers:
        return {name: getattr(student, name, None) for name in _SPLIT}
    even: dict[str, Any] = dict.fromkeys(_SPLIT[:3]) | dict.fromkeys(_SPLIT[3:], False)
    layers = teacher.num_layers
    if layers % stages == 0:
        return even
    if layers < stages:
        raise ModelOptConfigError(
            f"The teacher's {layers} layers cannot be split over pipeline_model_parallel_size={stages} stages; use at "
            f"most {layers}."
        )
    first, last = stage_layers(layers, stages)
    return even | {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}


def padded_vocab_size(config: Any, tokenizer: Any) -> int:
    """Return the rows of a model's embedding: as configured, or the tokenizer's size with padding."""
    if config.vocab_size is not None:
        return config.vocab_size
    return get_vocab_size(config, tokenizer.vocab_size, config.make_vocab_size_divisible_by)


def align_vocabularies(student: Any, teacher: Any, tokenizer: Any) -> int | None:
    """Set the teacher's vocabulary size to the student's if they differ only in padding.

    Megatron then loads the teacher's rows by their position, drops rows that the student lacks, and fills missing ones
    with zeros.

    Args:
        student: configuration of the student.
        teacher: configuration of the teacher, changed in place.
        tokenizer: tokenizer of the student.

    Returns:
        Number of entries that both models have, counted from the first; None if the vocabularies are equal.

    Raises:
        ModelOptConfigError: With both sizes, if they differ in more than padding.
    """
    sizes = padded_vocab_size(student, tokenizer), padded_vocab_size(teacher, tokenizer)
    if sizes[0] == sizes[1]:
        return None
    known = getattr(tokenizer, "vocab_size", None)
    if not isinstance(known, int) or not all(known <= size < known + _MOST_PADDING for size in sizes):
        raise ModelOptConfigError(
            f"Student and teacher have different vocabularies: {sizes[0]} and {sizes[1]} entries, the tokenizer "
            f"{known}. Logits can only be compared over one vocabulary, and these differ in more than padding: use "
            "models with one tokenizer, and set vocab_size to the size in each checkpoint; or set "
            f"{tokenizer_files.ALIGNED}."
        )
    logging.info(
        f"Distillation: the vocabularies of student and teacher are padded to {sizes[0]} and {sizes[1]} entries; the "
        f"first {min(sizes)} are compared."
    )
    teacher.vocab_size = sizes[0]
    return min(sizes)


def is_strict(strict: Any, parse: Callable[[Any], Any] = parse_strict_flag) -> bool | None:
    """Return the strictness for ``load_state_dict``: True, False, or None if none was set.

    Args:
        strict: bool, name or member of ``StrictHandling``, or None.
        parse: Megatron's ``parse_strict_flag``.

    Raises:
        ModelOptConfigError: If the name does not exist.
    """
    if strict is None or isinstance(strict, bool):
        return strict
    try:
        flag = parse(strict)
    except ValueError as error:
        allowed = [member.value for member in StrictHandling]
        raise ModelOptConfigError(
            f"{str(error).rstrip('.')}. ckpt_load_strictness={strict!r} is not supported; allowed: {allowed}."
        ) from error
    return flag in (StrictHandling.ASSUME_OK_UNEXPECTED, StrictHandling.RAISE_UNEXPECTED, StrictHandling.RAISE_ALL)


def has_modelopt_state(ckpt_path: Any) -> bool:
    """Return whether a checkpoint contains a model that Model Optimizer has changed (quantized, pruned)."""
    if not isinstance(ckpt_path, (str, os.PathLike)):
        return False
    return (ckpt_to_weights_subdir(ckpt_path, is_saving=False) / "modelopt_state").exists()


def load_weights(model: Any, state_dict: dict[str, Any], strict: bool | None) -> None:
    """Load weights into the teacher; keys of ``_extra_state`` may be missing, weights only if not strict.

    Args:
        model: Megatron-Core model.
        state_dict: weights by the model's keys.
        strict: the result of `is_strict`. None is NeMo's default, strict for weights.

    Raises:
        ModelOptConfigError: If weights are missing, because they would stay random.
    """
    lenient_extra = (
        strict is True and issubclass(type(model), torch.nn.Module) and _lacks_extra_state(model, state_dict)
    )
    result = model.load_state_dict(state_dict, strict=None if lenient_extra else strict)
    missing = getattr(result, "missing_keys", None)
    unexpected = getattr(result, "unexpected_keys", None)
    if strict is False or not isinstance(missing, list):
        return
    lost = [key for key in missing if not key.endswith(_EXTRA_STATE)]
    extra = [key for key in unexpected or [] if not key.endswith(_EXTRA_STATE)] if strict else []
    if lost or extra:
        raise ModelOptConfigError(
            f"The teacher's checkpoint does not fit its configuration: {len(lost)} weights are missing (first "
            f"{lost[:5]}), {len(extra)} are unknown (first {extra[:5]}). Use the matching checkpoint, or set "
            "strategy.ckpt_load_strictness to False to load only the matching weights."
        )
    if unexpected:
        logging.warning(f"Distillation: the teacher's checkpoint holds unknown weights, first {unexpected[:5]}.")


def may_leave_weights_unset(strict: Any) -> bool:
    """Return whether a load with this strictness may leave weights at their initial values."""
    return is_strict(strict) is False


def _lacks_extra_state(model: torch.nn.Module, state_dict: dict[str, Any]) -> bool:
    expected = model.state_dict(keep_vars=True)
    return any(key.endswith(_EXTRA_STATE) and key not in state_dict for key in expected)

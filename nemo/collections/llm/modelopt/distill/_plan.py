"""Check that a student, a teacher and the settings fit together, and plan how they are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch.strategies import Strategy

from . import utils
from ._aligned import check_aligned, is_aligned, set_vocabulary
from ._config import check_models, read_distillation_config
from ._fusion import settings_for
from ._packed import check_packed
from ._peft import check_adapters
from ._pipeline_checks import refuse_virtual_pipeline
from ._teacher import align_vocabularies, derive_teacher_config, may_leave_weights_unset, padded_vocab_size
from ._tokenizers import check_tokenizers
from .recorded.store import is_recording
from .recorded.teacher import check_recording

_SHARED = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "pipeline_dtype",
)


@dataclass
class Plan:
    """How to build a distillation.

    Attributes:
        teacher_config: Megatron-Core configuration of the teacher, with the student's layout.
        settings: argument of ``load_distillation_config``: the settings if a file was read, else what the user passed.
        recorded: whether the teacher is a recorded teacher.
        entries: number of vocabulary entries that both models have, if their padding differs.
        is_real: whether the trainer is a real one, so that real models are built.
    """

    teacher_config: Any
    settings: Any = None
    recorded: bool = False
    entries: int | None = None
    is_real: bool = False


def make_plan(model: Any) -> Plan:
    """Return the plan for a ``DistillationGPTModel``, after all checks that need no models.

    Raises:
        ModelOptConfigError: If student, teacher and settings do not fit together.
    """
    strategy = getattr(model.trainer, "strategy", None)
    if issubclass(type(strategy), Strategy):
        return _checked(model, strategy)
    for name in _SHARED:
        setattr(model._teacher_config, name, getattr(model.config, name))
    return Plan(model._teacher_config, model._distillation_config_path)


def _checked(model: Any, strategy: Any) -> Plan:
    path = model._distillation_config_path
    # The parser can be replaced.
    found = read_distillation_config(path, utils.yaml.safe_load)
    settings = settings_for(strategy, found)
    refuse_virtual_pipeline(model.config, strategy)
    check_packed(getattr(model.trainer, "datamodule", None), model.config)
    is_default = path is None and settings is found
    plan = Plan(model._teacher_config, None if is_default else settings, is_real=True)
    plan.recorded = is_recording(model._teacher_ckpt_path)
    if is_aligned(settings):
        check_aligned(settings, model, plan.recorded)
        plan.teacher_config = derive_teacher_config(model.config, model._teacher_config)
        set_vocabulary(plan.teacher_config, model._teacher_ckpt_path)
    elif plan.recorded:
        vocab_size = padded_vocab_size(model.config, model.tokenizer)
        check_recording(model._teacher_ckpt_path, settings, model.config, vocab_size, model.tokenizer)
    else:
        plan.teacher_config = derive_teacher_config(model.config, model._teacher_config)
        plan.entries = align_vocabularies(model.config, plan.teacher_config, model.tokenizer)
        if not settings.allow_other_tokenizer:
            check_tokenizers(model._teacher_ckpt_path, model.tokenizer)
    check_models(settings, model.config, plan.teacher_config)
    check_adapters(settings, model.config, plan.teacher_config, model.trainer)
    if not may_leave_weights_unset(getattr(strategy, "ckpt_load_strictness", None)):
        # All weights will be read, and initializing them at random would take as long as reading them.
        plan.teacher_config.perform_initialization = False
    model._teacher_config, model._settings = plan.teacher_config, settings
    return plan

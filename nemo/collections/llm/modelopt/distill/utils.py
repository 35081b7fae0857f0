"""Load a teacher, and adapt Megatron-Core so that a student and a teacher train as one model.

Imports that are not used here are names of the stock module.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import yaml
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.validation import StrictHandling, parse_strict_flag  # noqa: F401
from megatron.core.models.gpt.gpt_model import GPTModel as MCoreGPTModel
from megatron.core.pipeline_parallel.schedules import get_tensor_shapes
from megatron.core.transformer import TransformerLayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from nemo.collections.common.tokenizers.tokenizer_spec import TokenizerSpec
from nemo.utils import logging
from torch import Tensor

import modelopt.torch.opt as mto
from modelopt.torch.distill import DistillationLossBalancer, DistillationModel  # noqa: F401
from nemo import lightning as nl
from nemo.collections import llm
from nemo_modelopt_dropin.preflight.loss_file import LAYER_INDEX

from .._in_place import merge_in_place
from .._saved_keys import drop_missing_extra_state, saved_keys, saved_prefix, strip_module_prefix
from ..errors import ModelOptConfigError
from ..model_utils import restore_modelopt_state
from ._aligned import SortedLogitsLoss, is_aligned
from ._completed import completed
from ._config import (
    INTERMEDIATE_LOSSES,
    DistillationConfig,
    check_models,
    last_stage,
    options_of_logits_loss,
    pairs_of_stages,
    read_distillation_config,
    stage_of_layer,
)
from ._deferred_logits import DeferredLogits
from ._finite import check_weights
from ._fusion import fuse_output_layers
from ._kd_loss import captured_layers, compute_kd_loss, copy_captured, forget_captured_outputs
from ._mtp import forget_head, number_of_heads, skip_block
from ._peft import stay_as_loaded
from ._pipeline_losses import message, set_input_tensor, set_student_input_tensor_shape
from ._router_bias import keep_from_update
from ._state import DistillationState, state_of
from ._teacher import has_modelopt_state, is_strict, load_weights
from .loss import HiddenStateCosineLoss, LogitsAndIntermediatesLossBalancer, LogitsKLLoss, ProjectionLayer
from .recorded.teacher import is_recorded

_LOSS_MODULES = "_loss_modules."

# --- settings --------------------------------------------------------------------------------------------------------


def load_distillation_config(
    config_path: str | None, student_cfg: TransformerConfig, teacher_cfg: TransformerConfig
) -> DistillationConfig:
    """Return the settings with the losses and the balancer built from them.

    Each loss is created on the pipeline stage of its layers. Intermediate layers are assumed to have the models'
    ``hidden_size``.

    Args:
        config_path: YAML file, or a ``DistillationConfig``; None to distill the logits with the defaults.
        student_cfg: Megatron-Core configuration of the student.
        teacher_cfg: Megatron-Core configuration of the teacher.

    Raises:
        ModelOptConfigError: If the settings cannot be read, or do not fit the models.
    """
    if not config_path:
        logging.warning("Distillation config not provided. Using default.")
    cfg = read_distillation_config(config_path or None, yaml.safe_load)
    check_models(cfg, student_cfg, teacher_cfg)
    cfg.criterion = _criterion(cfg, student_cfg, teacher_cfg)
    weights = {} if cfg.loss_weights is None else {"weights": cfg.loss_weights}
    cfg.loss_balancer = LogitsAndIntermediatesLossBalancer(
        kd_loss_scale=cfg.kd_loss_scale, skip_original_loss=cfg.skip_lm_loss, **weights
    )
    return cfg


def _criterion(cfg: DistillationConfig, student_cfg, teacher_cfg) -> dict[tuple[str, str], torch.nn.Module]:
    """Return a loss for each pair of layers of this stage, by their names on the stage.

    The intermediate losses share one projection.
    """
    is_last = student_cfg.pipeline_model_parallel_size == 1 or parallel_state.is_pipeline_last_stage()
    criterion: dict[tuple[str, str], torch.nn.Module] = {}
    pairs: list[Any] = list(cfg.intermediate_layer_pairs)
    if is_last:
        criterion[cfg.logit_pair] = (
            SortedLogitsLoss(student_cfg, cfg.logit_kl_temperature)
            if is_aligned(cfg)
            else LogitsKLLoss(student_cfg, **options_of_logits_loss(cfg))
        )
        pairs = [pair for pair in pairs if stage_of_layer(pair[0], student_cfg) == last_stage(student_cfg)]
    elif pairs:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        pairs = [pair for pair in pairs if stage_of_layer(pair[0], student_cfg) == stage]
    if not pairs and not is_last:
        return criterion
    projection = ProjectionLayer(student_cfg, teacher_cfg)
    for student_layer, teacher_layer, *chosen in pairs:
        # Looked up at call time, because names of this module can be replaced.
        loss = {**INTERMEDIATE_LOSSES, "cosine": HiddenStateCosineLoss}[chosen[0] if chosen else "cosine"]
        pair = (
            _adjust_layer_index_for_pp(student_layer, student_cfg),
            _adjust_layer_index_for_pp(teacher_layer, teacher_cfg),
        )
        criterion[pair] = loss(student_cfg, projection_layer=projection)
        if parallel_state.get_tensor_and_context_parallel_rank() == 0:
            logging.info(
                f"Distillation: {getattr(loss, '__name__', loss)} between {student_layer} of the student (hidden size "
                f"{student_cfg.hidden_size}) and {teacher_layer} of the teacher ({teacher_cfg.hidden_size})"
                + (f", here {pair}." if pair != (student_layer, teacher_layer) else ".")
            )
    return criterion


def _adjust_layer_index_for_pp(submodule_name, model_cfg):
    """Return the name of a layer on this pipeline stage, on which layers are counted from zero.

    Raises:
        ModelOptConfigError: If the layer is on an earlier stage.
    """
    match = LAYER_INDEX.search(submodule_name)
    if not match:
        return submodule_name
    with warnings.catch_warnings():
        # Megatron deprecates it in favour of a function with the same result.
        warnings.simplefilter("ignore")
        first = TransformerLayer._get_layer_offset(model_cfg)
    index = int(match.group()) - first
    if index < 0:
        raise ModelOptConfigError(
            f"Layer {submodule_name} does not fall on final PP rank. It is not on this stage either, which begins at "
            f"layer {first}; choose a layer of this stage."
        )
    return f"{submodule_name[: match.start()]}{index}{submodule_name[match.end() :]}"


# --- teacher ---------------------------------------------------------------------------------------------------------


def teacher_provider(
    config: llm.GPTConfig, ckpt_path: str, tokenizer: TokenizerSpec, trainer: nl.Trainer
) -> MCoreGPTModel:
    """Return the teacher with this rank's shards of its weights loaded (top-level, so that it can be pickled).

    It accepts keys saved with ``module.`` or ``module.module.``, the checkpoint's folder or the ``weights`` folder in
    it, every strictness that NeMo supports, and checkpoints without Transformer Engine's ``_extra_state``.

    Args:
        config: configuration of the teacher, with the parallel sizes of the trainer's strategy.
        ckpt_path: NeMo checkpoint of the teacher.
        tokenizer: sets the size of the vocabulary if the configuration does not.
        trainer: its strategy reads the checkpoint.

    Raises:
        ModelOptConfigError: If the strictness does not exist, or weights are missing or not finite.
    """
    strategy = trainer.strategy
    strict = strategy.ckpt_load_strictness
    strict_flag = is_strict(strict, parse_strict_flag)
    logging.info("Distillation: Loading teacher weights...")
    model = completed(config.configure_model(tokenizer), config)
    if has_modelopt_state(ckpt_path):
        restore_modelopt_state(model, ckpt_path)
        # The quantizers stay; modelopt does not support a model with its own state inside the student.
        mto.ModeloptStateManager.remove_state(model)

    keys = saved_keys(ckpt_path)
    metadata = strategy.unwrapped_checkpoint_io.load_content_metadata(ckpt_path)
    sharded = model.sharded_state_dict(prefix=saved_prefix(keys), metadata=metadata)
    drop_missing_extra_state(sharded, keys)
    merge_in_place(sharded)
    checkpoint = strategy.checkpoint_io.load_checkpoint(ckpt_path, {"state_dict": sharded}, strict=strict)
    weights = {strip_module_prefix(key): value for key, value in checkpoint["state_dict"].items()}
    load_weights(model, weights, strict_flag)
    check_weights(model, ckpt_path)
    keep_from_update(model)

    # The caching allocator keeps the memory that only loading needed until it is emptied.
    del sharded, checkpoint, weights
    torch.cuda.empty_cache()
    logging.info("Distillation: teacher weights loaded.")
    return model


# --- the two models as one -------------------------------------------------------------------------------------------
# Each function below becomes a method of one ``DistillationModel``. modelopt makes its class from the student's, so
# ``type(self)`` has the student's own methods.


def _sharded_state_dict_of_student(self, *args, **kwargs) -> ShardedStateDict:
    """Return the sharded state of the student, without the teacher."""
    with self.hide_teacher_model():
        sharded = type(self).sharded_state_dict(self, *args, **kwargs)
    stage = self._distillation.stage
    if stage is not None and not parallel_state.is_pipeline_last_stage():
        # Each stage has its own projections, but names in checkpoints belong to the whole model.
        for name, value in sharded.items():
            if _LOSS_MODULES in name and hasattr(value, "key"):
                value.key = value.key.replace(_LOSS_MODULES, f"{_LOSS_MODULES}stage_{stage}.", 1)
    return sharded


def _student_lm_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
    """Return the language-model loss [b, s], or zeros in training if the settings skip it.

    The losses of multi-token-prediction heads are never skipped.
    """
    state: DistillationState = self._distillation
    if state.mtp_heads:
        state.mtp_heads -= 1
        forget_head(self)
        return type(self).compute_language_model_loss(self, labels, logits)
    state.labels = labels
    if state.settings.skip_lm_loss and self.training:
        return _no_lm_loss(self, labels, logits)
    if isinstance(logits, DeferredLogits):
        # It is computed with the distillation loss; `compute_kd_loss` replaces these zeros by it.
        logits.labels = labels
        return _no_lm_loss(self, labels, logits)
    compared = getattr(self, "training", False) or _compares_in_validation(state.settings)
    if compared and isinstance(logits, Tensor) and _is_overwritten(getattr(self, "config", None), logits):
        # The distillation loss still needs them.
        copy_captured(self, logits)
    return type(self).compute_language_model_loss(self, labels, logits)


def _is_overwritten(config: Any, logits: Tensor) -> bool:
    """Return whether the cross entropy works in place: Megatron's on fp32 logits, Transformer Engine's on all."""
    fused = getattr(config, "cross_entropy_loss_fusion", False) is True
    return logits.dtype == torch.float32 or (fused and getattr(config, "cross_entropy_fusion_impl", "") == "te")


def _compares_in_validation(settings: Any) -> bool:
    """Return whether the teacher runs in validation as well; a stand-in for the settings lacks the field."""
    return getattr(settings, "validation_metrics", False) is True


def _no_lm_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
    """Return zeros [b, s] instead of a language-model loss that is not used."""
    return torch.zeros_like(labels, dtype=logits.dtype)


def _forward_student_and_teacher(self, *args, **kwargs) -> Tensor:
    """Run both models in training, and in validation if it compares them; otherwise only the student.

    Returns:
        The student's output; before the last pipeline stage, both outputs concatenated along the last axis.
    """
    state: DistillationState = self._distillation
    state.mtp_heads = number_of_heads(self)
    if not self.training:
        compared = _compares_in_validation(state.settings) and kwargs.get("labels") is not None
        if compared:
            with torch.no_grad():
                self._teacher_model(*args, **kwargs)
        with self.only_student_forward():
            output = type(self).forward(self, *args, **kwargs)
        if not compared:
            forget_captured_outputs(self)
        return output

    first_step = state.fused is None
    if first_step:
        # Not earlier: a checkpoint's quantizers are restored after the model is built.
        state.fused = fuse_output_layers(self, self._teacher_model, state)
    try:
        # Without labels, the caller asks for logits.
        state.deferring = bool(state.fused) and kwargs.get("labels") is not None
        with torch.no_grad():
            # `train()` on the model sets the teacher's mode as well. To set it walks through all modules.
            if getattr(self._teacher_model, "training", True):
                self._teacher_model.eval()
            if state.teacher_inputs is None:
                teacher_output = self._teacher_model(*args, **kwargs)
            else:  # it has another tokenizer
                names = ("input_ids", "position_ids", "attention_mask")
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                teacher_output = self._teacher_model(**{**given, **state.teacher_inputs})
        if first_step:
            state.finite.see_layers(teacher for _, teacher in captured_layers(self))
        with self.only_student_forward():
            student_output = type(self).forward(self, *args, **kwargs)
    finally:
        state.deferring = False
    if parallel_state.is_pipeline_last_stage() or is_recorded(self):
        return student_output
    return message(self, student_output, teacher_output)


def adjust_distillation_model_for_mcore(model: DistillationModel, distill_cfg: DistillationConfig):
    """Adapt a ``DistillationModel`` to Megatron-Core, in place.

    It removes the model's modelopt state (the losses hold a configuration that cannot be pickled), limits checkpoints
    to the student, skips language-model losses that are not used, and lets student and teacher share pipeline
    messages. What it stores between calls is the model's `DistillationState`.

    Args:
        model: result of ``mtd.convert``.
        distill_cfg: settings of the distillation.

    Raises:
        ModelOptConfigError: If the model has a modelopt state other than that of distillation.
    """
    state = mto.ModeloptStateManager(model).state_dict()
    modes = [entry[0] for entry in state]
    if modes != ["kd_loss"]:
        raise ModelOptConfigError(
            f"existing_state={state}. The model's modelopt modes are {modes}, expected ['kd_loss'] alone. "
            "Distill a student that is not quantized, pruned or sparsified in the same process."
        )
    mto.ModeloptStateManager.remove_state(model)

    model._tensor_split_idx = None
    model._distillation = _initial_state(model, distill_cfg)
    methods: dict[str, Callable[..., Any]] = {
        "sharded_state_dict": _sharded_state_dict_of_student,
        "compute_language_model_loss": _student_lm_loss,
        "set_student_input_tensor_shape": set_student_input_tensor_shape,
        "set_input_tensor": set_input_tensor,
        "forward": _forward_student_and_teacher,
        "compute_kd_loss": compute_kd_loss,
    }
    for name, function in methods.items():
        setattr(model, name, MethodType(function, model))
    teacher = model.teacher_model
    teacher.compute_language_model_loss = MethodType(_no_lm_loss, teacher)
    teacher.map = MethodType(stay_as_loaded, teacher)
    skip_block(teacher)


def _initial_state(model: Any, distill_cfg: Any) -> DistillationState:
    """Return the state at the beginning of a distillation; a stand-in for the settings may lack layer pairs."""
    pairs = getattr(distill_cfg, "intermediate_layer_pairs", None)
    pairs = pairs if isinstance(pairs, (list, tuple)) else []
    if not pairs or getattr(getattr(model, "config", None), "pipeline_model_parallel_size", 1) <= 1:
        return DistillationState(distill_cfg, pair_stages=[0] * len(pairs))
    return DistillationState(
        distill_cfg,
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        pair_stages=[stage_of_layer(pair[0], model.config) for pair in pairs],
        early_pairs=pairs_of_stages(distill_cfg, model.config),
    )


# --- pipeline messages -----------------------------------------------------------------------------------------------


def get_tensor_shapes_adjust_fn_for_distillation(
    model: torch.nn.Module | list[torch.nn.Module],
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None = None,
    forward_only: bool = False,
) -> Callable | None:
    """Return a function that widens Megatron's pipeline messages to hold the outputs of student and teacher.

    Args:
        model: model chunk, or a list of one, wrapped or not.
        seq_length: tokens of a sequence.
        micro_batch_size: sequences of a micro-batch.
        decoder_seq_length: tokens of the decoder's sequence if that differs.
        forward_only: not a training step, so only the student runs.

    Returns:
        Function of the shapes to receive and to send, [(s, b, h), ...] each, that adds the teacher's h to them and
        returns both. None if messages keep their shape: without a pipeline, with an interleaved one, in a forward pass
        only, and for a model without a teacher or with a recorded teacher.
    """
    if forward_only or parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return None
    if parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None:
        return None
    unwrapped: Any = model[0] if isinstance(model, list) else model
    while hasattr(unwrapped, "module"):
        unwrapped = unwrapped.module
    if not isinstance(unwrapped, DistillationModel) or is_recorded(unwrapped):
        return None

    def adjust_tensor_shapes(recv_tensor_shapes: list[tuple[int, ...]], send_tensor_shapes: list[tuple[int, ...]]):
        """Widen both lists in place and return them."""
        arguments = {
            "seq_length": seq_length,
            "micro_batch_size": micro_batch_size,
            "decoder_seq_length": decoder_seq_length,
            "config": get_model_config(unwrapped.teacher_model),
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
            "cp_group": parallel_state.get_context_parallel_group(),
        }
        widths = [get_tensor_shapes(**arguments)[0][-1] for _ in ("received", "sent")]
        unwrapped.set_student_input_tensor_shape(recv_tensor_shapes)
        more = len(state_of(unwrapped).early_pairs)
        for shapes, width in zip((recv_tensor_shapes, send_tensor_shapes), widths, strict=True):
            for place, shape in enumerate(shapes):
                *others, hidden = shape
                shapes[place] = (*others, hidden + width + more)
        return recv_tensor_shapes, send_tensor_shapes

    return adjust_tensor_shapes

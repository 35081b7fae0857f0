"""Restore NeMo models in the form that Model Optimizer can convert, and keep its state in NeMo checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union  # noqa: F401

import lightning.pytorch as L
import lightning.pytorch as pl
import torch
import torch.nn as nn
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from megatron.core.dist_checkpointing.validation import StrictHandling
from nemo.collections.llm.inference.base import _setup_trainer_and_restore_model
from nemo.lightning.ckpt_utils import ckpt_to_context_subdir
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from nemo.lightning.megatron_parallel import MegatronParallel
from nemo.utils import logging
from nemo.utils.import_utils import safe_import
from nemo.utils.model_utils import unwrap_model

import modelopt.torch.opt as mto
from nemo import lightning as nl
from nemo.collections import llm
from nemo_modelopt_dropin import moved

from . import _functions, _output_layer, _real, _saved_keys
from .errors import ModelOptConfigError, one_of

_, HAVE_TE = safe_import("transformer_engine")
_, HAVE_MAMBA_SSM = safe_import("mamba_ssm")
_, HAVE_CAUSAL_CONV1D = safe_import("causal_conv1d")

# Both modules import Transformer Engine at their top: without it the names exist, and are None.
if HAVE_TE:
    from megatron.core.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec
else:
    get_gpt_modelopt_spec: Any = None  # type: ignore[no-redef]
if HAVE_TE and HAVE_MAMBA_SSM and HAVE_CAUSAL_CONV1D:
    from megatron.core.post_training.modelopt.mamba.model_specs import get_mamba_stack_modelopt_spec
else:
    get_mamba_stack_modelopt_spec: Any = None  # type: ignore[no-redef]


__all__ = ["set_modelopt_spec_if_exists_in_ckpt", "setup_trainer_and_restore_model_with_modelopt_spec"]

# Specs of NeMo and Megatron that describe an ordinary GPT stack: Model Optimizer's spec builds the same network out of
# layers it can convert. Any other spec changes the network itself, and is kept.
_ORDINARY_SPECS = frozenset(
    {
        "default_layer_spec",
        "transformer_engine_layer_spec",
        "transformer_engine_full_layer_spec",
        "get_gpt_decoder_block_spec",
        "get_llama4_layer_spec",
        "get_gpt_modelopt_spec",
    }
)
_TE_ONLY_SPECS = frozenset({"transformer_engine_layer_spec", "transformer_engine_full_layer_spec"})
_PRECISIONS = ("bf16", "bf16-mixed", "16", "16-mixed", "32")


def _spec_name(spec: Any) -> str:
    """Return the name of a layer spec's function, through ``functools.partial``; of an object, that of its class."""
    while isinstance(spec, partial):
        spec = spec.func
    return getattr(spec, "__name__", type(spec).__name__)


def _is_upstream(spec: Any) -> bool:
    """Return whether a layer spec's function comes from NeMo or Megatron and not from the user."""
    while isinstance(spec, partial):
        spec = spec.func
    return str(getattr(spec, "__module__", "")).split(".")[0] in {"nemo", "megatron"}


def _set_gpt_modelopt_spec(config: llm.GPTConfig) -> None:
    """Choose the layer spec of a GPT configuration, see `_set_gpt_mamba_modelopt_spec`."""
    current = config.transformer_layer_spec
    name = _spec_name(current)
    is_stand_in = not issubclass(type(config), llm.GPTConfig)
    if not is_stand_in and not (name in _ORDINARY_SPECS and _is_upstream(current)):
        logging.info(f"Keeping the model's own layer spec ({name})")
        return
    if get_gpt_modelopt_spec is None:
        if name in _TE_ONLY_SPECS:
            from nemo.collections.llm.gpt.model.base import local_layer_spec

            config.transformer_layer_spec = local_layer_spec
        logging.info(f"Transformer Engine is not installed: using {_spec_name(config.transformer_layer_spec)}")
        return
    logging.info("Setting model layer specification to the modelopt layer spec")
    config.transformer_layer_spec = partial(
        get_gpt_modelopt_spec,
        remap_te_layernorm=True,
        # Only Megatron's own attention implements a softmax offset (attention sinks).
        local_core_attention=getattr(config, "softmax_type", "vanilla") != "vanilla",
    )


def _set_gpt_mamba_modelopt_spec(
    model_cfg: llm.GPTConfig | llm.SSMConfig,
) -> llm.GPTConfig | llm.SSMConfig:
    """Set the layer spec that Model Optimizer converts, unless the model has a spec of its own.

    Transformer Engine fuses the norm into the linear layers; Model Optimizer's spec keeps them apart and maps the
    names in the checkpoint. Where Transformer Engine is missing, the local layers are of the same form and stay.

    Args:
        model_cfg: Configuration of a GPT or Mamba model, changed in place.

    Returns:
        The same configuration.

    Raises:
        ModelOptConfigError: For a configuration of another kind, or a Mamba model whose packages are missing.
    """
    if isinstance(model_cfg, llm.GPTConfig):
        _set_gpt_modelopt_spec(model_cfg)
        return model_cfg
    if not isinstance(model_cfg, llm.SSMConfig):
        raise ModelOptConfigError(
            f"No modelopt layer spec supported for config type {type(model_cfg)}; supported: GPTConfig and SSMConfig."
        )
    if get_mamba_stack_modelopt_spec is None:
        raise ModelOptConfigError(
            "A Mamba model needs the packages transformer_engine, mamba_ssm and causal_conv1d; "
            f"importable here: {HAVE_TE}, {HAVE_MAMBA_SSM}, {HAVE_CAUSAL_CONV1D}."
        )
    logging.info("Setting model layer specification to the modelopt layer spec")
    model_cfg.mamba_stack_spec = partial(get_mamba_stack_modelopt_spec, remap_te_layernorm=True)
    return model_cfg


def set_modelopt_spec_if_exists_in_ckpt(model: L.LightningModule, path: str) -> None:
    """Set the convertible layer spec on a model whose checkpoint holds Model Optimizer state.

    Args:
        model: An ``llm.GPTModel`` or ``llm.MambaModel`` that is not configured yet; one that is, is left alone.
        path: The checkpoint, with or without the prefix ``nemo://``.
    """
    weights = ckpt_to_weights_subdir(str(path).removeprefix("nemo://"), is_saving=False)
    if hasattr(model, "module") or not (weights / "modelopt_state").exists():
        return
    if not isinstance(model, (llm.GPTModel, llm.MambaModel)):
        logging.warning(f"{type(model)} is neither a GPTModel nor MambaModel. Modelopt state will not be loaded.")
        return
    _set_gpt_mamba_modelopt_spec(model.config)
    # The fused kernel writes weight gradients past the weight quantizer: wrong for quantization-aware training.
    model.config.gradient_accumulation_fusion = False


def _default_device() -> tuple[str, str]:
    """Return the accelerator and the precision: the GPU in bf16, or the CPU in fp32 if the CPU backend is enabled."""
    from nemo_modelopt_dropin import cpu_backend

    if not torch.cuda.is_available() and cpu_backend.is_enabled():
        return "cpu", "32"
    return "gpu", "bf16-mixed"


def _params_dtype(precision: str) -> torch.dtype:
    return {"bf": torch.bfloat16, "16": torch.float16, "32": torch.float32}[precision[:2]]


def _strategy_settings(layout: dict, dtype: torch.dtype, inference_only: bool, legacy_ckpt: bool) -> dict:
    """Return the arguments of the strategy; for inference no optimizer is built or read."""
    settings = {
        **layout,
        "pipeline_dtype": dtype,
        "ckpt_load_strictness": StrictHandling.LOG_ALL if legacy_ckpt else None,
    }
    if inference_only:
        # "pytorch" keeps NeMo from wrapping the model in Megatron's DDP, which allocates gradient buffers.
        settings.update(
            ckpt_load_optimizer=False, ckpt_parallel_save_optim=False, setup_optimizers=False, ddp="pytorch"
        )
    return settings


def _override_config(config: Any, overrides: dict) -> None:
    for name, value in overrides.items():
        logging.info(f"Overriding model.config.{name} to {value}")
        setattr(config, name, value)


def _load_tokenizer(path: str | None) -> Any:
    """Return the tokenizer to use in place of the checkpoint's, or None."""
    if not path:
        return None
    return moved.find("get_tokenizer")(path)


def setup_trainer_and_restore_model_with_modelopt_spec(
    model_path: str,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    num_layers_in_first_pipeline_stage: int | None = None,
    num_layers_in_last_pipeline_stage: int | None = None,
    expert_model_parallel_size: int = 1,
    devices: int = 1,
    num_nodes: int = 1,
    inference_only: bool = True,
    tokenizer_path: str | None = None,
    legacy_ckpt: bool = False,
    strategy_kwargs: dict | None = None,
    trainer_kwargs: dict | None = None,
    model_config_overrides: dict | None = None,
    *,
    precision: str | None = None,
) -> tuple[llm.GPTModel | llm.MambaModel, nl.Trainer]:
    """Build a trainer and restore a NeMo 2 checkpoint into layers that Model Optimizer can convert.

    Args:
        model_path: The NeMo checkpoint.
        tensor_model_parallel_size: Tensor parallel size.
        pipeline_model_parallel_size: Pipeline parallel size.
        num_layers_in_first_pipeline_stage: Layers of the first stage, where stages are unequal.
        num_layers_in_last_pipeline_stage: Layers of the last stage, where stages are unequal.
        expert_model_parallel_size: Expert parallel size.
        devices: Devices of each node.
        num_nodes: Number of nodes.
        inference_only: Do not set up an optimizer.
        tokenizer_path: Tokenizer to use in place of the checkpoint's.
        legacy_ckpt: Load a checkpoint of an older Transformer Engine: missing and unexpected keys are logged only.
        strategy_kwargs: Further arguments of ``nl.MegatronStrategy``.
        trainer_kwargs: Further arguments of ``nl.Trainer``; they win over those chosen here.
        model_config_overrides: Attributes to set on the model's configuration.
        precision: "bf16-mixed", "16-mixed" or "32"; by default bf16 on a GPU and 32 on the CPU backend.

    Returns:
        The restored model and its trainer.

    Raises:
        ModelOptConfigError: If the precision is not supported, or the model is neither a GPT nor a Mamba model.
    """
    accelerator, default_precision = _default_device()
    precision = str(precision or default_precision)
    one_of("precision", precision, _PRECISIONS)
    dtype = _params_dtype(precision)
    logging.info(f"Loading model from {model_path} with modelopt layer spec...")
    layout = {
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": pipeline_model_parallel_size,
        "expert_model_parallel_size": expert_model_parallel_size,
    }
    ends = {"first": num_layers_in_first_pipeline_stage, "last": num_layers_in_last_pipeline_stage}
    stages = {f"num_layers_in_{end}_pipeline_stage": layers for end, layers in ends.items() if layers}
    # The strategy needs them too: it writes its own layout, and None for what was not passed to it, over the model's.
    layout |= stages
    strategy = nl.MegatronStrategy(
        **{**_strategy_settings(layout, dtype, inference_only, legacy_ckpt), **(strategy_kwargs or {})}
    )
    settings = {
        "devices": devices,
        "num_nodes": num_nodes,
        "accelerator": accelerator,
        "strategy": strategy,
        "plugins": nl.MegatronMixedPrecision(
            precision=precision, params_dtype=dtype, autocast_enabled=False, grad_reduce_in_fp32=True
        ),
    }
    trainer = nl.Trainer(**{**settings, **(trainer_kwargs or {})})

    model = nl.io.load_context(path=ckpt_to_context_subdir(model_path), subpath="model")
    _set_gpt_mamba_modelopt_spec(model.config)
    _override_config(model.config, {**(model_config_overrides or {}), **stages})
    if inference_only:
        del model.optim

    _setup_trainer_and_restore_model(model_path, trainer, model, _load_tokenizer(tokenizer_path))
    # A later trainer.fit would otherwise load the weights a second time, over the converted model.
    trainer.strategy.restore_config = None
    logging.info(f"Restored {type(model).__name__}:\n{model}")
    return model, trainer


def _hidden_teacher(core_model: nn.Module):
    """Return a context in which a distillation model shows its student only; for other models, an empty one."""
    hide = getattr(core_model, "hide_teacher_model", None)
    return hide() if hide is not None else nullcontext()


def _make_finite(core_model: nn.Module) -> None:
    """Replace uninitialised weights by zeros: exporters build models without initialising them.

    Restoring calibrates weight quantizers on the weights as they are, and raises an error for NaN; the checkpoint's
    weights and scales come afterwards.
    """
    if not isinstance(core_model, nn.Module):
        return
    with torch.no_grad():
        for parameter in core_model.parameters():
            if not parameter.is_meta and parameter.is_floating_point():
                parameter.nan_to_num_(0.0, 0.0, 0.0)


def restore_modelopt_state(
    model: nn.Module, path: str | None = None, trainer: pl.Trainer | None = None
) -> None | Callable:
    """Convert a model to the form its checkpoint has (quantizers, pruned sizes ...), before weights are loaded.

    NeMo's strategy calls it before every load. It then finds the weights under whatever prefix they were saved, and
    needs no ``_extra_state`` of Transformer Engine that the checkpoint lacks.

    Args:
        model: The model, wrapped or not.
        path: The checkpoint; by default the one the trainer restores or resumes from.
        trainer: Where to find the checkpoint when ``path`` is not given.

    Returns:
        For a distillation model, the context manager that hides its loss modules; else None.
    """
    if not path and trainer is not None:
        path = getattr(trainer.strategy.restore_config, "path", trainer.ckpt_path)
    if not path:
        return None

    core_model = unwrap_model(model)
    if isinstance(model, MegatronParallel):
        _saved_keys.adapt_next_load(model.trainer.strategy, core_model)
    if mto.ModeloptStateManager.is_converted(core_model):
        logging.info("Model Optimizer state already restored from checkpoint. Skipping.")
        return None

    from nemo.collections.llm.modelopt.quantization.insert import gated_amax, kv_cache, other_versions, row_blocks

    weights = ckpt_to_weights_subdir(path, is_saving=False)
    _functions.always_put_back()
    _make_finite(core_model)
    # The teacher of a distillation model stays in full precision: only the student is converted.
    support = kv_cache.support_for(weights) if _real.holds_core(core_model) else nullcontext()
    other_version = other_versions.restored(Path(weights))
    with _hidden_teacher(core_model), _output_layer.restored_unquantized(), support, other_version:
        mto.plugins.restore_sharded_modelopt_state([core_model], weights, prefix="module.")
    row_blocks.check_restorable(core_model, weights)
    gated_amax.mend(core_model)
    if mto.ModeloptStateManager.is_converted(core_model):
        logging.info("Restored Model Optimizer state from checkpoint.")
    # A checkpoint of the plain student has no projections of the distillation losses.
    return getattr(core_model, "hide_loss_modules", None)


def save_modelopt_state(model: MegatronParallel, path: str, checkpoint_io: CheckpointIO) -> None:
    """Write a converted model's Model Optimizer state next to its weights; a plain model writes nothing.

    Args:
        model: The model that the strategy saves.
        path: The checkpoint.
        checkpoint_io: The strategy's checkpoint IO.
    """
    core_model = unwrap_model(model)
    if not mto.ModeloptStateManager.is_converted(core_model):
        return
    writer = checkpoint_io
    if isinstance(checkpoint_io, _WrappingCheckpointIO):
        writer = checkpoint_io.checkpoint_io
    if getattr(writer, "async_save", False):
        # The state is written into the same folder, which the asynchronous writer must have finished with.
        logging.warning("Model-Optimizer library in use. Async checkpoint saving is blocked.")
        checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)
    with _hidden_teacher(core_model):
        mto.plugins.save_sharded_modelopt_state(
            [core_model],
            ckpt_to_weights_subdir(path, is_saving=True),
            sharded_strategy=writer.save_sharded_strategy,
        )
    logging.info("Saved Model-Optimizer state into checkpoint.")

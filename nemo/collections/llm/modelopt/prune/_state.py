"""What a pruning run puts back: random states, train/eval modes, trainer limits, parameter attributes, wrappers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import ModelOptConfigError
from . import _hybrid, _layer_kinds
from ._checks import MOE_SIZES

_TRAINER_LIMITS = (
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "num_sanity_val_steps",
    "val_check_interval",
    "check_val_every_n_epoch",
    "max_steps",
    "max_epochs",
)
# Megatron marks its parameters for the optimizer, the gradient reductions and checkpoints.
_PARAMETER_MARKS = (
    "tensor_model_parallel",
    "partition_dim",
    "partition_stride",
    "allreduce",
    "sequence_parallel",
    "shared",
    "shared_embedding",
    "is_embedding_or_output_parameter",
)


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Put back the random states of Python, NumPy, torch and Megatron's tracker on leaving, also after an error."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    tracker = get_cuda_rng_tracker()
    tracked = tracker.get_states() if tracker.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)
        if tracked is not None:
            tracker.set_states(tracked)


@contextlib.contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Put back each module's train or eval mode on leaving, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def kept_trainer(trainer: Any) -> Iterator[None]:
    """Put back the trainer's limits and list of callbacks on leaving, also after an error.

    NeMo adds its telemetry callback with every ``llm.train`` or ``llm.validate``, and fails when it is there twice:
    it is taken out meanwhile, so that a trainer that has run before can measure.
    """
    limits = {name: getattr(trainer, name) for name in _TRAINER_LIMITS if name in vars(trainer)}
    callbacks = list(trainer.callbacks) if isinstance(getattr(trainer, "callbacks", None), list) else None
    if callbacks is not None:
        telemetry = _telemetry_callbacks()
        trainer.callbacks = [callback for callback in callbacks if all(callback is not other for other in telemetry)]
    try:
        yield
    finally:
        for name, value in limits.items():
            setattr(trainer, name, value)
        if callbacks is not None:
            trainer.callbacks = callbacks


def _telemetry_callbacks() -> list[Any]:
    """Return the callbacks that NeMo adds by itself (none before NeMo 2.6)."""
    try:
        from nemo.lightning.callback_group import CallbackGroup
    except ImportError:
        return []
    return list(CallbackGroup.get_instance().callbacks)


@contextlib.contextmanager
def kept_parameter_marks(core: nn.Module) -> Iterator[None]:
    """Carry Megatron's marks and ``requires_grad`` over to the smaller parameters that replace the old ones."""
    marks = {}
    for module in core.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kept = {mark: getattr(parameter, mark) for mark in _PARAMETER_MARKS if hasattr(parameter, mark)}
            marks[module, name] = (parameter.requires_grad, kept)
    try:
        yield
    finally:
        for (module, name), (requires_grad, kept) in marks.items():
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(requires_grad)
                for mark, value in kept.items():
                    setattr(parameter, mark, value)


@contextlib.contextmanager
def kept(model: nn.Module, core: nn.Module, trainer: Any) -> Iterator[None]:
    """Put back random states, modes, the trainer's settings and the parameters' marks on leaving.

    Args:
        model: NeMo's model.
        core: the Megatron-Core model inside.
        trainer: None where layers are dropped without one.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_random_state())
        stack.enter_context(kept_modes(model))
        stack.enter_context(kept_parameter_marks(core))
        if trainer is not None:
            stack.enter_context(kept_trainer(trainer))
        yield


@contextlib.contextmanager
def stays_configured(model: Any) -> Iterator[None]:
    """Let ``configure_model`` do nothing inside, which validation calls on a model that is built.

    NeMo's Gemma would extend its embedding a second time, and fails.
    """
    if not isinstance(model, nn.Module) or "configure_model" in vars(model) or not hasattr(model, "module"):
        yield
        return
    model.configure_model = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.configure_model


def find_core(model: nn.Module) -> nn.Module:
    """Return the Megatron-Core language model inside NeMo's and DDP's wrappers.

    Raises:
        ModelOptConfigError: if there is none.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.mamba import MambaModel

    core = next((module for module in model.modules() if isinstance(module, GPTModel | MambaModel)), None)
    if core is None:
        raise ModelOptConfigError(
            f"{type(model).__name__} holds no Megatron GPT or Mamba model to prune; restore or train it first "
            "(an llm.GPTModel has no weights until then)."
        )
    return core


def unwrap_data_parallel(model: nn.Module) -> None:
    """Remove Megatron's DDP wrapper, whose buffers hold the old parameters; the next ``fit`` wraps the model again."""
    from megatron.core.distributed import DistributedDataParallel

    holder = model
    while isinstance(inner := getattr(holder, "module", None), nn.Module):
        if isinstance(inner, DistributedDataParallel):
            if getattr(inner, "remove_forward_pre_hook_handles", None):
                inner.disable_forward_pre_hook(param_sync=False)
            holder.module = inner.module
        else:
            holder = inner


def write_sizes(saved: Any, live: Any, names: Iterable[str]) -> None:
    """Write a pruned model's sizes into the configuration that its checkpoint's context will hold.

    Args:
        saved: the recorded configuration.
        live: the model's ``TransformerConfig``.
        names: the prunable sizes.
    """
    layers_before = getattr(saved, "num_layers", None)
    for name in (*names, "kv_channels"):
        if hasattr(live, name) or name not in MOE_SIZES:
            setattr(saved, name, getattr(live, name))
    if isinstance(getattr(live, _hybrid.PATTERN, None), str):
        for name in (_hybrid.PATTERN, *(name for name in _hybrid.RATIOS if hasattr(live, name))):
            setattr(saved, name, getattr(live, name))
    if isinstance(frequency := getattr(live, "moe_layer_freq", None), list):
        saved.moe_layer_freq = frequency
    _layer_kinds.write(saved, live)
    if layers_before != live.num_layers:
        # Splits over pipeline stages that were chosen for the old number of layers.
        for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
            if isinstance(getattr(saved, name, None), int):
                setattr(saved, name, None)

"""Check a training step before Megatron updates the weights: losses and gradients must be finite on every rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from ._finite import FiniteFlags, raise_on_all_ranks
from ._state import state_of

_CHECKED = "_distillation_checks_updates"


def check_updates(config: Any, wrapped: nn.Module, core: nn.Module) -> None:
    """Have Megatron's schedules check each step when they finalize its gradients; later calls do nothing.

    Every rank finalizes its gradients once in a step, after the last micro-batch, so all can agree and raise together.
    Megatron's own check (``check_for_nan_in_grad``) raises on the rank that finds NaN, before a collective in which the
    others then wait; the gradients are checked here instead, after that collective has brought NaN to all of them.

    Args:
        config: configuration whose ``finalize_model_grads_func`` the schedules call.
        wrapped: the model as Megatron's data parallelism wraps it.
        core: the distillation model inside.
    """
    finalize = getattr(config, "finalize_model_grads_func", None)
    if not isinstance(config, TransformerConfig) or getattr(finalize, _CHECKED, False):
        return
    checks_gradients = _take_over(wrapped)

    def finalize_and_check(*args: Any, **kwargs: Any) -> None:
        if finalize is not None:
            finalize(*args, **kwargs)
        state = state_of(core)
        flags, state.finite = state.finite, FiniteFlags()
        raise_on_all_ranks(flags, _gradients(wrapped) if checks_gradients else [], state.step)

    setattr(finalize_and_check, _CHECKED, True)
    config.finalize_model_grads_func = finalize_and_check


def _take_over(wrapped: nn.Module) -> bool:
    """Turn off Megatron's check of gradients, and return whether it was on."""
    if not isinstance(wrapped, DistributedDataParallel) or not wrapped.ddp_config.check_for_nan_in_grad:
        return False
    # Copies: the trainer's settings, which checkpoints store, stay as they are.
    for group in [*wrapped.bucket_groups, *wrapped.expert_parallel_bucket_groups]:
        group.ddp_config = replace(group.ddp_config, check_for_nan_in_grad=False)
    return True


def _gradients(wrapped: Any) -> list[Tensor]:
    return [buffer.grad_data for buffer in [*wrapped.buffers, *wrapped.expert_parallel_buffers]]

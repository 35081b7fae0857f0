"""The losses of a micro-batch, from what was captured of both models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modelopt.torch.distill.loss_balancers import STUDENT_LOSS_KEY

from ._deferred_logits import DeferredLogits, SummedLoss
from ._metrics import observed
from ._pipeline_losses import losses_of_stages

# Names of parts of the loss in the order of the settings' layer pairs.
PAIR = "pair_{}"


def compute_kd_loss(self, student_loss: Tensor | None = None, loss_reduction_fn=None, **kwargs):
    """Return modelopt's total of the losses, with those of earlier pipeline stages.

    The language-model loss is the fused pass's where that computes it.

    Returns:
        What the loss balancer returns. Where that is a dictionary, it also holds the losses of the single layer pairs
        (`PAIR`), and in steps that are watched, or with fused logits, ``top1_agreement``; in steps that are watched
        ``teacher_lm_loss``; with fused logits ``lm_loss``.
    """
    student, teacher = _captured_logits(self), _captured_logits(self.teacher_model)
    watched = _watched(self, student, teacher) if self._distillation.observing else {}
    pair = None
    if isinstance(student, DeferredLogits) and isinstance(teacher, DeferredLogits):
        pair = _logits_loss(self).pair(student, teacher)
        if student.labels is not None:
            student_loss = loss_reduction_fn(SummedLoss(pair, "lm"))
    of_stages = losses_of_stages(self, loss_reduction_fn)
    if self.loss_balancer is None or kwargs.get("skip_balancer"):
        return type(self).compute_kd_loss(self, student_loss, loss_reduction_fn, **kwargs)
    each = type(self).compute_kd_loss(self, student_loss, loss_reduction_fn, **{**kwargs, "skip_balancer": True})
    losses = self.loss_balancer({**each, **of_stages})
    if not isinstance(losses, dict):
        return losses
    losses |= _single_pairs(self, each, of_stages)
    losses |= {name: loss_reduction_fn((value, False, False)).detach() for name, value in watched.items()}
    if pair is not None:
        losses["top1_agreement"] = loss_reduction_fn(SummedLoss(pair, "agreement"))
        if student_loss is not None:
            losses["lm_loss"] = student_loss.detach()
    return losses


def _watched(self, student: Any, teacher: Any) -> dict[str, Tensor]:
    """Return what is worth watching of both models' logits, [b, s] each; nothing where they were not captured."""
    if student is None or teacher is None:
        return {}
    # The fused pass counts the agreement by itself.
    own = None if isinstance(student, DeferredLogits) else student
    return observed(own, teacher, self._distillation.labels, _logits_loss(self).entries)


def _single_pairs(self, each: Mapping[str, Tensor], of_stages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the loss of each layer pair by its place in the settings."""
    logits = list(self._layers_to_loss.values()).index(_logits_loss(self)) if self._distillation.pair_stages else 0
    losses = [loss for name, loss in each.items() if name != STUDENT_LOSS_KEY]
    own, carried = iter(losses[:logits] + losses[logits + 1 :]), iter(of_stages.values())
    last = self.config.pipeline_model_parallel_size - 1
    return {
        PAIR.format(place): next(own if stage == last else carried).detach()
        for place, stage in enumerate(self._distillation.pair_stages)
    }


def _logits_loss(self) -> Any:
    """Return the loss of the output layer."""
    return next(loss for (layer, _), loss in self._layers_to_loss.items() if layer is self.output_layer)


def _captured_logits(model: Any) -> Any:
    """Return what modelopt's hook captured of a model's output layer: logits or what stands for them, or None."""
    output = getattr(getattr(model, "output_layer", None), "_intermediate_output", None)
    return output[0] if isinstance(output, tuple) else output


def captured_layers(model: Any) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """Return the (student layer, teacher layer) pairs whose outputs modelopt's hooks keep."""
    layers_to_loss = getattr(model, "_layers_to_loss", None)
    return list(layers_to_loss) if isinstance(layers_to_loss, dict) else []


def forget_captured_outputs(model: Any) -> None:
    """Drop what was captured in an evaluation, where no distillation loss takes it.

    Otherwise the next training step would find it, warn, and hold it in memory until then.
    """
    for pair in captured_layers(model):
        for layer in pair:
            layer._intermediate_output = None


def copy_captured(model: Any, tensor: Tensor) -> None:
    """Put a copy in the place of every captured student output that shares memory with ``tensor``."""
    for layer, _ in captured_layers(model):
        output = layer._intermediate_output
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.data_ptr() == tensor.data_ptr():
            copied = first.clone()
            layer._intermediate_output = (copied, *output[1:]) if isinstance(output, tuple) else copied

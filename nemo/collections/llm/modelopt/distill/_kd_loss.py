"""Compute the losses of a micro-batch from the outputs that modelopt's hooks captured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from nemo.utils import logging
from torch import Tensor

from modelopt.torch.distill.loss_balancers import STUDENT_LOSS_KEY

from ..errors import ModelOptConfigError
from ._aligned import is_aligned
from ._deferred_logits import DeferredLogits, SummedLoss, takes_summed_loss
from ._metrics import observed
from ._pipeline_losses import losses_of_stages

# Key of the loss of a layer pair, by its position in the settings.
PAIR = "pair_{}"


def compute_kd_loss(self, student_loss: Tensor | None = None, loss_reduction_fn=None, **kwargs):
    """Return modelopt's total of the losses, including those of earlier pipeline stages.

    If the fused kernel computes the language-model loss, that value is used.

    Returns:
        The result of the loss balancer. If it is a dictionary, these are added: the loss of each layer pair (`PAIR`),
        ``top1_agreement`` on logging steps or with fused logits, ``teacher_lm_loss`` on logging steps, and ``lm_loss``
        with fused logits.
    """
    student, teacher = _captured_logits(self), _captured_logits(self.teacher_model)
    deferred = isinstance(student, DeferredLogits)
    if deferred and not takes_summed_loss(loss_reduction_fn):
        student_loss = _compute_logits(self, student, teacher, student_loss, loss_reduction_fn)
        student, teacher = _captured_logits(self), _captured_logits(self.teacher_model)
    self._distillation.finite.see_outputs(student, teacher)
    observations = _observed(self, student, teacher) if self._distillation.observing else {}
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
    losses |= {name: loss_reduction_fn((value, False, False)).detach() for name, value in observations.items()}
    if pair is not None:
        losses["top1_agreement"] = loss_reduction_fn(SummedLoss(pair, "agreement"))
    if deferred and student_loss is not None:
        losses["lm_loss"] = student_loss.detach()
    return losses


def _compute_logits(self, student: Any, teacher: Any, student_loss: Any, loss_reduction_fn: Any) -> Any:
    """Replace deferred logits by logits for a loss reduction that needs the loss of every token.

    Later steps do not defer them any more.

    Returns:
        The reduced language-model loss of the student.

    Raises:
        ModelOptConfigError: If the settings demand the fused loss.
    """
    if self._distillation.settings.fused_logits == "on":
        name = getattr(loss_reduction_fn, "__qualname__", loss_reduction_fn)
        raise ModelOptConfigError(
            "fused_logits='on' needs the loss reduction of DistillationGPTModel, which sums the losses of the tokens; "
            f"{name} takes the loss of every token. Use 'auto'."
        )
    logging.info(
        "Distillation: output layers and logits loss are not fused: the loss reduction is not that of "
        "DistillationGPTModel and takes the loss of every token."
    )
    self._distillation.fused = False
    with torch.no_grad():
        of_teacher = teacher.compute()
    logits = student.compute()
    self.output_layer._intermediate_output = (logits, None)
    self.teacher_model.output_layer._intermediate_output = (of_teacher, None)
    if student.labels is None:
        return student_loss
    # A copy, because cross entropies work in place.
    lm_loss = type(self).compute_language_model_loss(self, student.labels, logits.clone())
    return lm_loss if loss_reduction_fn is None else loss_reduction_fn((lm_loss, False, False))


def _observed(self, student: Any, teacher: Any) -> dict[str, Tensor]:
    """Return metrics of both models' logits, [b, s] each; none if the logits were not captured."""
    if student is None or teacher is None:
        return {}
    if is_aligned(self._distillation.settings):
        return {}  # the entries of the vocabularies and the labels are not those of one model
    # The fused kernel counts the agreement itself.
    own = None if isinstance(student, DeferredLogits) else student
    return observed(own, teacher, self._distillation.labels, _logits_loss(self).entries)


def _single_pairs(self, each: Mapping[str, Tensor], of_stages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the loss of each layer pair by its key."""
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
    """Return the captured output of a model's output layer: logits, deferred or recorded logits, or None."""
    output = getattr(getattr(model, "output_layer", None), "_intermediate_output", None)
    return output[0] if isinstance(output, tuple) else output


def captured_layers(model: Any) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """Return the (student layer, teacher layer) pairs with outputs that modelopt's hooks capture."""
    layers_to_loss = getattr(model, "_layers_to_loss", None)
    return list(layers_to_loss) if isinstance(layers_to_loss, dict) else []


def forget_captured_outputs(model: Any) -> None:
    """Delete the outputs captured in an evaluation, in which no distillation loss uses them.

    Otherwise they would stay in memory until the next training step, which would log a warning.
    """
    for pair in captured_layers(model):
        for layer in pair:
            layer._intermediate_output = None


def copy_captured(model: Any, tensor: Tensor) -> None:
    """Replace every captured student output that shares memory with ``tensor`` by a copy."""
    for layer, _ in captured_layers(model):
        output = layer._intermediate_output
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.data_ptr() == tensor.data_ptr():
            copied = first.clone()
            layer._intermediate_output = (copied, *output[1:]) if isinstance(output, tuple) else copied

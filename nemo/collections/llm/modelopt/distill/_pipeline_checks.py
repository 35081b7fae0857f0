"""Checks on all pipeline stages before a distillation begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from torch import nn

from nemo_modelopt_dropin.errors import nearest

from .. import _parallel
from ..errors import ModelOptConfigError


def refuse_virtual_pipeline(config: Any, strategy: Any = None) -> None:
    """Raise an error if the model or the strategy sets an interleaved pipeline schedule.

    Megatron sends fixed shapes between virtual stages, which cannot be widened for the teacher.

    Raises:
        ModelOptConfigError: With the configuration that sets it.
    """
    for where, holder in (("model config", config), ("strategy", strategy)):
        size = getattr(holder, "virtual_pipeline_model_parallel_size", None)
        if size is not None:
            raise ModelOptConfigError(
                "ModelOpt Distillation incompatible with interleaved pipeline schedule. Set "
                f"virtual_pipeline_model_parallel_size={size} on the {where} to None."
            )


def check_student_layers(student: nn.Module, criterion: Mapping[tuple[str, str], Any]) -> None:
    """Raise an error on every pipeline stage if the student lacks a layer to capture, before the teacher is loaded.

    A layer that does nothing, as norms are where Transformer Engine fuses them into the linear layer after them, is
    an error for the teacher too if the student has one of that name.

    Raises:
        ModelOptConfigError: With the layer and similar ones, or what to compare instead.
    """
    layers = dict(student.named_modules())
    problems: list[str | None] = [
        f"The student has no layer {layer!r} on this stage. Similar names: {nearest(layer, list(layers), count=3)}."
        for layer, _ in criterion
        if layer not in layers
    ]
    problems += [
        f"The {model}'s layer {layer!r} does nothing, because its norm is a part of the linear layer after it "
        f"(Transformer Engine). Compare its input, {_before(layer)}, or the whole block, {_block(layer)!r}."
        for pair in criterion
        for model, layer in zip(("student", "teacher"), pair, strict=True)
        if isinstance(layers.get(layer), IdentityOp)
    ]
    # Only one stage may find it; the others would wait for it while loading the teacher's checkpoint.
    for problem in _parallel.gather_over_stages((problems or [None])[0]):
        if problem:
            raise ModelOptConfigError(problem)


def _before(layer: str) -> str:
    """Return what gives the input of a norm of a transformer layer, in words."""
    owner, _, norm = layer.rpartition(".")
    stem, _, number = owner.rpartition(".")
    if norm == "input_layernorm" and number.isdigit() and int(number):
        return repr(f"{stem}.{int(number) - 1}")
    return "the output of the layer before it"


def _block(layer: str) -> str:
    """Return the block of a transformer layer that begins with a norm."""
    owner, _, norm = layer.rpartition(".")
    return f"{owner}.{'self_attention' if norm == 'input_layernorm' else 'mlp'}"

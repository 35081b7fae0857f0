"""Checks on all pipeline stages before a distillation begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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

    Raises:
        ModelOptConfigError: With the layer and similar ones.
    """
    names = [name for name, _ in student.named_modules()]
    problems: list[str | None] = [
        f"The student has no layer {layer!r} on this stage. Similar names: {nearest(layer, names, count=3)}."
        for layer, _ in criterion
        if layer not in names
    ]
    # Only one stage may find it; the others would wait for it while loading the teacher's checkpoint.
    for problem in _parallel.gather_over_stages((problems or [None])[0]):
        if problem:
            raise ModelOptConfigError(problem)

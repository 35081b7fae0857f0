"""Support students that train only adapters (LoRA and NeMo's other PEFT methods)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemo.lightning.pytorch.callbacks.peft import PEFT

from ..errors import ModelOptConfigError


def stay_as_loaded(self, func: Callable, *args: Any, **kwargs: Any) -> Any:
    """Return the teacher itself, so that NeMo's transforms skip it.

    NeMo's ``fn.map`` calls a module's method ``map`` if there is one, instead of visiting its submodules. Otherwise the
    teacher would get adapters, and they would be trained.
    """
    return self


def check_adapters(settings: Any, student: Any, teacher: Any, trainer: Any) -> None:
    """Raise an error if intermediate losses and adapters do not fit together.

    Args:
        settings: a ``DistillationConfig``.
        student: Megatron-Core configuration of the student.
        teacher: Megatron-Core configuration of the teacher.
        trainer: trainer; its callbacks may contain a PEFT method.

    Raises:
        ModelOptConfigError: With the layer pair.
    """
    callbacks = getattr(trainer, "callbacks", None)
    methods = [c for c in callbacks if isinstance(c, PEFT)] if isinstance(callbacks, list) else []
    if not methods or not settings.intermediate_layer_pairs:
        return
    name = type(methods[0]).__name__
    if student.hidden_size != teacher.hidden_size:
        raise ModelOptConfigError(
            f"{name} freezes the projection that the intermediate pair "
            f"{tuple(settings.intermediate_layer_pairs[0][:2])} needs between hidden sizes {student.hidden_size} and "
            f"{teacher.hidden_size}. Remove the pair, or train the whole student."
        )
    for pair in settings.intermediate_layer_pairs:
        leaf = pair[0].rpartition(".")[2]
        if any(target.rpartition(".")[2] == leaf for target in getattr(methods[0], "target_modules", ())):
            raise ModelOptConfigError(
                f"The intermediate pair {tuple(pair[:2])} would see {pair[0]!r} without its adapter ({name} is applied "
                f"to {leaf!r}). Capture the layer around it, for example {pair[0].rpartition('.')[0]!r}."
            )

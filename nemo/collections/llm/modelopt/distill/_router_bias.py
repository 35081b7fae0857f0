"""Keep the teacher's routers out of Megatron's update of expert biases, which covers all routers of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

_NAME = "expert_bias"
_KEPT = "teacher_expert_bias"


def keep_from_update(teacher: Any) -> None:
    """Show the bias of each router of a teacher only while the router runs.

    After each step Megatron stacks the biases of all modules that have the attribute, and changes them. A teacher with
    another number of experts than the student, or without a bias, stops the training.

    Args:
        teacher: Megatron-Core model with its weights, changed in place.
    """
    for module in teacher.modules() if issubclass(type(teacher), nn.Module) else ():
        if _NAME not in vars(module) and _NAME not in getattr(module, "_buffers", {}):
            continue
        bias = getattr(module, _NAME)
        delattr(module, _NAME)
        module.register_buffer(_KEPT, bias, persistent=False)
        module.register_forward_pre_hook(_show)
        module.register_forward_hook(_hide, always_call=True)


def _show(router: Any, args: tuple) -> None:
    """Set the attribute that the router reads."""
    vars(router)[_NAME] = getattr(router, _KEPT)


def _hide(router: Any, args: tuple, output: Any) -> None:
    """Remove the attribute again."""
    vars(router).pop(_NAME, None)

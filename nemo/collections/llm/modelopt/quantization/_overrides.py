"""Call methods that a subclass may have overridden with stock's parameters, which lack ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from . import quant_cfg_entries
from .calibration import steps


def accepts(method: Callable, name: str) -> bool:
    """Return whether a method has a parameter of this name."""
    parameters = inspect.signature(method).parameters.values()
    return any(parameter.name == name or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def call(method: Callable, model: Any, **ours: Any) -> Any:
    """Call a method with the model and with those of our own arguments that it accepts."""
    return method(model, **{name: value for name, value in ours.items() if accepts(method, name)})


def quant_cfg_of(method: Callable, model: Any, decoder_type: str | None) -> dict[str, Any]:
    """Return what ``_get_quant_cfg`` returns, in the form that the installed modelopt takes.

    A subclass written for modelopt before 0.44 returns a dictionary; such versions quantized fewer kinds of layers.

    Args:
        method: The method, with our parameters or with stock's.
        model: The ``llm.GPTModel``.
        decoder_type: Its decoder type, None if it is unknown.
    """
    quant_cfg = call(method, model, decoder_type=decoder_type)
    found = quant_cfg_entries.native(quant_cfg, "the quant_cfg of _get_quant_cfg")
    if isinstance(quant_cfg.get("quant_cfg"), dict) and not isinstance(found["quant_cfg"], dict):
        quant_cfg_entries.leave_as_before(found)
    return found


def own_loop(quantizer: Any, model: Any, plan: steps.Plan, mtq: Any) -> Callable | None:
    """Return the loop of a subclass that overrides ``_get_forward_loop`` with stock's parameters, or None.

    Such a loop brings its own data: the configured dataset is not read.

    Args:
        quantizer: The ``Quantizer``.
        model: The ``llm.GPTModel``.
        plan: How it is quantized.
        mtq: ``modelopt.torch.quantization``.
    """
    if plan.searches or accepts(quantizer._get_forward_loop, "rows"):
        return None
    return quantizer._get_forward_loop(model) if mtq.config.need_calibration(plan.quant_cfg) else None

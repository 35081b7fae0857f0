"""Restore a model's structure after pruning: a candidate is tried on the model itself, without a copy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def put_back(core: nn.Module) -> Iterator[None]:
    """Put classes, parameters, submodules, hooks and configurations of a model back on leaving, also after an error.

    Pruning replaces parameters by smaller ones and changes none in place, so the original tensors are kept and not
    copied: the model needs its own memory and, meanwhile, that of the pruned one.

    Args:
        core: the Megatron-Core model.
    """
    modules = [(module, type(module), _shallow(vars(module))) for module in core.modules()]
    configs = {id(config): config for module in core.modules() if hasattr(config := module_config(module), "__dict__")}
    settings = [(config, dict(vars(config))) for config in configs.values()]
    try:
        yield
    finally:
        for module, kind, attributes in modules:
            module.__class__ = kind
            _refill(vars(module), attributes)
        for config, values in settings:
            _refill(vars(config), {name: (value, None) for name, value in values.items()})


def module_config(module: nn.Module) -> Any:
    """Return the configuration that a module was built from, or None if it keeps none."""
    return vars(module).get("config")


def _shallow(attributes: dict[str, Any]) -> dict[str, tuple[Any, dict | None]]:
    """Return name -> value, and the content of values that are dictionaries (parameters, submodules, hooks)."""
    return {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in attributes.items()}


def _refill(target: dict[str, Any], attributes: dict[str, tuple[Any, dict | None]]) -> None:
    """Fill a dictionary with what `_shallow` returned; inner ones in place, because handles of hooks refer to them."""
    target.clear()
    for name, (value, content) in attributes.items():
        if content is not None:
            value.clear()
            value.update(content)
        target[name] = value

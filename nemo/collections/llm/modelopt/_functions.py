"""Make modelopt put back the functions it replaces during a quantized forward pass, also after an error.

A quantized layer of modelopt replaces functions of Megatron, PyTorch or Transformer Engine while it runs, through
``replace_function``, which does not undo the replacement if the layer raises an exception. After one failed or
interrupted forward pass, every other model of the process would then run through the quantizers of that layer.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

_NAME = "replace_function"
_ABSENT = object()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a module inside the context."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def replace_function(
    package: Any, name: str, new_func: Callable, og_func_cache_name: str | None = None
) -> Iterator[None]:
    """Replace a function inside the context, as modelopt's function of this name does, and always put it back.

    Args:
        package: the module or object that holds the function.
        name: the function's name there.
        new_func: the replacement.
        og_func_cache_name: name under which the replacement finds the original; an underscore and ``name`` by default.
    """
    cache = f"_{name}" if og_func_cache_name is None else og_func_cache_name
    original, cached = getattr(package, name), vars(package).get(cache, _ABSENT)
    try:
        setattr(package, cache, original)
        setattr(package, name, new_func)
        yield
    finally:
        setattr(package, name, original)
        if cached is not _ABSENT:
            setattr(package, cache, cached)
        elif cache in vars(package):
            delattr(package, cache)


def always_put_back() -> None:
    """Let all loaded modules of modelopt use our `replace_function`; calling it again covers newly loaded modules.

    This stays in effect after the call: a quantized model also runs, and is interrupted, in code that is not ours.
    """
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("modelopt.") and vars(module).get(_NAME, replace_function) is not replace_function:
            setattr(module, _NAME, replace_function)

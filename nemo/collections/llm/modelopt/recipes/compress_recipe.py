"""The compression recipe under its import path in this package; it is defined with the ``compress`` command."""

import importlib
from typing import Any

_RECIPE = "nemo_modelopt_cli.compress.recipe"


def __getattr__(name: str) -> Any:
    """Return an attribute of the recipe's module, which is imported when it is first used.

    The commands import this package, so this package must not import the commands when it is loaded.
    """
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module(_RECIPE), name)

"""NeMo-Run recipes for every task and for the whole compression job; every setting can be changed."""

from typing import Any

from . import compress_recipe
from .distillation_recipe import distillation_recipe
from .prune_recipe import prune_recipe
from .ptq_recipe import ptq_recipe

__all__ = ["compress_recipe", "distillation_recipe", "prune_recipe", "ptq_recipe"]

# Users need the function, which __getattr__ returns: importing the submodule has bound the name to the module.
_compress = compress_recipe
del compress_recipe


def __getattr__(name: str) -> Any:
    """Return `compress_recipe`, whose definition is imported when it is first used."""
    if name == "compress_recipe":
        return _compress.compress_recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""NeMo-Run recipes: distillation and pruning with one call, every setting open to change."""

from .distillation_recipe import distillation_recipe
from .prune_recipe import prune_recipe

__all__ = ["distillation_recipe", "prune_recipe"]

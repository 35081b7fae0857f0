"""NeMo-Run recipes: every task and the whole job with one call, every setting open to change."""

from .compress_recipe import compress_recipe
from .distillation_recipe import distillation_recipe
from .prune_recipe import prune_recipe
from .ptq_recipe import ptq_recipe

__all__ = ["compress_recipe", "distillation_recipe", "prune_recipe", "ptq_recipe"]

"""Structured pruning of GPT and hybrid Mamba models: whole layers, or width and depth by measured importance."""

from ._checkpoint_checks import check_checkpoint as check_checkpoint
from .pruner import PruningConfig, prune_language_model, save_pruned_model
from .pruner import describe_pruning as describe_pruning

__all__ = ["PruningConfig", "prune_language_model", "save_pruned_model"]

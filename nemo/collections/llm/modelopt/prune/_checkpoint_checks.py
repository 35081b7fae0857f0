"""Checks of a request against a checkpoint's configuration, before its weights are loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ..errors import ModelOptConfigError
from . import _checks, _layer_kinds, _search


def check_checkpoint(pruning_config: Any, checkpoint: str, tp_size: int = 1) -> None:
    """Raise an error for a request that a checkpoint's model cannot be pruned to; only its configuration is read.

    ``llm.prune`` meets the same errors once the model is loaded.

    Args:
        pruning_config: the `PruningConfig`.
        checkpoint: NeMo checkpoint.
        tp_size: tensor-parallel size of the run.

    Raises:
        ModelOptConfigError: for sizes, layers or a layout that the model cannot have.
    """
    from nemo.lightning.ckpt_utils import ckpt_to_context_subdir

    from nemo import lightning as nl

    from . import pruner

    _checks.check_installed(pruner.mtp.plugins, by_importance=not pruning_config.drop_layers)
    config = nl.io.load_context(ckpt_to_context_subdir(checkpoint), subpath="model.config")
    if pruning_config.drop_layers:
        _checks.check_drop_layers(pruning_config.drop_layers, config.num_layers)
        _layer_kinds.check_drop(pruning_config.drop_layers, config)
        return
    if tp_size > 1:
        raise ModelOptConfigError(
            f"tp_size={tp_size}: importance is measured on whole layers, so tensor parallelism must be 1; use "
            "pp_size (a checkpoint loads at any layout), or drop_layers."
        )
    # Sizes of a Mamba mixer are known from its modules only.
    sizes = _checks.model_sizes(SimpleNamespace(config=config, decoder=SimpleNamespace(layers=[])))
    targets = {name: size for name, size in pruner._requested(pruning_config).items() if "mamba" not in name}
    by_budget = pruner._budget_of(pruning_config) is not None
    _layer_kinds.check_family(targets, config, by_budget)
    resolved = _checks.resolve_targets(targets, sizes, may_be_empty=True)
    _checks.check_prunes_experts(resolved, config, by_budget, _search.prunes_experts())
    _checks.check_experts(resolved, config)
    _checks.check_multi_token_prediction(resolved, config, by_budget)
    _layer_kinds.check_targets(resolved, config, by_budget)

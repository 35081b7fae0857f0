"""Cut a model to one size after the other, by importance that is measured once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

import modelopt.torch.prune as mtp

from . import _checks, _hybrid, _scores, _search, _snapshot, _state, pruner


class Trials:
    """A model with its importance.

    Attributes:
        core: the Megatron-Core model.
    """

    def __init__(self, core: nn.Module, known: Mapping[str, Any]):
        """Store the model and what `measured` found.

        Args:
            core: the Megatron-Core model.
            known: its importance.
        """
        self.core = core
        self._known = known

    def keep(self, targets: Mapping[str, int]) -> None:
        """Prune the model to sizes, for good.

        Args:
            targets: hparam -> size; query groups together with heads. Without targets, nothing is done.
        """
        if targets:
            _search.prune_by_importance(self.core, targets, pruner._minitron, _not_measured, known=self._known)

    @contextlib.contextmanager
    def cut(self, targets: Mapping[str, int]) -> Iterator[None]:
        """Prune the model to sizes inside the context; see `keep`."""
        with _snapshot.put_back(self.core):
            self.keep(targets)
            yield


def _not_measured(converted: Any) -> None:
    raise RuntimeError("Importance is known, so it is not measured again.")


@contextlib.contextmanager
def measured(model: Any, data_module: Any, trainer: Any, scores_path: str | None = None) -> Iterator[Trials]:
    """Measure the importance of a model's parts, or read it, and yield what cuts the model.

    Args:
        model: the ``llm.GPTModel``, with weights.
        data_module: data to measure importance on.
        trainer: runs the measurement for ``limit_val_batches`` batches.
        scores_path: folder that keeps the importance, see `pruner.PruningConfig`.

    Raises:
        ModelOptConfigError: if the model cannot be pruned by importance, or the scores are of another model.
    """
    _checks.check_installed(mtp.plugins, by_importance=True)
    core: Any = _state.find_core(model)
    _hybrid.check_packages(core)
    _search.check(core, {}, data_module, trainer, may_be_empty=True)
    measure = partial(pruner._validate_on_training_data, model, data_module, trainer)
    data = _scores.describe_data(data_module, trainer)
    with _state.kept(model, core, trainer), _hybrid.spelled_out(core):
        with _snapshot.put_back(core):
            known = _search.prune_by_importance(core, {}, pruner._minitron, measure, scores_path, data)
        yield Trials(core, known)
    _state.unwrap_data_parallel(model)

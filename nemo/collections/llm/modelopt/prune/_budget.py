"""Pruning to a number of parameters: candidates are tried on held-out data and the best is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero
from torch import nn

from nemo_modelopt_dropin.console import screen

from ..errors import ModelOptConfigError
from . import _candidates, _checks, _count, _heldout, _search, _snapshot


@dataclass(frozen=True)
class Budget:
    """Limits of the numbers of parameters, and how much to try.

    Attributes:
        parameters: ``target_params`` as the user gave it, None for no limit.
        active_parameters: ``target_active_params``, those that one token uses in an MoE model.
        max_candidates: how many combinations of sizes to try.
        multiples: hparam -> number that its size must be a multiple of.
    """

    parameters: Any
    active_parameters: Any
    max_candidates: int
    multiples: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Steps:
    """What the search has others do.

    Attributes:
        minitron: modelopt's search, as `_search.prune_by_importance` takes it.
        measure: forward passes over the training data, for importance.
        validate: forward passes of the whole model over the held-out data.
    """

    minitron: Callable
    measure: Callable
    validate: Callable[[], None]


def check(core: nn.Module, budget: Budget, fixed: Mapping[str, int]) -> dict[int, _count.Terms]:
    """Raise an error for a budget that this model cannot be pruned to; return what its parameters are made of.

    All ranks must call it.

    Args:
        core: the Megatron-Core model.
        budget: the limits.
        fixed: sizes that every candidate has.

    Raises:
        ModelOptConfigError: for a budget above the model's size or below what sizes can reach, or a model whose
            parameters cannot be counted.
    """
    config: Any = core.config
    if not hasattr(config, "data_step_fn") or not hasattr(config, "forward_step_fn"):
        raise ModelOptConfigError(
            f"target_params: {type(config).__name__} has no data_step_fn and forward_step_fn to evaluate candidates "
            "with; set target_* sizes instead."
        )
    terms, sizes = _count.model_terms(core), _checks.model_sizes(core)
    layers = range(1, sizes["num_layers"] + 1)
    total = _count.count(terms, sizes, layers)
    used = _count.count(terms, _count.active(sizes, _topk(config)), layers)
    if budget.active_parameters is not None and total == used:
        raise ModelOptConfigError(
            "target_active_params is for mixture-of-experts models; this model uses all parameters for every token: "
            "set target_params."
        )
    _limits(budget, total, used)
    # Which layers stay is known once they are scored; with the smallest ones anything is reached that ever can be.
    _plan(core, budget, fixed, terms, sorted(layers, key=lambda number: _count.count(terms, sizes, [number])))
    return terms


def prune_to_budget(
    core: nn.Module,
    budget: Budget,
    fixed: Mapping[str, int],
    terms: Mapping[int, _count.Terms],
    steps: Steps,
    scores_path: str | None,
    data: Mapping[str, Any],
) -> tuple[list[_candidates.Candidate], Mapping[str, Any], float]:
    """Prune a model to the best candidate under a budget.

    Importance is measured once. Each candidate is then cut, evaluated and put back, on the model itself; the model is
    as before where anything of this fails. The best is the one of lowest held-out loss.

    Args:
        core: the Megatron-Core model, pruned in place.
        budget: the limits.
        fixed: sizes that every candidate has.
        terms: what `check` returned.
        steps: what runs the model.
        scores_path: see `_search.prune_by_importance`.
        data: see `_search.prune_by_importance`.

    Returns:
        The candidates, the importance, and the original model's held-out loss.

    Raises:
        ModelOptConfigError: if no candidate keeps the budget, or nothing can be measured.
    """
    with _snapshot.put_back(core):
        known = _search.prune_by_importance(core, {}, steps.minitron, steps.measure, scores_path, data)
    scores = known["layer_scores"]
    order = sorted(scores, key=lambda number: float(scores[number]), reverse=True)
    found = _plan(core, budget, fixed, terms, order)
    logging.info(f"Trying {len(found)} candidates on held-out data")
    reference = _heldout.observe(core, steps.validate)
    for candidate in screen.bar(found, desc="candidates", unit="model", disable=not is_global_rank_zero()):
        with _snapshot.put_back(core):
            _search.prune_by_importance(
                core, _changed(core, candidate.sizes), steps.minitron, steps.measure, known=known
            )
            candidate.loss, candidate.kl = _heldout.evaluate(core, reference)
    best = min(found, key=lambda candidate: (_number(candidate.loss), _number(candidate.kl)))
    best.chosen = True
    if _number(best.loss) < reference.loss and is_global_rank_zero():
        logging.warning(
            f"The best candidate's held-out loss, {best.loss:.4f}, is below the original's, {reference.loss:.4f}: the "
            "held-out data cannot separate the candidates. It may be too little, or unlike what the model was "
            "trained on."
        )
    _search.prune_by_importance(core, _changed(core, best.sizes), steps.minitron, steps.measure, known=known)
    return found, known, reference.loss


def _number(value: float | None) -> float:
    return float("inf") if value is None or value != value else value


def _topk(config: Any) -> int:
    return getattr(config, "moe_router_topk", None) or 1


def _limits(budget: Budget, total: int, used: int) -> tuple[int | None, int | None]:
    """Return the limits as numbers of parameters."""
    return (
        None if budget.parameters is None else _candidates.resolve_budget("target_params", budget.parameters, total),
        None
        if budget.active_parameters is None
        else _candidates.resolve_budget("target_active_params", budget.active_parameters, used),
    )


def _plan(
    core: nn.Module,
    budget: Budget,
    fixed: Mapping[str, int],
    terms: Mapping[int, _count.Terms],
    order: Sequence[int],
) -> list[_candidates.Candidate]:
    """Return the candidates to try; of the layers in ``order`` a depth keeps the first."""
    sizes, topk = _checks.model_sizes(core), _topk(core.config)

    def counted(at: Mapping[str, int]) -> int:
        return _count.count(terms, at, order[: at["num_layers"]])

    def counted_active(at: Mapping[str, int]) -> int:
        return _count.count(terms, _count.active(at, topk), order[: at["num_layers"]])

    limits = _limits(budget, counted(sizes), counted_active(sizes))
    experts = topk if "num_moe_experts" in sizes else 1
    multiples = {name: number for name, number in budget.multiples.items() if name in sizes}
    return _candidates.choose(sizes, fixed, counted, counted_active, limits, budget.max_candidates, experts, multiples)


def _changed(core: nn.Module, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes to prune, query groups together with heads."""
    original = _checks.model_sizes(core)
    changed = {name: size for name, size in sizes.items() if size != original[name]}
    if "num_query_groups" in changed or "num_attention_heads" in changed:
        changed |= {name: sizes[name] for name in ("num_attention_heads", "num_query_groups")}
    return changed


def table(candidates: list[_candidates.Candidate], original_loss: float) -> str:
    """Return a text table of the candidates, best first."""
    names = [name for name in candidates[0].sizes if len({c.sizes[name] for c in candidates}) > 1]
    heads = {
        name: name.replace("num_", "").replace("hidden_size", "hidden").replace("attention_", "") for name in names
    }
    width = {name: max(len(heads[name]), 6) + 2 for name in names}
    lines = [
        "".join(f"{heads[name]:>{width[name]}}" for name in names)
        + f"{'params':>16}{'active':>16}{'loss':>10}{'KL':>10}"
    ]
    for candidate in sorted(candidates, key=lambda found: _number(found.loss)):
        lines.append(
            "".join(f"{candidate.sizes[name]:>{width[name]},}" for name in names)
            + f"{candidate.parameters:>16,}{candidate.active_parameters:>16,}"
            + f"{_number(candidate.loss):>10.4f}{_number(candidate.kl):>10.4f}"
            + ("  kept" if candidate.chosen else "")
        )
    return "\n".join([*lines, f"Held-out loss of the original model: {original_loss:.4f} nats a token"])


def checked_budget(
    parameters: Any, active_parameters: Any, max_candidates: Any, multiples: Any = None
) -> Budget | None:
    """Return the budget of a configuration, None if it has none.

    Raises:
        ModelOptConfigError: if a limit is not a number of parameters, or the candidates' number or a multiple is below
            one.
    """
    whole = isinstance(multiples or {}, Mapping) and all(type(n) is int and n >= 1 for n in (multiples or {}).values())
    if not whole:
        raise ModelOptConfigError(f"size_multiples={multiples!r} must map hparams to whole numbers of at least 1.")
    if multiples and parameters is None and active_parameters is None:
        raise ModelOptConfigError(f"size_multiples={multiples!r} is for target_params: other sizes stay unchanged.")
    for name, value in (("target_params", parameters), ("target_active_params", active_parameters)):
        if value is not None:
            _candidates.parse_budget(name, value)
    if isinstance(max_candidates, bool) or not isinstance(max_candidates, int) or max_candidates < 1:
        raise ModelOptConfigError(f"max_candidates={max_candidates!r}; pass a whole number of at least 1.")
    if parameters is None and active_parameters is None:
        return None
    return Budget(parameters, active_parameters, max_candidates, multiples or {})

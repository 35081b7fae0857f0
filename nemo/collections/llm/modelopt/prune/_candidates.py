"""Combinations of sizes under a budget of parameters: enumeration and choice, as pure functions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from nemo_modelopt_dropin.preflight import budget
from nemo_modelopt_dropin.preflight.model_checks import size_step
from nemo_modelopt_dropin.preflight.size_grid import size_choices, spread

from ..errors import ModelOptConfigError

# One of these is chosen as large as the budget allows, once the others are fixed.
_FITTED = ("moe_ffn_hidden_size", "ffn_hidden_size", "hidden_size", "num_layers")
# Candidates further than this below the budget are only tried if there are none nearer.
_TOLERANCE = 0.05


@dataclass
class Candidate:
    """One combination of sizes.

    Attributes:
        sizes: hparam -> size, all that the model has.
        parameters: of the whole model.
        active_parameters: those that one token uses.
        loss: held-out loss in nats a token, None until measured.
        kl: held-out KL(original || candidate) in nats a token, None until measured.
        chosen: whether it was kept.
    """

    sizes: dict[str, int]
    parameters: int
    active_parameters: int
    loss: float | None = None
    kl: float | None = None
    chosen: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the candidate as a report has it."""
        return asdict(self)


def parse_budget(name: str, value: Any) -> float:
    """Return a budget as a ratio (below 1) or a number of parameters (1 and above).

    Args:
        name: the field.
        value: such as ``"70%"``, ``0.7``, ``5.6e9`` or ``"5.6B"``.

    Raises:
        ModelOptConfigError: if it is none of these.
    """
    try:
        return budget.parse(value)
    except ValueError as error:
        raise ModelOptConfigError(f"{name}={value!r} {error}.") from None


def resolve_budget(name: str, value: Any, total: int) -> int:
    """Return a budget as a number of parameters.

    Args:
        name: the field.
        value: what `parse_budget` takes.
        total: number of parameters of the original model.

    Raises:
        ModelOptConfigError: if nothing would have to be pruned.
    """
    number = parse_budget(name, value)
    limit = int(number * total) if number < 1 else int(number)
    if limit >= total:
        raise ModelOptConfigError(
            f"{name}={value!r} is {limit:,} parameters, not fewer than the model's {total:,}; pass fewer."
        )
    return limit


def enumerate_sizes(
    sizes: Mapping[str, int],
    fixed: Mapping[str, int],
    budgets: Sequence[tuple[Callable[[Mapping[str, int]], int], int]],
    floor: float,
    least_experts: int = 1,
    multiples: Mapping[str, int] | None = None,
) -> list[dict[str, int]]:
    """Return all combinations of sizes that keep every budget, each as large as it allows.

    Args:
        sizes: the original sizes.
        fixed: sizes that are given.
        budgets: pairs of a count of parameters as a function of the sizes, and its limit.
        floor: the smallest share of a size to go down to.
        least_experts: experts that a token is sent to.
        multiples: hparam -> number that its size must be a multiple of.
    """
    multiples = multiples or {}
    # Without query groups every head is a group: both go together.
    joint = sizes.get("num_query_groups") == sizes.get("num_attention_heads")
    free = [name for name in sizes if name not in fixed and name != "num_query_groups"]
    if "num_query_groups" in fixed and "num_attention_heads" in free:
        free.remove("num_attention_heads")
    fitted = next((name for name in _FITTED if name in free), None)
    if fitted is None:
        raise ModelOptConfigError(
            f"target_params has nothing left to choose: {', '.join(f'target_{name}' for name in fixed)} are set; "
            f"leave at least one of {', '.join(f'target_{name}' for name in _FITTED if name in sizes)} out."
        )

    step = math.lcm(size_step(fitted, sizes[fitted]), multiples.get(fitted, 1))

    def fits(combination: Mapping[str, int], steps: int) -> bool:
        return all(counted({**combination, fitted: steps * step}) <= limit for counted, limit in budgets)

    grid, found = [], []
    for name in free:
        least, multiple = least_experts if name == "num_moe_experts" else 1, multiples.get(name, 1)
        choices = size_choices(name, sizes, floor, least, multiple)
        if name == "num_attention_heads" and joint:
            choices = size_choices("num_layers", {"num_layers": sizes[name]}, floor, 1, multiple)  # any number of heads
        if name != fitted:
            grid.append([(name, size) for size in choices])
    steps = range(max(1, math.ceil(floor * sizes[fitted] / step)), sizes[fitted] // step + 1)
    for pairs in itertools.product(*grid):
        combination = {**sizes, **dict(pairs), **fixed}
        if joint and "num_query_groups" not in fixed:
            combination["num_query_groups"] = combination["num_attention_heads"]
        best = _largest(steps, partial(fits, combination))
        if best is not None:
            found.append({**combination, fitted: best * step})
    return found


def _largest(steps: range, fits: Callable[[int], bool]) -> int | None:
    """Return the largest number that fits, by bisection, or None if the smallest does not fit."""
    if not steps or not fits(steps[0]):
        return None
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(steps[middle]) else (low, middle - 1)
    return steps[low]


def _smallest(
    sizes: Mapping[str, int], fixed: Mapping[str, int], least_experts: int, multiples: Mapping[str, int]
) -> dict[str, int]:
    """Return the smallest combination of sizes that is tried."""
    found = {}
    for name in sizes:
        least = least_experts if name == "num_moe_experts" else 1
        choices = size_choices(name, sizes, 0.0, least, multiples.get(name, 1))
        if name != "num_query_groups" and choices:
            found[name] = choices[0]
    if sizes.get("num_query_groups") == sizes.get("num_attention_heads"):
        heads = multiples.get("num_attention_heads", 1)
        found |= dict.fromkeys(("num_attention_heads", "num_query_groups"), heads)
    return {**sizes, **found, **fixed}


def check_multiples(sizes: Mapping[str, int], fixed: Mapping[str, int], multiples: Mapping[str, int]) -> None:
    """Raise for multiples that no size of the model satisfies, or that sizes which stay do not.

    Raises:
        ModelOptConfigError: naming the size and the multiple.
    """
    for name, multiple in multiples.items():
        if name in fixed and fixed[name] % multiple:
            raise ModelOptConfigError(
                f"target_{name}={fixed[name]} is not a multiple of {multiple}, which size_multiples requires."
            )
        if name in sizes and sizes[name] < multiple:
            raise ModelOptConfigError(
                f"size_multiples: {name} must be a multiple of {multiple}, but the model's is {sizes[name]}."
            )


def choose(
    sizes: Mapping[str, int],
    fixed: Mapping[str, int],
    counted: Callable[[Mapping[str, int]], int],
    counted_active: Callable[[Mapping[str, int]], int],
    budgets: tuple[int | None, int | None],
    count: int,
    least_experts: int = 1,
    multiples: Mapping[str, int] | None = None,
) -> list[Candidate]:
    """Return the candidates to try, the most even combination first.

    Args:
        sizes: the original sizes.
        fixed: sizes that are given.
        counted: sizes -> number of parameters.
        counted_active: sizes -> number of parameters that one token uses.
        budgets: limits of the two numbers, None for no limit.
        count: how many candidates at most.
        least_experts: experts that a token is sent to.
        multiples: hparam -> number that its size must be a multiple of.

    Raises:
        ModelOptConfigError: if no combination keeps the budget; the message says how small the model gets.
    """
    multiples = multiples or {}
    check_multiples(sizes, fixed, multiples)
    limits = [
        (function, limit)
        for function, limit in zip((counted, counted_active), budgets, strict=True)
        if limit is not None
    ]
    share = min(limit / function(sizes) for function, limit in limits)
    # A dimension gives up somewhat more than its part; if that does not reach the budget, all that it can.
    for floor in (0.6 * share, 0.0):
        combinations = enumerate_sizes(sizes, fixed, limits, floor, least_experts, multiples)
        near = [c for c in combinations if any(f(c) >= (1 - _TOLERANCE) * limit for f, limit in limits)]
        if near or combinations:
            break
    else:
        smallest = _smallest(sizes, fixed, least_experts, multiples)
        raise ModelOptConfigError(
            f"target_params: no combination of sizes has at most {', '.join(f'{limit:,}' for _, limit in limits)} "
            f"parameters; the smallest has {counted(smallest):,} (embedding and output layer keep the whole "
            "vocabulary"
            + "".join(f"; {name} must be a multiple of {number}" for name, number in multiples.items() if number > 1)
            + "). Use a larger budget"
            + (", or fix fewer target_* sizes." if fixed else ".")
        )
    kept = near or sorted(combinations, key=counted, reverse=True)[: 4 * count]
    return [Candidate(dict(kept[i]), counted(kept[i]), counted_active(kept[i])) for i in spread(kept, sizes, count)]

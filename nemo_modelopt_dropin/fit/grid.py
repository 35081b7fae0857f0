"""Enumerate the shapes that a search chooses from, and those that it measures first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nemo_modelopt_dropin.preflight import model_checks, size_grid
from nemo_modelopt_dropin.preflight.model_sizes import Shape

# Fields of `Shape` that are chosen. Query groups stay, unless every head has its own.
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "experts")
FITTED = "ffn_hidden_size"
_FLOORS = (0.4, 0.0)
_CHOICES, _CHOICES_OF_EXPERTS = 6, 4
# Shares of a size at which the loss is measured first, one dimension at a time.
_PROBES = (0.8, 0.6)
# Names of pruning's hparams for fields of `Shape`, if the model has experts and if it has none.
_HPARAMS = {"experts": "num_moe_experts"}
_EXPERT_HPARAMS = {"ffn_hidden_size": "moe_ffn_hidden_size"}

Sizes = dict[str, int]


def sizes_of(shape: Shape) -> Sizes:
    """Return the sizes that a search may change."""
    return {name: getattr(shape, name) for name in SIZES if getattr(shape, name)}


def with_sizes(shape: Shape, sizes: Mapping[str, int]) -> Shape:
    """Return a shape with other sizes; without query groups, their number follows that of the heads."""
    is_joint = shape.num_query_groups == shape.num_attention_heads
    heads = sizes.get("num_attention_heads", shape.num_attention_heads)
    changed: dict[str, Any] = {**sizes, "num_query_groups": heads if is_joint else shape.num_query_groups}
    return replace(shape, **changed)


def targets(shape: Shape, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes that differ from a shape's by the names of pruning's targets, without ``target_``.

    Args:
        shape: The original model.
        sizes: Sizes by the names in `SIZES`.
    """
    changed = {name: size for name, size in sizes.items() if size != getattr(shape, name)}
    hparams = _HPARAMS | (_EXPERT_HPARAMS if shape.experts else {})
    found = {hparams.get(name, name): size for name, size in changed.items()}
    if "num_attention_heads" in found:
        found["num_query_groups"] = with_sizes(shape, sizes).num_query_groups
    return found


def choices(
    shape: Shape,
    fixed: Mapping[str, int],
    multiples: Mapping[str, int],
    least_experts: int = 1,
    floor: float = _FLOORS[0],
    most: int | None = None,
) -> dict[str, list[int]]:
    """Return the sizes of each dimension to combine, the original's included.

    Args:
        shape: The original model.
        fixed: Sizes that are given.
        multiples: Numbers of which sizes must be multiples, from `model_checks.size_multiples`.
        least_experts: Experts that a token is sent to.
        floor: The smallest share of a size.
        most: How many sizes of a dimension at most; by default as many as can be combined in seconds.
    """
    most = most or (_CHOICES_OF_EXPERTS if shape.experts else _CHOICES)
    sizes, found = sizes_of(shape), {}
    is_joint = shape.num_query_groups == shape.num_attention_heads
    for name in sizes:
        if name in fixed:
            found[name] = [fixed[name]]
            continue
        # Any number of heads is legal if each has its own keys.
        known = {**sizes, "num_query_groups": 1 if is_joint else shape.num_query_groups}
        least = least_experts if name == "experts" else 1
        legal = size_grid.size_choices(name, known, floor, least, multiples.get(name, 1), most)
        found[name] = sorted({*legal, sizes[name]})
    return found


def shapes(found: Mapping[str, Sequence[int]]) -> Iterator[Sizes]:
    """Yield all combinations of sizes."""
    for values in itertools.product(*found.values()):
        yield dict(zip(found, values, strict=True))


def floors() -> tuple[float, ...]:
    """Return the smallest shares to try, one after the other: a budget may need smaller sizes than most do."""
    return _FLOORS


def fitted_steps(shape: Shape, multiples: Mapping[str, int], fixed: Mapping[str, int]) -> list[int]:
    """Return the legal sizes of the dimension that fills a budget, ascending."""
    if FITTED in fixed:
        return [fixed[FITTED]]
    size = getattr(shape, FITTED)
    known = size_grid.size_choices(FITTED, {FITTED: size}, 0.0, 1, multiples.get(FITTED, 1), size)
    return sorted({*known, size})


def probes(found: Mapping[str, Sequence[int]]) -> list[Sizes]:
    """Return the shapes to measure first: each dimension alone at some shares, then all together.

    Args:
        found: What `choices` returned.
    """
    original = {name: max(values) for name, values in found.items()}
    result: list[Sizes] = []
    for share in _PROBES:
        nearest = {name: _nearest(values, share * original[name]) for name, values in found.items()}
        result += [{**original, name: size} for name, size in nearest.items()]
        result.append(nearest)
    distinct = {tuple(sizes.values()): sizes for sizes in result if sizes != original}
    return list(distinct.values())


def _nearest(values: Sequence[int], wanted: float) -> int:
    return min(values, key=lambda size: abs(size - wanted))


def smallest(shape: Shape, fixed: Mapping[str, int], multiples: Mapping[str, int]) -> Shape:
    """Return the smallest shape that a search reaches."""
    found = model_checks.smallest(shape, {f"target_{name}": size for name, size in fixed.items()}, multiples)
    return replace(found, shared_expert_size=shape.shared_expert_size)

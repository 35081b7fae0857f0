"""Sizes that a search tries: evenly spaced legal sizes of a dimension, and combinations far from each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nemo_modelopt_dropin.preflight.model_checks import size_step

CHOICES = 8


def size_choices(
    name: str, sizes: Mapping[str, int], floor: float, least: int = 1, multiple: int = 1, most: int = CHOICES
) -> list[int]:
    """Return legal sizes from a share of the original one up to it, ``most`` at most and evenly spaced.

    Args:
        name: the hparam.
        sizes: the original sizes.
        floor: the smallest share.
        least: the smallest size.
        multiple: number that the size must be a multiple of; none may be legal then.
        most: how many to return at most.
    """
    size = sizes[name]
    step = sizes["num_query_groups"] if name == "num_attention_heads" else size_step(name, size)
    step = math.lcm(step, multiple)
    lowest = math.ceil(max(step, least, floor * size) / step) * step
    legal = sorted({*([] if size % multiple else [size]), *range(lowest, size + 1, step)})
    count = min(most, len(legal))
    return [] if not legal else sorted({legal[round(i * (len(legal) - 1) / max(1, count - 1))] for i in range(count)})


def spread(combinations: Sequence[Mapping[str, int]], sizes: Mapping[str, int], count: int) -> list[int]:
    """Return the positions of combinations that are far from each other and take from all dimensions alike.

    Of the half that is most even (by the variance of the logarithms of the shares that are kept) the most even one is
    first; each further one is the one farthest from all before.

    Args:
        combinations: all sizes of each combination.
        sizes: the original sizes.
        count: how many to choose at most.
    """
    names = [name for name in sizes if len({combination[name] for combination in combinations}) > 1]
    points = [[math.log(combination[name] / sizes[name]) for name in names] for combination in combinations]

    def unevenness(position: int) -> float:
        point = points[position]
        mean = sum(point) / max(1, len(point))
        return sum((value - mean) ** 2 for value in point)

    order = sorted(range(len(points)), key=unevenness)
    order = order[: max(count, len(order) // 2)]
    chosen: list[int] = []
    distance = dict.fromkeys(order, math.inf)
    while distance and len(chosen) < count:
        # The first of equals: the most even.
        farthest = max(distance, key=lambda position: distance[position])
        chosen.append(farthest)
        del distance[farthest]
        for position in distance:
            distance[position] = min(distance[position], math.dist(points[position], points[farthest]))
    return chosen

"""Find the points that no other point beats in all figures."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the positions of the points that no other point beats: is at most as large in all figures, and differs.

    Of equal points the first is kept.

    Args:
        points: Figures of each point; less is better.
    """
    order = sorted(range(len(points)), key=lambda position: tuple(points[position]))
    kept: list[int] = []
    for position in order:  # a point can only be beaten by one before it
        point = points[position]
        if not any(all(a <= b for a, b in zip(points[other], point, strict=True)) for other in kept):
            kept.append(position)
    return sorted(kept)


def thinned(values: Sequence[float], count: int, always: Sequence[int] = ()) -> list[int]:
    """Return the positions of at most ``count`` values that spread evenly over their order, the ends included.

    Args:
        values: One figure of each point.
        count: How many to keep; those of ``always`` come on top.
        always: Positions to keep.
    """
    order = sorted(range(len(values)), key=lambda position: values[position])
    if len(order) > count:
        order = [order[round(i * (len(order) - 1) / max(1, count - 1))] for i in range(count)]
    return sorted({*order, *always})

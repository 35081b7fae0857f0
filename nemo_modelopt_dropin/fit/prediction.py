"""Predict the held-out loss of a shape from those of measured shapes, and compare predictions with measurements.

The increase of the loss over the original model is a sum over dimensions of ``a x + b x^2`` with ``a, b >= 0``, where x
is minus the logarithm of the share of the size that is kept, plus a joint term, the square of the sum of all x. What
remains at the measured shapes is interpolated by their distance, so that a measured shape is predicted exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Measured:
    """A shape and its increase of the held-out loss, in nats per token."""

    sizes: Sizes
    increase: float


class ShapeLoss:
    """The predicted increase of the loss as a function of sizes.

    Args:
        original: The sizes of the original model.
        measured: Measured shapes; the original itself counts as measured with an increase of zero.
    """

    def __init__(self, original: Sizes, measured: Sequence[Measured]):
        self.original = dict(original)
        # A size that no measurement changed has no effect that could be known; the joint term covers it.
        rows = [Measured(self.original, 0.0), *measured]
        self._points = np.array([self._position(row.sizes) for row in rows])
        increases = np.array([row.increase for row in rows])
        self._weights = _fitted(np.array([_features(point) for point in self._points]), increases)
        self._left = increases - np.array([_features(point) for point in self._points]) @ self._weights

    def _position(self, sizes: Sizes) -> np.ndarray:
        return np.array([-math.log(sizes[name] / size) for name, size in self.original.items()])

    def __call__(self, sizes: Sizes) -> float:
        """Return the predicted increase of the loss for some sizes."""
        point = self._position(sizes)
        distances = np.sum((self._points - point) ** 2, axis=1)
        nearest = int(np.argmin(distances))
        if distances[nearest] < 1e-12:
            return float(_features(point) @ self._weights + self._left[nearest])
        nearness = 1 / distances**2
        return float(_features(point) @ self._weights + nearness @ self._left / nearness.sum())


def _features(point: np.ndarray) -> np.ndarray:
    """Return the terms of the sum for a position `[d]`: `[2 d + 1]`."""
    return np.concatenate([point, point**2, [point.sum() ** 2]])


def _fitted(terms: np.ndarray, increases: np.ndarray) -> np.ndarray:
    """Return the non-negative coefficients that fit best, with a small penalty so that few points determine them."""
    from scipy.optimize import nnls

    penalty = 1e-3 * np.eye(terms.shape[1])
    rows = np.vstack([terms, penalty])
    return nnls(rows, np.concatenate([np.maximum(increases, 0.0), np.zeros(len(penalty))]))[0]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation of two sequences; None for fewer than three pairs, or if one is constant."""
    if len(one) < 3 or len(set(one)) < 2 or len(set(other)) < 2:
        return None
    first, second = _ranks(one), _ranks(other)
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Return the ranks of values; equal ones get their mean rank."""
    order = np.argsort(values, kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(len(values))
    found = np.asarray(values)
    for value in set(values):
        same = found == value
        ranks[same] = ranks[same].mean()
    return ranks

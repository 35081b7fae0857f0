"""The predicted loss of shapes, rank correlation and Pareto fronts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from nemo_modelopt_dropin.fit import pareto
from nemo_modelopt_dropin.fit.prediction import Measured, ShapeLoss, rank_correlation

ORIGINAL = {"num_layers": 8, "hidden_size": 512, "ffn_hidden_size": 1536}
numbers = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 3))


@st.composite
def sizes(draw):
    """Draw sizes up to the original's."""
    return {name: draw(st.integers(size // 4, size)) for name, size in ORIGINAL.items()}


@st.composite
def measurements(draw):
    """Draw measured shapes, each once."""
    found = draw(st.lists(sizes(), min_size=1, max_size=8, unique_by=lambda one: tuple(one.values())))
    found = [one for one in found if one != ORIGINAL]
    return [Measured(one, draw(st.floats(0, 5))) for one in found]


@given(measurements())
def test_measured_shapes_are_predicted_exactly(measured):
    predict = ShapeLoss(ORIGINAL, measured)
    assert predict(ORIGINAL) == pytest.approx(0, abs=1e-6)
    for one in measured:
        assert predict(one.sizes) == pytest.approx(one.increase, abs=1e-6)


@given(st.lists(sizes(), min_size=8, max_size=12, unique_by=lambda one: tuple(one.values())), sizes())
def test_a_smooth_law_is_recovered(points, other):
    def law(at):
        x = [-math.log(at[name] / size) for name, size in ORIGINAL.items()]
        return 0.3 * x[0] + 0.2 * x[1] ** 2 + 0.1 * sum(x) ** 2

    grid = [{**ORIGINAL, name: int(size * share)} for name, size in ORIGINAL.items() for share in (0.75, 0.5)]
    predict = ShapeLoss(ORIGINAL, [Measured(one, law(one)) for one in grid + points])
    # The law is in the family that is fitted; the penalty of the fit leaves a little.
    assert predict(other) == pytest.approx(law(other), abs=0.02)


@given(measurements(), sizes())
def test_predictions_are_finite_and_not_far_below_the_original(measured, other):
    largest = max((one.increase for one in measured), default=0.0)
    found = ShapeLoss(ORIGINAL, measured)(other)
    assert math.isfinite(found) and found >= -2 * largest - 1e-6


@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=30))
def test_rank_correlation_is_scipys(pairs):
    one, other = zip(*pairs, strict=True)
    found = rank_correlation(one, other)
    if len(set(one)) < 2 or len(set(other)) < 2:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(one, other).statistic, abs=1e-9)


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=40))
def test_the_front_is_exactly_what_nothing_beats(points):
    kept = set(pareto.front(points))
    for position, point in enumerate(points):
        beaten = any(other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in points)
        first = points.index(point) == position
        assert (position in kept) == (first and not beaten)


@given(st.lists(numbers, min_size=1, max_size=50), st.integers(2, 10))
def test_thinning_keeps_the_ends(values, count):
    kept = pareto.thinned(values, count, always=[0])
    assert len(kept) <= count + 1 and 0 in kept
    assert {min(values), max(values)} <= {values[position] for position in kept}

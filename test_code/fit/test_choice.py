"""The choice of sizes and formats under budgets."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_modelopt_dropin.errors import ModelOptConfigError
from nemo_modelopt_dropin.fit import choice, devices, formats, grid, limits, pareto
from nemo_modelopt_dropin.fit.choice import Problem
from nemo_modelopt_dropin.fit.serving import Load
from test_code.fit.shapes import shape

SENSITIVITIES = {
    "fp8": {"attention": 0.001, "mlp": 0.002, "all": 0.0025},
    "int4_awq": {"attention": 0.02, "mlp": 0.03, "all": 0.06},
    "kv_cache": {"kv_cache": 0.0005},
}
NAMES = ("no_quant", "fp8", "int4_awq")
RECOVERY = 0.8


def increase(sizes) -> float:
    """Return a loss that grows with everything that is pruned."""
    original = grid.sizes_of(shape())
    return sum(math.log(original[name] / size) ** 2 for name, size in sizes.items())


def problem(budgets=(), cache=False, **changed) -> Problem:
    """Return the search for the shape of the tests."""
    found = formats.mixtures(NAMES, block=128, cache=cache)
    read = [limits.parse(*pair) for pair in budgets]
    return Problem(**{"shape": shape(), "formats": found, "budgets": read, "device": devices.find("h100"), **changed})


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(("disk", "memory", "latency")), st.floats(0.25, 0.95))
def test_every_point_keeps_the_budget_and_almost_fills_it(kind, share):
    searched = problem([(kind, f"{share:.3f}x")], load=Load(1024, 4))
    most = searched.resolved()[kind]
    points = choice.under_budget(searched, increase, SENSITIVITIES)
    assert all(point.figures[kind] <= most for point in points)
    best = choice.next_to_try(points, [], RECOVERY)
    assert best.after(RECOVERY) == min(point.after(RECOVERY) for point in points)
    # The largest MLP that fits leaves at most a step of its size, unless it is the whole one.
    step = max(128, *searched.multiples(best.format).values()) if searched.multiples(best.format) else 64
    if best.sizes[grid.FITTED] + step <= searched.shape.ffn_hidden_size:
        more = grid.with_sizes(searched.shape, {**best.sizes, grid.FITTED: best.sizes[grid.FITTED] + step})
        assert searched.figures(more, best.format)[kind] > most


def test_joint_choice_is_at_least_as_good_as_pruning_or_quantizing_alone():
    for share in (0.6, 0.45, 0.3, 0.2):
        budget = [("disk", f"{share}x")]
        joint = choice.under_budget(problem(budget), increase, SENSITIVITIES)
        pruned = choice.under_budget(problem(budget, formats=[formats.Format()]), increase, SENSITIVITIES)
        best, best_pruned = (choice.next_to_try(points, [], 0.0) for points in (joint, pruned))
        assert best.predicted <= best_pruned.predicted


def test_several_budgets_hold_together():
    searched = problem([("disk", "0.5x"), ("memory", "0.6x"), ("latency", "0.5x")], cache=True, load=Load(8192, 8))
    most = searched.resolved()
    for point in choice.under_budget(searched, increase, SENSITIVITIES):
        assert all(point.figures[kind] <= value for kind, value in most.items())


def test_blocks_of_weights_stay_whole_and_given_sizes_stay():
    searched = problem([("disk", "0.4x")], fixed={"num_layers": 6})
    points = choice.under_budget(searched, increase, SENSITIVITIES)
    assert {point.sizes["num_layers"] for point in points} == {6}
    for point in points:
        if "int4_awq" in (point.format.attention, point.format.mlp):
            assert not point.sizes["hidden_size"] % 128 and not point.sizes["ffn_hidden_size"] % 128
        heads = grid.with_sizes(searched.shape, point.sizes)
        assert heads.num_attention_heads % heads.num_query_groups == 0


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("disk", 1234.0, "1.23 KB"),
        ("disk", 5.58e6, "5.58 MB"),
        ("memory", 22.5e9, "22.5 GB"),
        ("memory", 2.5e12, "2,500 GB"),
        ("latency", 3.2e-5, "32 us"),
        ("latency", 0.0151, "15.1 ms"),
        ("latency", 2e-8, "0.02 us"),
    ],
)
def test_figures_have_units(kind, value, text):
    assert choice.shown(kind, value) == text


@pytest.mark.parametrize("kind", limits.KINDS)
def test_an_impossible_budget_has_an_error_with_the_smallest_figure(kind):
    least = choice.smallest_figures(problem())[kind]
    text = f"{least * 1e6 * 0.9:.4f}us" if kind == "latency" else f"{int(least * 0.9)}B"
    (found,) = choice.impossible(problem([(kind, text)]))
    assert f"fit-{kind} {text} is below the smallest that can be reached, {choice.shown(kind, least)}" in found
    more = f"{least * 1e6 * 1.01:.6f}us" if kind == "latency" else f"{int(least * 1.01)}B"
    assert choice.impossible(problem([(kind, more)])) == []


def test_budgets_that_do_not_go_together_raise_an_error():
    least = choice.smallest_figures(problem())
    # Only fp8 reaches this, and its loss was not measured.
    searched = problem([("disk", f"{int(least['disk'] * 1.001)}B")])
    with pytest.raises(ModelOptConfigError, match=r"keeps all budgets together\. The smallest of each alone: disk "):
        choice.under_budget(searched, increase, {"int4_awq": SENSITIVITIES["int4_awq"]})


def test_formats_that_were_not_measured_are_left_out():
    points = choice.under_budget(problem([("disk", "0.5x")]), increase, {"fp8": SENSITIVITIES["fp8"]})
    assert not any("int4_awq" in (point.format.attention, point.format.mlp) for point in points)


def test_formats_whose_blocks_are_larger_than_the_model_are_left_out():
    small = problem(shape=shape(hidden_size=64))
    assert {one.name for one in small.possible()} == {
        one.name for one in small.formats if "int4_awq" not in (one.attention, one.mlp)
    }
    only = problem(shape=shape(hidden_size=64), formats=formats.mixtures(("int4_awq",), cache=False))
    assert "smaller than a block of weights" in choice.impossible(only)[0]


def tried_of(points, count: int) -> list[choice.Point]:
    """Return the points that a search would try, one after the other."""
    found: list[choice.Point] = []
    while len(found) < count:
        found.append(choice.next_to_try(points, found, RECOVERY, other_format=len(found) % 2 == 1))
    return found


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_points_to_try_are_distinct_and_begin_with_the_best(count):
    points = choice.under_budget(problem([("disk", "0.4x")]), increase, SENSITIVITIES)
    found = tried_of(points, count)
    assert len({(tuple(one.sizes.values()), one.format) for one in found}) == count
    assert found[0].after(RECOVERY) == min(point.after(RECOVERY) for point in points)
    assert count < 2 or len({one.format for one in found}) >= 2


def test_there_is_nothing_to_try_when_all_is_tried():
    points = choice.under_budget(problem([("disk", "0.3x")], fixed={"num_layers": 2}), increase, SENSITIVITIES)
    assert choice.next_to_try(points, points, RECOVERY) is None


def test_loss_of_a_mixture_is_the_sum_of_its_groups():
    mixed, whole = formats.Format("fp8", "no_quant", True), formats.Format("fp8", "fp8")
    assert choice.format_loss(SENSITIVITIES, mixed) == pytest.approx(0.0015)
    assert choice.format_loss(SENSITIVITIES, whole) == 0.0025
    assert choice.format_loss(SENSITIVITIES, formats.Format()) == 0
    assert choice.format_loss({}, whole) is None and choice.format_loss({}, mixed) is None


def test_the_front_has_no_point_that_another_beats():
    points = choice.everywhere(problem(), increase, SENSITIVITIES)
    shown = choice.pareto_points(points, ("disk",), RECOVERY)
    pairs = [(point.figures["disk"], point.after(RECOVERY)) for point in shown]
    assert len(pairs) > 5 and len(pareto.front(pairs)) == len(pairs)
    for one, other in itertools.pairwise(sorted(pairs)):
        assert one[1] > other[1]


def test_probes_change_each_dimension_alone_and_all_together():
    legal = grid.choices(shape(), {}, {})
    found = grid.probes(legal)
    original = grid.sizes_of(shape())
    alone = [{name for name in sizes if sizes[name] != original[name]} for sizes in found]
    assert all({name} in alone for name in original) and set(original) in alone
    assert all(sizes[name] in legal[name] for sizes in found for name in sizes)


def test_targets_have_the_names_of_pruning():
    sizes = {"num_layers": 8, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4, "experts": 2}
    moe = shape(experts=4)
    assert grid.targets(moe, sizes) == {
        "hidden_size": 256,
        "moe_ffn_hidden_size": 512,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "num_moe_experts": 2,
    }
    assert grid.targets(shape(), {**grid.sizes_of(shape()), "num_layers": 3}) == {"num_layers": 3}

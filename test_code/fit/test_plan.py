"""The plan of a search: its file, its page, and the job that it makes. Nothing is measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nemo_modelopt_cli.compress import fit_plan, settings
from nemo_modelopt_cli.compress.fit_settings import Fit
from nemo_modelopt_cli.compress.stages import StageError
from nemo_modelopt_dropin.fit import choice, formats, grid
from nemo_modelopt_dropin.report import charts, fit, fit_figures
from test_code.fit.shapes import shape
from test_code.fit.test_choice import RECOVERY, SENSITIVITIES, increase, problem, tried_of

FIT = Fit(disk="0.4x", recovery=RECOVERY)


@pytest.fixture(scope="module")
def plan():
    """A plan as it is read from its file."""
    searched = problem([("disk", "0.4x")])
    best = tried_of(choice.under_budget(searched, increase, SENSITIVITIES), 4)
    measured = [
        replace(one, measured=factor * one.predicted, measured_shape=one.from_shape)
        for one, factor in zip(best, (1.1, 0.8, 1.3, 1.0), strict=True)
    ]
    chosen = min(measured, key=lambda point: point.after(RECOVERY))
    front = choice.pareto_points(choice.everywhere(searched, increase, SENSITIVITIES), ("disk",), RECOVERY)
    job = SimpleNamespace(fit=FIT)
    return json.loads(json.dumps(fit_plan.content(searched, front, measured, chosen, job, 4.0)))


def test_points_are_numbered_by_size_and_the_chosen_one_is_the_best_measured(plan):
    sizes = [point["figures"]["disk"] for point in plan["points"]]
    assert sizes == sorted(sizes) and [point["number"] for point in plan["points"]] == list(range(1, len(sizes) + 1))
    tried = [point for point in plan["points"] if point["measured"] is not None]
    assert len(tried) == 4
    assert fit_plan.point_of(plan, FIT)["expected"] == min(point["expected"] for point in tried)
    assert fit_plan.point_of(plan, FIT)["in_budget"]
    assert -1 <= plan["rank_correlation"] <= 1


def test_another_point_is_one_flag_away(plan):
    assert fit_plan.point_of(plan, replace(FIT, point=2))["number"] == 2
    marked = [row["point"] for row in fit_plan.rows(plan, replace(FIT, point=2)) if "*" in row["point"]]
    assert marked == ["2 *"]


def test_sentences_have_the_budget_the_sizes_and_the_correlation(plan):
    text = " ".join(fit_plan.sentences(plan, FIT))
    for part in ("Budget: disk at most ", "Format: ", "4 combinations were measured", "rank correlation", "4.0000"):
        assert part in text
    assert f"Point {plan['chosen']} of {len(plan['points'])}" in text


def test_a_plan_becomes_targets_and_algorithms(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_plan.model_sizes, "read", lambda path: shape())
    job = settings.Job("teacher", "a", "b", quantization=settings.Quantization(formats=("hf",)), fit=FIT)
    used, point = fit_plan.applied(job, plan), fit_plan.point_of(plan, FIT)
    assert not used.fit.is_set and fit_plan.prunes(used)
    pruned = shape().pruned({name: getattr(used.pruning, name) for name in settings.TARGETS})
    assert grid.sizes_of(pruned) == point["sizes"]
    assert (used.quantization.weights.attention, used.quantization.weights.mlp) == (point["attention"], point["mlp"])
    with pytest.raises(StageError, match="has not finished"):
        fit_plan.applied(job, None)
    assert fit_plan.applied(replace(job, fit=Fit()), None).fit == Fit()


def test_a_plan_that_keeps_the_model_prunes_nothing(plan, monkeypatch):
    monkeypatch.setattr(fit_plan.model_sizes, "read", lambda path: shape())
    last = plan["points"][-1]
    assert last["sizes"] == grid.sizes_of(shape()) and last["format"] == "16 bits"
    job = settings.Job("teacher", "a", "b", fit=replace(FIT, point=last["number"]))
    used = fit_plan.applied(job, plan)
    assert not fit_plan.prunes(used)
    assert used.quantization.weights == formats.Format(block=used.quantization.awq_block_size)


def test_the_page_has_a_row_and_a_dot_for_every_point(plan, tmp_path):
    rows = fit_plan.rows(plan, FIT)
    page = fit.write(plan, rows, fit_plan.sentences(plan, FIT), tmp_path).read_text()
    body = page[page.index('<table id="points"') :]
    assert body[: body.index("</table>")].count("<tr>") == len(rows) + 1
    assert re.search(r"<td[^>]*>\d+ \*</td>", body)
    figures = charts.figures(fit_figures.made(plan))
    shown = charts.shown_rows(figures["fit_front"]["spec"])
    assert [row["number"] for row in shown] == [point["number"] for point in plan["points"]]
    assert [row["point"] for row in shown].count("chosen") == 1
    assert len(charts.shown_rows(figures["fit_prediction"]["spec"])) == 4
    assert (tmp_path / "figures" / "fit_front.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_a_budget_has_no_such_figures():
    assert charts.figures(fit_figures.made(None)) == {}

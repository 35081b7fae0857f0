"""Figures and rows of the report that need more data than every run has."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nemo_modelopt_cli.compress import summary
from nemo_modelopt_cli.compress.settings import Job
from nemo_modelopt_dropin.report import charts as report_charts
from nemo_modelopt_dropin.report import compare, figures, importance
from nemo_modelopt_dropin.report import page as report
from test_code.report.test_report import (
    LOSSES,
    _candidate,
    _Page,
    _records,
    content,  # noqa: F401  the fixture
)


def test_the_front_holds_what_nothing_beats_in_size_and_loss():
    points = [{"bytes": size, "loss": loss} for size, loss in ((4, 1.0), (2, 3.0), (3, 3.5), (2, 2.0), (5, 1.0))]
    assert [(point["bytes"], point["loss"]) for point in figures.front(points)] == [(2, 2.0), (4, 1.0)]


def test_the_files_are_in_the_table_and_simulation_is_called_so(content):  # noqa: F811
    with_loss = {**content, "exports": {"hf": {"path": "p", "bytes": 7_000_000, "heldout_loss": 3.54}}}
    last = report.rows(with_loss)[-1]
    assert (last["model"], last["held-out loss"], last["on disk"], last["tokens/s"]) == (
        "hf files",
        "3.5400",
        "7.0 MB",
        "",
    )
    assert last["against teacher"] == "+0.1000"
    assert (last["params"], last["in bf16"]) == ("2.00 M", "4.0 MB"), "those of the quantized model"
    assert "simulates" in report.render(with_loss) and "simulates" in report.remark(with_loss)
    numbers = compare.numbers([with_loss, content])
    of_files = [row for row in numbers if row["model"] == "hf files"]
    assert [(row["number"], row["first"], row["second"]) for row in of_files] == [
        ("held-out loss", "3.5400", ""),
        ("perplexity", f"{math.exp(3.54):.2f}", ""),
        ("on disk", "7.0 MB", "1.2 MB"),
    ]
    unquantized = {**content, "models": content["models"][:2], "exports": {}}
    assert report.remark(unquantized) == "" and len(report.rows(unquantized)) == 2


def test_the_tradeoff_shows_every_model_and_the_file_that_was_read_back(content):  # noqa: F811
    with_file = {**content, "exports": {"hf": {"path": "p", "bytes": 7, "heldout_loss": 3.6}}}
    found = figures.tradeoff_points([("", with_file)])
    assert [point["model"] for point in found] == [model["name"] for model in content["models"]] + ["exported"]
    assert found[-1]["bytes"] == 7
    assert [point["bytes"] for point in found[:-1]] == [2 * model["parameters"] for model in content["models"]]


def test_importance_of_layers_and_units(tmp_path):
    heads = [99.0 - 99.0 * place / 31 for place in range(32)]
    pruned = {
        "layer_scores": {"1": 3.0, "2": 0.5, "3": 1.0},
        "kept_layers": [1, 3],
        "candidates": [{"parameters": 3, "loss": 2.0}],
        "hparam_scores": {
            "hidden_size": {"0": [4.0, 1.0]},
            "ffn_hidden_size": {"1": [4.0, 2.0, 1.0], "2": [4.0, 2.0, 1.0]},
            "num_attention_heads": {"2": heads},
        },
    }
    (tmp_path / "report.json").write_text(json.dumps(pruned))
    found = importance.read(tmp_path)
    assert [(one["layer"], one["fate"]) for one in found["layers"]] == [(1, "kept"), (2, "dropped"), (3, "kept")]
    assert [(one["kind"], one["layer"], len(one["shares"])) for one in found["units"]] == [
        ("attention", 2, 32),
        ("ffn", 1, 3),
        ("ffn", 2, 3),
    ]
    assert found["units"][1]["shares"] == [1.0, 0.5, 0.25]
    assert found["candidates"] == pruned["candidates"]
    assert importance.read(Path("nowhere")) == {}


def test_the_map_of_units_has_no_gaps():
    units = [{"kind": "attention", "layer": 1, "shares": [1.0, 0.5, 0.25]}]
    units += [{"kind": "ffn", "layer": i, "shares": [1 / (1 + place) for place in range(33)]} for i in (1, 2)]
    rows = report_charts.shown_rows(
        report_charts.charts({"models": [], "stages": [], "curves": [], "importance": {"units": units}})[
            "unit_importance"
        ]["spec"]
    )
    for name, count in (("attention 1", 3), ("ffn 1", 33), ("ffn 2", 33)):
        cells = [row for row in rows if row["row"] == name]
        assert (len(cells), cells[0]["from"], cells[-1]["to"]) == (count, 0, 1)
        assert [cell["to"] for cell in cells[:-1]] == [cell["from"] for cell in cells[1:]]


def test_candidates_are_drawn_with_those_that_nothing_beats(content, tmp_path):  # noqa: F811
    tried = [_candidate(70, 2.0, True), _candidate(60, 2.5), _candidate(65, 2.7), _candidate(50, math.nan)]
    with_them = json.loads(json.dumps({**content, "importance": {"candidates": tried}}))
    found = report_charts.charts(with_them)["candidates"]["spec"]
    datasets = [layer["data"]["values"] for layer in found["layer"]]
    line = [(row["parameters"], row["loss"]) for row in datasets[0]]
    dots = {(row["parameters"], row["loss"], row["kept"]) for row in datasets[1]}
    assert line == [(60, 2.5), (70, 2.0)]
    assert dots == {(70, 2.0, "kept"), (60, 2.5, "tried"), (65, 2.7, "tried")}, "a loss that is NaN has no place"
    page = report.write(with_them, tmp_path)
    assert (tmp_path / "figures" / "candidates.png").read_bytes().startswith(b"\x89PNG")
    assert '"candidates"' in _Page(page.read_text(encoding="utf-8")).scripts["specifications"]


def test_recovery_goes_from_no_to_full_distillation():
    found = summary.build(_records(), "t", Job("t", "a", "b"))["recovery"]
    tokens = 16 * 128  # of a step of the default job
    assert [(point["steps"], point["tokens"], point["loss"]) for point in found] == [
        (0, 0, LOSSES["prune"]),
        (20, 20 * tokens, 3.5),
        (1000, 1000 * tokens, LOSSES["distill"]),
    ]
    lost = LOSSES["prune"] - LOSSES["teacher"]
    assert [point["regained"] for point in found] == [
        pytest.approx(share) for share in (0, (3.83 - 3.5) / lost, (3.83 - 3.52) / lost)
    ]
    assert summary.build({"teacher": _records()["teacher"]}, "t", Job("t", "a", "b"))["recovery"] == []


def test_held_out_losses_during_training_start_with_the_pruned_model(content):  # noqa: F811
    found = figures.heldout_points(content)
    distilled = [point for point in found if point["model"] == "distilled"]
    assert [(point["step"], point["loss"]) for point in distilled] == [(0, 3.83), (20, 3.5), (1000, 3.52)]
    assert distilled[1]["tokens"] == 20 * 16 * 128 and distilled[1]["regained"] == pytest.approx(0.33 / 0.39)
    assert [point for point in found if point["model"] == "from scratch"] == [
        {"model": "from scratch", "step": 20, "loss": LOSSES["scratch"]}
    ]
    # An earlier version had no "recovery".
    earlier = figures.heldout_points({**content, "recovery": []})
    assert [(point["step"], point["loss"]) for point in earlier if point["model"] == "distilled"] == [
        (0, LOSSES["prune"]),
        (20, LOSSES["distill"]),
    ]
    assert "recovery" not in report_charts.charts(content), "one figure shows these points"


def test_finished_job_steps_are_described_in_sentences():
    records = _records()
    records["prune"].result["shape"] = {"num_layers": 3}
    found = summary.build(records, "t", Job("t", "a", "b"))["done"]
    assert found[0] == "Pruned: num layers 4 to 3."
    assert found[1].startswith("Distilled: 1000 steps, 2,048,000 tokens")


def test_spikes_of_a_loss_are_marked(content):  # noqa: F811
    smooth = [{"step": step, "loss": 1.0 + 0.1 * (step % 3)} for step in range(12)]
    jump = [{**point, "loss": 4.0} if point["step"] in (2, 8) else point for point in smooth]
    made = {}
    for name, points in {"smooth": smooth, "jump": jump}.items():
        curves = [{"model": "distilled", "points": points, "unit": "step"}]
        made[name] = report_charts.charts({**content, "curves": curves})["distillation_curve"]
    marked = [row["step"] for row in report_charts.shown_rows(made["jump"]["spec"]) if row["spike"]]
    assert marked == [8], "before the sixth point nothing is known to compare with"
    assert made["jump"]["spec"]["layer"][1]["mark"]["type"] == "point"
    assert made["jump"]["csv"].splitlines()[0] == "model,step,loss,spike"
    assert "layer" not in made["smooth"]["spec"] and made["smooth"]["csv"].splitlines()[0] == "model,step,loss"

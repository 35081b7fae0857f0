"""The headline of the report, numbers that are missing, and reports of earlier versions."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest

from nemo_modelopt_dropin.report import compare, figures, headline
from nemo_modelopt_dropin.report import page as report
from test_code.report.test_report import (
    _Page,
    content,  # noqa: F401  the fixture
)


def _answers(content) -> dict[str, tuple[str, str]]:  # noqa: F811
    return {one["question"]: (one["answer"], " ".join(one["sentences"])) for one in headline.answers(content)}


def test_the_headline_answers_how_small_how_good_how_fast(content):  # noqa: F811
    student = {"parameters": 1_000_000, "heldout_tokens_per_second": 1500.0}
    models = [{**model, **student} if model["name"] != "teacher" else model for model in content["models"]]
    found = _answers({**content, "models": models, "exports": {"hf": {"bytes": 1_000_000, "heldout_loss": 3.54}}})
    assert found["How small?"] == (
        "50% of the parameters",
        "1.00 M parameters, the teacher has 2.00 M. In bf16: 2.0 MB, the teacher 4.0 MB. The exported Hugging Face "
        "files take 1.0 MB on disk, 25% of the teacher in bf16.",
    )
    assert found["How good?"] == (
        "0.1000 nats worse than the teacher",
        "Held-out loss of the exported Hugging Face files: 3.5400 nats per token, of the teacher 3.4400. Perplexity: "
        "34.47, the teacher 31.19.",
    )
    assert found["How fast?"] == (
        "1.50 times the teacher's speed",
        "Forward passes over the held-out text on this machine, before quantization: 1,500 tokens/s, the teacher "
        "1,000. Other work on the machine changes these speeds. Generation was not measured, nor was the speed of the "
        "quantized format.",
    )


def test_a_speed_that_the_machine_disturbed_is_reported_as_a_range(content):  # noqa: F811
    speeds = {"teacher": 1000.0, "pruned": 2000.0, "distilled": 5700.0, "from scratch": 1400.0, "quantized": 900.0}
    models = [
        {**model, "heldout_tokens_per_second": speeds[model["name"]], "parameters": 1_000_000}
        for model in content["models"]
    ]
    answer, sentences = _answers({**content, "models": models})["How fast?"]
    assert answer == "1.4 to 5.7 times the teacher's speed"
    assert "models of the same size were measured at 1,400 to 5,700 tokens/s" in sentences


def test_the_headline_reports_what_was_not_measured(content):  # noqa: F811
    found = _answers({**content, "exports": {"nemo": {"bytes": 5, "path": "p"}}})
    assert "The size of the quantized format was not measured" in found["How small?"][1]
    assert "Held-out loss of the quantized model: 3.5300" in found["How good?"][1]
    assert "The loss of the exported files was not measured." in _answers(content)["How good?"][1]
    models = [{**model, "heldout_tokens_per_second": None} for model in content["models"][:2]]
    found = _answers({**content, "models": models, "exports": {}})
    assert found["How fast?"][0] == "not measured"
    for loss, answer in ((3.44001, "as good as the teacher"), (3.4, "0.0400 nats better than the teacher")):
        models[1]["heldout_loss"] = loss
        assert _answers({**content, "models": models, "exports": {}})["How good?"][0] == answer
    assert "quantized" not in " ".join(text for _, text in found.values())
    models[1]["heldout_loss"] = math.nan
    assert _answers({**content, "models": models})["How good?"][0] == "unknown"
    assert headline.answers({**content, "models": content["models"][:1]}) == []


def test_a_loss_that_is_not_a_number_leaves_a_page_that_browsers_can_read(content):  # noqa: F811
    def fail(name):
        raise AssertionError(f"{name} is not JSON")

    broken = copy.deepcopy(content)
    broken["models"][2]["heldout_loss"] = math.nan
    page = _Page(report.render(broken))
    for name in ("report", "specifications"):
        json.loads(page.scripts[name], parse_constant=fail)
    assert "nan" in page.cells


# --- earlier versions -------------------------------------------------------------------------------------------------


@pytest.fixture
def first() -> dict:
    """Return a report of the first version, which had no importance, recovery, sensitivity nor sentences."""
    return json.loads((Path(__file__).parents[1] / "data" / "report_first.json").read_text(encoding="utf-8"))


def test_the_report_of_the_first_version_still_renders(first):
    page = _Page(report.render(first))
    assert {"models", "files", "heldout_by_stage", "heldout_curves", "tradeoff", "sizes", "times"} <= page.ids
    assert f"{first['models'][1]['heldout_loss']:.4f}" in page.cells
    steps = [point["step"] for point in figures.heldout_points(first)]
    assert steps == [0, 4, 8]
    assert report.table(first).row_count == len(first["models"]) + 1
    assert len(headline.answers(first)) == 3


def test_reports_of_two_versions_can_be_compared(first, content):  # noqa: F811
    for contents in ([first, content], [content, first], [first, {**content, "key of a newer version": {"a": [1]}}]):
        page = _Page(compare.render(("a", "b"), contents))
        for run in contents:
            assert f"{run['models'][0]['heldout_loss']:.4f}" in page.cells
        assert {"losses", "tradeoff", "curves"} <= page.ids
        assert compare.table(("a", "b"), contents).row_count > 10

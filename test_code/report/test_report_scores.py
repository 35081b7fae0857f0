"""Scores on tasks of lm-eval: in the report's table, headline and comparison, and on the screen."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from nemo_modelopt_cli.compress import summary
from nemo_modelopt_cli.compress.settings import Job
from nemo_modelopt_dropin.report import compare, headline, scores
from nemo_modelopt_dropin.report import page as report
from test_code.report.test_report import _Page, _record, _records


def _score(task: str, value: float, stderr: float | None = 0.01, **more) -> dict[str, Any]:
    usual = {"metric": "acc", "filter": "none", "higher_is_better": True, "part_of": None}
    return {"task": task, "value": value, "stderr": stderr, **usual, **more}


def _evaluation(change: float = 0.0) -> dict[str, Any]:
    member = {"part_of": "mmlu"}
    text = {"metric": "word_perplexity", "higher_is_better": False, "stderr": None}
    teacher = [_score("mmlu", 0.5), _score("mmlu_law", 0.25, **member), _score("wiki", 12.345, **text)]
    last = [_score("mmlu", 0.48 + change), _score("mmlu_law", 0.2, **member), _score("wiki", 13.0, **text)]
    models = [{"model": name, "seconds": 1.0, "scores": s} for name, s in (("teacher", teacher), ("hf files", last))]
    return {"backend": "hf", "limit": 9, "packages": {"lm_eval": "0.4.13", "transformers": "4.57"}, "models": models}


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    records = _records() | {"evaluate": _record("evaluate", **_evaluation())}
    return summary.build(records, "title", Job("t", "a", "b"))


def test_the_table_has_values_errors_and_the_change_and_folds_members_of_groups():
    assert scores.rows(_evaluation()) == [
        {
            "task": "mmlu",
            "metric": "acc ↑",
            "teacher": "0.5000 ± 0.0100",
            "hf files": "0.4800 ± 0.0100",
            "change": "-0.0200",
        },
        {"task": "wiki", "metric": "word_perplexity ↓", "teacher": "12.35", "hf files": "13.00", "change": "+0.6550"},
    ]
    (member,) = scores.rows(_evaluation(), members=True)
    assert (member["task"], member["change"]) == ("mmlu_law", "-0.0500")


@pytest.mark.parametrize("evaluation", [None, {}])
def test_a_run_without_scores_shows_none(evaluation):
    assert scores.rows(evaluation) == [] and [*scores.sentences(evaluation)] == []
    content = summary.build(_records(), "title", Job("t", "a", "b"))
    assert content["evaluation"] == {}
    old = {name: value for name, value in content.items() if name != "evaluation"}
    for one in (content, old):  # reports of earlier versions lack the key
        assert "scores" not in _Page(report.render(one)).ids


def test_a_score_that_one_model_lacks_leaves_its_cell_empty():
    evaluation = _evaluation()
    del evaluation["models"][1]["scores"][0]
    row = scores.rows(evaluation)[0]
    assert (row["teacher"], row["hf files"], row["change"]) == ("0.5000 ± 0.0100", "", "")


def test_the_page_and_the_headline_show_the_scores(content):
    page = _Page(report.render(content))
    assert {"scores", "scores-of-members"} <= page.ids
    for text in ("0.4800 ± 0.0100", "word_perplexity ↓", "mmlu_law", "-0.0200"):
        assert text in page.cells
    how_good = headline.answers(content)[1]["sentences"]
    assert "mmlu, acc: 0.4800 ± 0.0100 (hf files), the teacher 0.5000 ± 0.0100." in how_good


def test_the_screen_names_what_computed_the_scores():
    out = io.StringIO()
    Console(file=out, width=100).print(scores.table(_evaluation()))
    text = " ".join(out.getvalue().split())
    assert "lm-eval 0.4.13, transformers 4.57, at most 9 rows of each task" in text
    assert "0.4800 ± 0.0100" in text


def test_a_comparison_of_runs_compares_the_scores(content):
    other = {**content, "evaluation": _evaluation(change=0.12)}
    found = {(row["model"], row["number"]): row for row in compare.numbers([content, other])}
    row = found["hf files", "mmlu acc"]
    assert (row["first"], row["second"], row["change"]) == ("0.4800 ± 0.0100", "0.6000 ± 0.0100", "+25.0%")
    one_sided = compare.numbers([{**content, "evaluation": {}}, other])
    row = next(row for row in one_sided if row["number"] == "wiki word_perplexity")
    assert (row["first"], row["second"], row["change"]) == ("", "12.35", "")

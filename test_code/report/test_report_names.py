"""Names come from files, folders and models of others: every page shows them as text, whatever they are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nemo_modelopt_dropin.report import compare, pruning, quantization
from nemo_modelopt_dropin.report import page as report
from test_code.report.test_report import (
    _candidate,
    _Page,
    content,  # noqa: F401  the fixture
)

HOSTILE = "</td></script><script>alert(1)</script><img src=x onerror=alert(2)>"


def hostile(value: Any) -> Any:
    """Return the numbers of a report with something hostile behind every text and name in it."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, list | tuple):
        return [hostile(one) for one in value]
    return {key: hostile(one) for key, one in value.items()} if isinstance(value, dict) else value


def _compress(content):  # noqa: F811
    found = hostile(content)
    found["settings"] = {f"lr{HOSTILE}": {f"deep{HOSTILE}": HOSTILE}, **found["settings"]}
    return found, report.render(found)


def _compare(content):  # noqa: F811
    found, _ = _compress(content)
    other = json.loads(json.dumps(found))
    found["settings"]["job"] = {f"seed{HOSTILE}": f"1{HOSTILE}"}
    other["settings"]["job"] = {f"seed{HOSTILE}": f"2{HOSTILE}"}
    names = (f"a{HOSTILE}", f"b{HOSTILE}")
    return {"names": list(names), "runs": [found, other]}, compare.render(names, [found, other])


def _quantization(content):  # noqa: F811
    layer = {"weight_format": "fp8", "weight_sqnr_db": 30.1, "activation_format": "fp8", "activation_sqnr_db": 31.0}
    found = hostile(
        {
            "title": "Quantization",
            "created": "now",
            "algorithm": "fp8",
            "loss_before": 2.0,
            "loss_after": 2.1,
            "layers": [{"layer": f"decoder.layers.{i}", **layer} for i in range(3)],
            "sensitivity": [
                {"group": name, "kl_to_original": 1e-3, "relative_output_error": 0.1, "loss_increase": 0.01}
                for name in ("attention", "mlp")
            ],
        }
    )
    found |= {"settings": {f"algorithm{HOSTILE}": HOSTILE}, "versions": {f"torch{HOSTILE}": HOSTILE}}
    values = {"title": found["title"], "report": found, "facts": quantization.facts(found)}
    figures = quantization.charts(found)
    assert len(figures) == 2
    return found, report.render_template("quantization_report.html.j2", figures, found, **values)


def _pruning(content):  # noqa: F811
    sizes = {"parameters": 100, "num_layers": 2, f"hidden{HOSTILE}": 8}
    cost = {"weight_bytes": 200, "flops_per_token": 300, "kv_cache_bytes_per_token": 4}
    found = {
        "title": HOSTILE,
        "created": HOSTILE,
        "before": sizes,
        "after": {**sizes, "parameters": 60},
        "cost": {"before": cost, "after": cost},
        "kept_layers": [1, 2],
        "layer_scores": {"1": 0.5, "2": 0.25},
        "hparam_scores": {"hidden_size": {"0": [3.0, 1.0]}},
        "candidates": [
            {**_candidate(60, 2.5, True), "sizes": {f"ffn{HOSTILE}": 4}, "active_parameters": 60},
            {**_candidate(70, 2.6), "active_parameters": 70},
        ],
        "original_heldout_loss": 2.4,
    }
    figures = pruning.charts(found)
    values = {"title": found["title"], "report": found, "rows": pruning.rows(found)}
    return found, report.render_template(pruning._TEMPLATE, figures, found, **values)


@pytest.mark.parametrize("make", [_compress, _compare, _quantization, _pruning], ids=lambda make: make.__name__[1:])
def test_a_script_in_every_name_is_text(make, content):  # noqa: F811
    numbers, text = make(content)
    tags: dict[str, int] = {}

    class Page(_Page):
        def handle_starttag(self, tag, attributes):
            tags[tag] = tags.get(tag, 0) + 1
            assert not any(name.startswith("on") for name, _ in attributes), "a handler of events"
            super().handle_starttag(tag, attributes)

    page = Page(text)
    assert tags["script"] == 3 and "img" not in tags, "only our own: the numbers, the figures and what draws them"
    assert json.loads(page.scripts["report"]) == json.loads(json.dumps(numbers))
    assert "alert(1)" in page.scripts["specifications"] or make is _pruning
    assert "alert" in page.title and any("<script>alert(1)</script>" in cell for cell in page.cells)

"""Write the report of a pruning: ``report.json``, a self-contained ``report.html`` and PNG figures.

It shows what `describe_pruning` returns: sizes and costs before and after, scores by layer and hparam, and candidates.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_modelopt_dropin.report import charts as report_charts
from nemo_modelopt_dropin.report import figures as report_figures
from nemo_modelopt_dropin.report import page

if TYPE_CHECKING:
    import altair as alt

_TEMPLATE = "prune_report_template.html.j2"


def write(content: Mapping[str, Any], folder: Path) -> Path:
    """Write all files of the report and return the page's path.

    Args:
        content: the dictionary that `describe_pruning` returns.
        folder: created if it is missing; an earlier report in it is replaced.
    """
    content = {
        "title": "Pruning",
        "created": datetime.datetime.now().isoformat(sep=" ", timespec="minutes"),
        # As it is after reading it from the file: keys are strings.
        **json.loads(json.dumps(content)),
    }
    figures = charts(content)
    values = {"title": content["title"], "report": content, "rows": rows(content)}
    return page.write_files(folder, content, figures, page.render_template(_TEMPLATE, figures, content, **values))


def rows(content: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the table of sizes and costs as text."""
    before, after = ({**content[when], **content["cost"][when]} for when in ("before", "after"))
    times = content.get("forward_seconds", {})
    if times:
        before["forward_milliseconds"], after["forward_milliseconds"] = (
            round(1000 * times[when], 3) for when in ("before", "after")
        )
    return [
        {
            "name": name.replace("_", " "),
            "before": f"{old:,}",
            "after": f"{after.get(name, old):,}",
            "ratio": f"{after.get(name, old) / old:.2f}" if old else "",
        }
        for name, old in before.items()
    ]


def charts(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return every figure for which the report has data, as `charts.figures` does."""
    made: dict[str, tuple[str, str, alt.TopLevelMixin | None]] = {
        "candidates": (
            "Candidates",
            report_figures.CANDIDATES,
            report_figures.candidates(content.get("candidates", [])),
        ),
        "layer_scores": (
            "Importance of layers",
            "One minus the cosine of a layer's input and output, summed over the data. The lowest are dropped first.",
            _layers(content.get("layer_scores", {}), set(content["kept_layers"])),
        ),
    }
    for hparam, layers in content.get("hparam_scores", {}).items():
        made[f"scores_{hparam}"] = (
            f"Importance: {hparam}",
            "Units of each layer from most to least important, relative to the most important unit of the layer"
            + (" (0 is the whole model)." if "0" in layers else "."),
            _units(layers),
        )
    return report_charts.figures(made)


def _layers(scores: Mapping[str, float], kept: set[int]) -> alt.Chart | None:
    import altair as alt

    if not scores:
        return None
    values = [
        {"layer": int(number), "score": score, "state": "kept" if int(number) in kept else "dropped"}
        for number, score in scores.items()
    ]
    return (
        alt.Chart(report_figures.inline(values))
        .mark_bar()
        .encode(
            x=alt.X("layer:O", title="layer"),
            y=alt.Y("score:Q"),
            color=alt.Color("state:N", scale=alt.Scale(domain=["kept", "dropped"], range=["#2a9d6f", "#9aa5b1"])),
            tooltip=["layer:O", alt.Tooltip("score:Q", format=".4g"), "state:N"],
        )
    )


def _units(layers: Mapping[str, list[float]]) -> alt.Chart:
    import altair as alt

    values = [
        {"layer": int(number), "place": index / max(1, len(curve) - 1), "importance": value / (curve[0] or 1.0)}
        for number, curve in layers.items()
        for index, value in enumerate(curve)
    ]
    return (
        alt.Chart(report_figures.inline(values))
        .mark_line(strokeWidth=1.2)
        .encode(
            x=alt.X("place:Q", title="units, from most to least important", axis=alt.Axis(format="%")),
            y=alt.Y("importance:Q", title="relative importance"),
            # A gradient, because a model has too many layers for a legend with one entry per layer.
            color=alt.Color(
                "layer:Q",
                scale=alt.Scale(scheme="viridis"),
                legend=alt.Legend(format="d", tickMinStep=1) if len(layers) > 1 else None,
            ),
            detail="layer:O",
            tooltip=["layer:O", alt.Tooltip("importance:Q", format=".3f")],
        )
    )

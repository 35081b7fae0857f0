"""Make the figures of a report as Vega-Lite specifications with Altair; text and axes use the page's colour."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_modelopt_dropin.report import figures as report_figures
from nemo_modelopt_dropin.report import fit_figures

if TYPE_CHECKING:
    import altair as alt

_HEIGHT = 220
_TRADEOFF = (
    "Size against held-out loss. Models count 2 bytes per parameter (bf16); exported: the measured size of the Hugging "
    "Face files, tokenizer included."
)
_SPIKES = " Triangles mark spikes: losses of more than twice the median of the five points before."
_FRONT = " The line joins the models that no other model beats in both."
_PNG_WIDTH = 640
_LABEL_LIMIT = 220
# A loss is marked as a spike if it is this many times the median of this many points before it.
_SPIKE, _BEFORE = 2.0, 5
# Entries of a legend in one line of a PNG; on the page, the script computes them from the width of the figure.
_PNG_LEGEND_COLUMNS = 5


def charts(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return every figure for which the report has data, as `figures` does."""
    makers = {
        "heldout_by_stage": (
            "Held-out loss by job step",
            "Nats per token on documents that were not used for training, measured the same way for every checkpoint.",
            _by_model,
        ),
        "heldout_curves": (
            "Held-out loss during training",
            "Nats per token. Distillation starts at step 0 with the pruned model; the dashed line is the teacher.",
            report_figures.heldout_curves,
        ),
        "training_curves": (
            "Training loss",
            "Next-token cross entropy of each batch, in nats per token." + _SPIKES,
            lambda report: _training_curves(report, {"teacher", "from scratch"}, "cross entropy"),
        ),
        "distillation_curve": (
            "Distillation loss",
            "KL divergence from teacher to student on each batch, in nats per token." + _SPIKES,
            lambda report: _training_curves(report, {"distilled"}, "KL divergence"),
        ),
        "tradeoff": ("Size and loss", _TRADEOFF + _FRONT, lambda report: report_figures.tradeoff([("", report)])),
        "candidates": (
            "Pruning candidates",
            report_figures.CANDIDATES,
            lambda report: report_figures.candidates((report.get("importance") or {}).get("candidates") or []),
        ),
        "layer_importance": (
            "Importance of layers",
            "How much each layer changes its input (block influence). The least important layers are dropped first.",
            report_figures.layer_importance,
        ),
        "unit_importance": (
            "Importance of units",
            "Units of each layer from most to least important, relative to the most important unit of the layer.",
            report_figures.unit_importance,
        ),
        "weight_error": (
            "Quantization error of weights by layer",
            "Relative change of the weights caused by quantization. Layers with a high error are sensitive.",
            report_figures.weight_error,
        ),
        "sizes": ("Parameters", "Body: all parameters except embedding and output layer.", _sizes),
        "times": ("Time by job step", "Wall-clock seconds of the attempt that completed.", _times),
    }
    made = {name: (title, caption, maker(content)) for name, (title, caption, maker) in makers.items()}
    return figures(fit_figures.made((content.get("fit") or {}).get("plan")) | made)


def comparison(names: tuple[str, str], contents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the figures that compare two runs, as `figures` does."""
    runs = list(zip(names, contents, strict=True))
    made = {
        "losses": ("Held-out loss", "Nats per token for the models of each run.", report_figures.losses_of_runs(runs)),
        "tradeoff": ("Size and loss", _TRADEOFF, report_figures.tradeoff(runs)),
        "curves": (
            "Held-out loss during training",
            "Nats per token. Distillation starts at step 0 with the pruned model.",
            report_figures.curves_of_runs(runs),
        ),
    }
    return figures(made)


def figures(made: Mapping[str, tuple[str, str, alt.TopLevelMixin | None]]) -> dict[str, dict[str, Any]]:
    """Return name -> title, caption, specification and CSV data of the charts, without the missing ones.

    Args:
        made: name -> title, caption and chart; the chart is None if there is no data for it.
    """
    found = {}
    for name, (title, caption, chart) in made.items():
        if chart is not None:
            spec = specification(chart)
            found[name] = {"title": title, "caption": caption, "spec": spec, "csv": csv_text(shown_rows(spec))}
    return found


def shown_rows(spec: Any) -> list[dict[str, Any]]:
    """Return the rows of the data that a specification shows, which `figures.inline` marked."""
    if isinstance(spec, list):
        return next((rows for part in spec if (rows := shown_rows(part))), [])
    if not isinstance(spec, dict):
        return []
    data = spec.get("data")
    if isinstance(data, dict) and data.get("name") == report_figures.DATA:
        return data["values"]
    return shown_rows(spec.get("layer"))


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV; a value that a row does not have is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def data_uri(text: str) -> str:
    """Return CSV text as an address that needs no network."""
    return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"


def specification(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """Return the chart with its data embedded, as wide as its container, in the page's text colour."""
    import altair as alt

    height = _HEIGHT if chart.height is alt.Undefined else chart.height
    text = {"labelColor": "currentColor", "titleColor": "currentColor"}
    styled = chart.properties(width="container", height=height, background="transparent").configure(
        axis={**text, "gridColor": "#8884", "domainColor": "#8888", "tickColor": "#8888", "labelOverlap": "greedy"},
        axisY={"labelLimit": _LABEL_LIMIT},
        legend={
            **text,
            "orient": "top",
            "title": None,
            "symbolBaseFillColor": "currentColor",
            "symbolBaseStrokeColor": "currentColor",
        },
        view={"stroke": None},
        font="system-ui, sans-serif",
        autosize={"type": "fit", "contains": "padding"},
    )
    spec = finite(styled.to_dict())
    # Two legends of a figure are stacked, because next to each other they do not fit a phone. Altair does not know this
    # setting of Vega.
    spec["config"]["legend"]["layout"] = {"top": {"anchor": "start", "direction": "vertical"}}
    return spec


def finite(value: Any) -> Any:
    """Return plain data with None for numbers that JSON does not have (NaN and infinity)."""
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def png(specification: Mapping[str, Any]) -> bytes:
    """Return the figure as a PNG on white, at twice the usual resolution."""
    import vl_convert

    fixed = json.loads(json.dumps(specification).replace("currentColor", "#222222"))
    fixed |= {"width": _PNG_WIDTH, "background": "white"}
    fixed["config"]["legend"]["columns"] = _PNG_LEGEND_COLUMNS
    return vl_convert.vegalite_to_png(fixed, scale=2)


def _by_model(content: Mapping[str, Any]) -> alt.LayerChart | None:
    import altair as alt

    models = content["models"]
    if not models:
        return None
    names = [model["name"] for model in models]
    values = [{"model": model["name"], "loss": model["heldout_loss"]} for model in models]
    base = alt.Chart(report_figures.inline(values)).encode(
        x=alt.X("loss:Q", title="nats per token", scale=alt.Scale(zero=False, padding=24), axis=alt.Axis(tickCount=6)),
        y=alt.Y("model:N", sort=names, title=None),
        tooltip=["model:N", alt.Tooltip("loss:Q", format=".4f")],
    )
    # Points instead of bars, because the axis does not start at zero.
    points = base.mark_point(filled=True, size=160, opacity=1).encode(
        color=report_figures.model_colour(names, legend=False)
    )
    numbers = base.mark_text(dy=-14, color="currentColor").encode(text=alt.Text("loss:Q", format=".3f"))
    return points + numbers


def _training_curves(content: Mapping[str, Any], models: set[str], title: str) -> alt.TopLevelMixin | None:
    import altair as alt

    values = [
        {"model": curve["model"], "step": point["step"], "loss": point["loss"]}
        for curve in content["curves"]
        if curve["model"] in models
        for point in curve["points"]
        if "loss" in point
    ]
    if not values:
        return None
    marked = _with_spikes(values)
    chosen = alt.selection_point(fields=["model"], bind="legend")  # by a click on a name in the legend
    base = alt.Chart(report_figures.inline(marked)).encode(
        x=report_figures.steps(),
        y=alt.Y("loss:Q", title=title, scale=alt.Scale(zero=False)),
        color=report_figures.model_colour(list(dict.fromkeys(value["model"] for value in values))),
        opacity=alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.15)),
        tooltip=["model:N", "step:Q", alt.Tooltip("loss:Q", format=".4f")],
    )
    line = base.mark_line(strokeWidth=1.5).add_params(chosen)
    if marked is values:
        return line
    return line + base.transform_filter("datum.spike").mark_point(shape="triangle-up", size=70, filled=True)


def _with_spikes(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points of curves with a mark ``spike``; the same list if there is none.

    A spike is a loss of more than twice the median of the points before it, at most `_BEFORE` of them.
    """
    marked, before = [], dict[str, list[float]]()
    for value in values:
        losses = before.setdefault(value["model"], [])
        recent = losses[-_BEFORE:]
        spike = len(recent) == _BEFORE and value["loss"] > _SPIKE * statistics.median(recent)
        marked.append({**value, "spike": spike})
        losses.append(value["loss"])
    return marked if any(value["spike"] for value in marked) else values


def _sizes(content: Mapping[str, Any]) -> alt.Chart | None:
    import altair as alt

    values = []
    for model in content["models"]:
        body = model["body_parameters"]
        values.append({"model": model["name"], "part": "body", "order": 0, "count": body})
        values.append(
            {"model": model["name"], "part": "embedding and output", "order": 1, "count": model["parameters"] - body}
        )
    if not values:
        return None
    parts = alt.Scale(domain=["body", "embedding and output"], range=["#3b82c4", "#9aa5b1"])
    return (
        alt.Chart(report_figures.inline(values))
        .mark_bar()
        .encode(
            x=alt.X("count:Q", title="parameters", axis=alt.Axis(format="~s", tickCount=6)),
            y=alt.Y("model:N", sort=[model["name"] for model in content["models"]], title=None),
            color=alt.Color("part:N", scale=parts),
            order=alt.Order("order:Q"),
            tooltip=["model:N", "part:N", alt.Tooltip("count:Q", format=",")],
        )
    )


def _times(content: Mapping[str, Any]) -> alt.Chart | None:
    import altair as alt

    values = [{"stage": stage["name"], "seconds": stage["seconds"]} for stage in content["stages"]]
    if not values:
        return None
    return (
        alt.Chart(report_figures.inline(values))
        .mark_bar(color="#3b82c4")
        .encode(
            x=alt.X("seconds:Q", title="seconds", axis=alt.Axis(tickCount=6)),
            y=alt.Y("stage:N", sort=[value["stage"] for value in values], title=None),
            tooltip=["stage:N", alt.Tooltip("seconds:Q", format=".1f")],
        )
    )

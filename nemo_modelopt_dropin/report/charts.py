"""The figures of a report as Vega-Lite specifications, drawn by Altair; texts and axes take the page's own colour."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_modelopt_dropin.report import figures as report_figures

if TYPE_CHECKING:
    import altair as alt

_HEIGHT = 220
_PNG_WIDTH = 640


def charts(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return name -> title, caption and specification of every figure that the report has data for."""
    makers = {
        "heldout_by_stage": (
            "Held-out loss by stage",
            "Nats per token on documents that no training saw, measured the same way on each stage's checkpoint.",
            _by_model,
        ),
        "heldout_curves": ("Held-out loss while training", "Nats per token after so many steps.", _heldout_curves),
        "training_curves": (
            "Training loss",
            "Next-token cross entropy of the batch, in nats per token.",
            lambda report: _training_curves(report, {"teacher", "from scratch"}, "cross entropy"),
        ),
        "distillation_curve": (
            "Distillation loss",
            "KL divergence from teacher to student on the batch, in nats per token.",
            lambda report: _training_curves(report, {"distilled"}, "KL divergence"),
        ),
        "tradeoff": (
            "Size and loss",
            "Each model's size on disk against its held-out loss; the line joins those that no other beats in both.",
            lambda report: report_figures.tradeoff([("", report)]),
        ),
        "recovery": (
            "Loss recovered by distillation",
            "Held-out loss after no, some and full distillation; dashed: the teacher's.",
            report_figures.recovery,
        ),
        "candidates": (
            "Candidates of the pruning",
            report_figures.CANDIDATES,
            lambda report: report_figures.candidates((report.get("importance") or {}).get("candidates") or []),
        ),
        "layer_importance": (
            "Importance of layers",
            "How much each layer changes what passes through it (block influence); the least important go first.",
            report_figures.layer_importance,
        ),
        "unit_importance": (
            "Importance of units",
            "Units of each layer from most to least important, as a share of the layer's most important one.",
            report_figures.unit_importance,
        ),
        "weight_error": (
            "Quantization error of weights by layer",
            "Relative change of a layer's weights by quantization: where it is high, the layer is sensitive.",
            report_figures.weight_error,
        ),
        "sizes": ("Parameters", "Body: everything but embedding and output layer.", _sizes),
        "times": ("Time by stage", "Wall-clock seconds of the attempt that finished.", _times),
    }
    return figures({name: (title, caption, maker(content)) for name, (title, caption, maker) in makers.items()})


def comparison(names: tuple[str, str], contents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the figures of two runs side by side, as `charts` does for one."""
    runs = list(zip(names, contents, strict=True))
    made = {
        "losses": ("Held-out loss", "Nats per token of each run's models.", report_figures.losses_of_runs(runs)),
        "tradeoff": (
            "Size and loss",
            "Each model's size on disk against its held-out loss.",
            report_figures.tradeoff(runs),
        ),
        "curves": (
            "Held-out loss while training",
            "Nats per token after so many steps.",
            report_figures.curves_of_runs(runs),
        ),
    }
    return figures(made)


def figures(made: Mapping[str, tuple[str, str, alt.TopLevelMixin | None]]) -> dict[str, dict[str, Any]]:
    """Return name -> title, caption and specification of the charts that there are.

    Args:
        made: name -> title, caption and chart, None where there is no data for it.
    """
    return {
        name: {"title": title, "caption": caption, "spec": specification(chart)}
        for name, (title, caption, chart) in made.items()
        if chart is not None
    }


def specification(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """Return the chart with data inside, as wide as its place on the page, in the page's text colour."""
    import altair as alt

    height = _HEIGHT if chart.height is alt.Undefined else chart.height
    text = {"labelColor": "currentColor", "titleColor": "currentColor"}
    styled = chart.properties(width="container", height=height, background="transparent").configure(
        axis={**text, "gridColor": "#8884", "domainColor": "#8888", "tickColor": "#8888"},
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
    return styled.to_dict()


def png(specification: Mapping[str, Any]) -> bytes:
    """Return the figure on white, at twice the usual resolution."""
    import vl_convert

    fixed = json.loads(json.dumps(specification).replace("currentColor", "#222222"))
    fixed |= {"width": _PNG_WIDTH, "background": "white"}
    return vl_convert.vegalite_to_png(fixed, scale=2)


def inline(values: list[dict[str, Any]]) -> alt.Data:
    """Return a figure's data as part of its specification."""
    import altair as alt

    return alt.Data(values=values)


def _by_model(content: Mapping[str, Any]) -> alt.LayerChart | None:
    import altair as alt

    models = content["models"]
    if not models:
        return None
    names = [model["name"] for model in models]
    values = [{"model": model["name"], "loss": model["heldout_loss"]} for model in models]
    base = alt.Chart(inline(values)).encode(
        x=alt.X("loss:Q", title="nats per token", scale=alt.Scale(zero=False, padding=24), axis=alt.Axis(tickCount=6)),
        y=alt.Y("model:N", sort=names, title=None),
        tooltip=["model:N", alt.Tooltip("loss:Q", format=".4f")],
    )
    # Points and not bars: the axis does not start at zero.
    points = base.mark_point(filled=True, size=160, opacity=1).encode(
        color=report_figures.model_colour(names, legend=False)
    )
    numbers = base.mark_text(dy=-14, color="currentColor").encode(text=alt.Text("loss:Q", format=".3f"))
    return points + numbers


def _heldout_curves(content: Mapping[str, Any]) -> alt.Chart | None:
    import altair as alt

    values = [
        {"model": curve["model"], "step": point["step"], "loss": point["heldout"]}
        for curve in content["curves"]
        for point in curve["points"]
        if "heldout" in point
    ]
    if not values:
        return None
    chosen = alt.selection_point(fields=["model"], bind="legend")  # a click on a name in the legend
    return (
        alt.Chart(inline(values))
        .mark_line(point=True)
        .encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False)),
            color=report_figures.model_colour(list(dict.fromkeys(value["model"] for value in values))),
            opacity=alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.15)),
            tooltip=["model:N", "step:Q", alt.Tooltip("loss:Q", format=".4f")],
        )
        .add_params(chosen)
    )


def _training_curves(content: Mapping[str, Any], models: set[str], title: str) -> alt.Chart | None:
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
    chosen = alt.selection_point(fields=["model"], bind="legend")  # a click on a name in the legend
    return (
        alt.Chart(inline(values))
        .mark_line(strokeWidth=1.5)
        .encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("loss:Q", title=title, scale=alt.Scale(zero=False)),
            color=report_figures.model_colour(list(dict.fromkeys(value["model"] for value in values))),
            opacity=alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.15)),
            tooltip=["model:N", "step:Q", alt.Tooltip("loss:Q", format=".4f")],
        )
        .add_params(chosen)
    )


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
        alt.Chart(inline(values))
        .mark_bar()
        .encode(
            x=alt.X("count:Q", title="parameters", axis=alt.Axis(format="~s")),
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
        alt.Chart(inline(values))
        .mark_bar(color="#3b82c4")
        .encode(
            x=alt.X("seconds:Q", title="seconds"),
            y=alt.Y("stage:N", sort=[value["stage"] for value in values], title=None),
            tooltip=["stage:N", alt.Tooltip("seconds:Q", format=".1f")],
        )
    )

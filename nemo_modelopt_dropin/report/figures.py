"""Draw the figures that cover one or more runs: size against loss, importance, quantization error, comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_modelopt_dropin.report import headline

if TYPE_CHECKING:
    import altair as alt

Runs = Sequence[tuple[str, Mapping[str, Any]]]
# Mid tones are visible on white and on near black, and differ in lightness for colour-blind readers.
COLOURS = {
    "teacher": "#3b82c4",
    "pruned": "#d1495b",
    "distilled": "#2a9d6f",
    "from scratch": "#c98a1b",
    "quantized": "#8e6bbf",
    "exported": "#5b6675",
}
CANDIDATES = (
    "Held-out loss in nats per token against parameters; the colour is KL(original || candidate). The line joins the "
    "candidates that no other candidate beats in both; the diamond is the one that was kept."
)
RUN_COLOURS = ["#3b82c4", "#d1495b"]
# Name of the data in a specification that a reader of the figure may download.
DATA = "figure"
# Pixels: of a row with a name, and of what is above and below the rows.
_ROW_HEIGHT, _AXIS_AND_LEGEND = 16, 100


def front(points: Iterable[Mapping[str, Any]], size: str = "bytes") -> list[Mapping[str, Any]]:
    """Return the points that no other point beats in both ``size`` and ``loss``, sorted by size."""
    best: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda point: (point[size], point["loss"])):
        if not best or point["loss"] < best[-1]["loss"]:
            best.append(point)
    return best


def inline(values: Iterable[Mapping[str, Any]]) -> alt.Data:
    """Return the data that a figure shows, as part of its specification; its name marks what readers may download."""
    import altair as alt

    return alt.InlineData(values=list(values), name=DATA)


def tradeoff_points(runs: Runs) -> list[dict[str, Any]]:
    """Return size and loss of every model, and of every exported checkpoint whose loss was measured.

    Models are counted in one type (bf16), so that their sizes can be compared. An exported checkpoint has the size of
    its files, because that is the size of its format.
    """
    points = []
    for run, content in runs:
        for model in content["models"]:
            point = {"run": run, "model": model["name"], "bytes": headline.in_bf16(model)}
            points.append({**point, "loss": model["heldout_loss"]})
        file = (content.get("exports") or {}).get("hf") or {}
        if file.get("heldout_loss") is not None:
            points.append({"run": run, "model": "exported", "bytes": file["bytes"], "loss": file["heldout_loss"]})
    return points


def tradeoff(runs: Runs) -> alt.LayerChart | None:
    """Draw sizes against held-out losses, with a line through the best models of each run."""
    import altair as alt

    points = tradeoff_points(runs)
    if len(points) < 2:
        return None
    best = [point for run, _ in runs for point in front(point for point in points if point["run"] == run)]
    x = alt.X("bytes:Q", title="bytes", axis=alt.Axis(format="~s", tickCount=5))
    y = alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False, padding=18))
    names = list(dict.fromkeys(point["model"] for point in points))
    line = (
        alt.Chart(alt.Data(values=best)).mark_line(strokeDash=[4, 3], color="#8b95a3").encode(x=x, y=y, detail="run:N")
    )
    dots = alt.Chart(inline(points)).mark_point(filled=True, size=120, opacity=0.9)
    dots = dots.encode(x=x, y=y, color=model_colour(names), tooltip=_tooltip("run:N", "model:N", "bytes:Q", "loss:Q"))
    if len(runs) > 1:
        dots = dots.encode(shape=alt.Shape("run:N", scale=alt.Scale(domain=[run for run, _ in runs])))
    return line + dots


def candidates(tried: Sequence[Mapping[str, Any]]) -> alt.LayerChart | None:
    """Draw the candidates of a pruning to a parameter budget: size against held-out loss.

    Args:
        tried: the candidates that `describe_pruning` returns.
    """
    import altair as alt

    if not tried:
        return None
    values = []
    for candidate in tried:
        own = {name: value for name, value in candidate.items() if name != "sizes"}
        values.append({"kept": "kept" if candidate["chosen"] else "tried", **candidate["sizes"], **own})
    # A loss that is not a number is null in JSON: such a candidate appears only in the table.
    measured = [value for value in values if value["loss"] is not None and math.isfinite(value["loss"])]
    x = alt.X("parameters:Q", scale=alt.Scale(zero=False, padding=18), axis=alt.Axis(format="~s", tickCount=6))
    y = alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False, padding=18))
    line = alt.Chart(alt.Data(values=front(measured, "parameters")))
    dots = alt.Chart(inline(measured)).mark_point(filled=True, size=110, opacity=1)
    return line.mark_line(strokeDash=[4, 3], color="#8b95a3").encode(x=x, y=y) + dots.encode(
        x=x,
        y=y,
        color=alt.Color("kl:Q", title="KL", scale=alt.Scale(scheme="viridis")),
        shape=alt.Shape("kept:N", scale=alt.Scale(domain=["kept", "tried"], range=["diamond", "circle"])),
        tooltip=[*(f"{name}:Q" for name in tried[0]["sizes"]), alt.Tooltip("loss:Q", format=".4f")],
    )


def heldout_points(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the held-out losses during training: model, step and loss; for distillation also tokens and ``regained``.

    Distillation starts at step 0 with the pruned model. The last point of a student is the loss of its checkpoint.

    Args:
        content: the numbers of a run, of this version or an earlier one.
    """
    losses = {model["name"]: model["heldout_loss"] for model in content["models"]}
    points: list[dict[str, Any]] = []
    for curve in content.get("curves") or []:
        name, measured = curve["model"], {}
        if name == "distilled" and "pruned" in losses:
            measured[0] = losses["pruned"]
        measured |= {point["step"]: point["heldout"] for point in curve["points"] if "heldout" in point}
        if name != "teacher" and name in losses and curve["points"]:
            measured[max(point["step"] for point in curve["points"])] = losses[name]
        points += [{"model": name, "step": step, "loss": loss} for step, loss in sorted(measured.items())]
    recovered = content.get("recovery") or []
    if not recovered:
        return points
    distilled = [{"model": "distilled", "step": point["steps"], **point} for point in recovered]
    others = [point for point in points if point["model"] != "distilled"]
    return [{name: value for name, value in point.items() if name != "steps"} for point in distilled] + others


def heldout_curves(content: Mapping[str, Any]) -> alt.LayerChart | None:
    """Draw the held-out losses during training from step 0, with the teacher's loss as a dashed line."""
    import altair as alt

    values = heldout_points(content)
    if not values:
        return None
    chosen = alt.selection_point(fields=["model"], bind="legend")  # by a click on a name in the legend
    y = alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False, padding=18))
    tooltip = _tooltip("model:N", "step:Q", "loss:Q")
    if content.get("recovery"):
        tooltip += _tooltip("tokens:Q", "regained:Q")
    line = alt.Chart(inline(values)).mark_line(point=True)
    line = line.encode(
        x=steps(),
        y=y,
        color=model_colour(list(dict.fromkeys(value["model"] for value in values))),
        opacity=alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.15)),
        tooltip=tooltip,
    ).add_params(chosen)
    teacher = [{"loss": model["heldout_loss"]} for model in content["models"] if model["name"] == "teacher"]
    rule = alt.Chart(alt.Data(values=teacher)).mark_rule(strokeDash=[4, 3], color=COLOURS["teacher"]).encode(y=y)
    return rule + line


def layer_importance(content: Mapping[str, Any]) -> alt.Chart | None:
    """Draw one bar per layer; the colour distinguishes kept and dropped layers."""
    import altair as alt

    values = (content.get("importance") or {}).get("layers")
    if not values:
        return None
    colour = alt.Scale(domain=["kept", "dropped"], range=["#3b82c4", "#d1495b"])
    return (
        alt.Chart(inline(values))
        .mark_bar()
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("score:Q", title="importance"),
            color=alt.Color("fate:N", scale=colour),
            tooltip=_tooltip("layer:O", "score:Q", "fate:N"),
        )
    )


def unit_importance(content: Mapping[str, Any]) -> alt.Chart | None:
    """Draw a map with one row per kind of unit and layer: units by rank, coloured by importance.

    Rows have different numbers of units, so each unit covers its share of the width and no row has gaps.
    """
    import altair as alt

    values = (content.get("importance") or {}).get("units")
    if not values:
        return None
    cells = [
        {
            "row": f"{one['kind']} {one['layer']}",
            "from": place / len(one["shares"]),
            "to": (place + 1) / len(one["shares"]),
            "share": share,
        }
        for one in values
        for place, share in enumerate(one["shares"])
    ]
    names = list(dict.fromkeys(cell["row"] for cell in cells))
    scale = alt.Scale(scheme="viridis", domain=[0, 1])
    return (
        alt.Chart(inline(cells))
        # The stroke has the colour of the cell: it covers the hairlines that antialiasing leaves between cells.
        .mark_rect(strokeWidth=0.7)
        .encode(
            x=alt.X(
                "from:Q",
                title="units, from most to least important",
                axis=alt.Axis(format="%", tickCount=5, grid=False),
                scale=alt.Scale(domain=[0, 1], nice=False),
            ),
            x2="to:Q",
            y=alt.Y("row:N", title=None, sort=names, scale=alt.Scale(padding=0)),
            fill=alt.Fill("share:Q", scale=scale),
            stroke=alt.Stroke("share:Q", scale=scale),
            tooltip=["row:N", alt.Tooltip("from:Q", format=".0%"), alt.Tooltip("share:Q", format=".2f")],
        )
        .properties(height=_AXIS_AND_LEGEND + _ROW_HEIGHT * len(names))
    )


def weight_error(content: Mapping[str, Any]) -> alt.Chart | None:
    """Draw the relative error that quantization causes in the weights of each layer."""
    import altair as alt

    values = content.get("sensitivity")
    if not values:
        return None
    return (
        alt.Chart(inline(values))
        .mark_line(point=True)
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("error:Q", title="relative error", axis=alt.Axis(format="%")),
            color=alt.Color("matrix:N"),
            tooltip=["layer:O", "matrix:N", alt.Tooltip("error:Q", format=".2%")],
        )
    )


def losses_of_runs(runs: Runs) -> alt.Chart | None:
    """Draw the held-out loss of each model, one point per run."""
    import altair as alt

    values = [
        {"run": run, "model": model["name"], "loss": model["heldout_loss"]}
        for run, content in runs
        for model in content["models"]
    ]
    if not values:
        return None
    return (
        alt.Chart(inline(values))
        .mark_point(filled=True, size=140, opacity=0.9)
        .encode(
            x=alt.X("loss:Q", title="nats per token", scale=alt.Scale(zero=False, padding=24)),
            y=alt.Y("model:N", sort=list(dict.fromkeys(value["model"] for value in values)), title=None),
            color=_by_run([run for run, _ in runs]),
            tooltip=_tooltip("run:N", "model:N", "loss:Q"),
        )
    )


def curves_of_runs(runs: Runs) -> alt.LayerChart | None:
    """Draw the held-out losses during training: the colour is the run, the dash pattern is the model."""
    import altair as alt

    values = [{"run": run, **point} for run, content in runs for point in heldout_points(content)]
    if not values:
        return None
    base = alt.Chart(inline(values)).encode(
        x=steps(),
        y=alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False, padding=18)),
        color=_by_run([run for run, _ in runs]),
        tooltip=_tooltip("run:N", "model:N", "step:Q", "loss:Q"),
    )
    # The points are a separate layer, because points of a line turn the dashes of its legend into dots.
    dashes = alt.Legend(symbolType="stroke", symbolSize=300, symbolStrokeColor="currentColor", symbolStrokeWidth=2)
    lines = base.mark_line().encode(strokeDash=alt.StrokeDash("model:N", legend=dashes))
    return lines + base.mark_point(filled=True, size=30, opacity=1)


def steps() -> alt.X:
    """Return the axis of training steps, which starts at step 0."""
    import altair as alt

    return alt.X("step:Q", title="step", scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=6, tickMinStep=1))


def model_colour(names: list[str], legend: bool = True) -> alt.Color:
    """Return the colour encoding of models, which is the same in every figure."""
    import altair as alt

    scale = alt.Scale(domain=names, range=[COLOURS.get(name, "#888888") for name in names])
    return alt.Color("model:N", scale=scale, legend=alt.Legend() if legend else None)


def _by_run(names: list[str]) -> alt.Color:
    import altair as alt

    return alt.Color("run:N", scale=alt.Scale(domain=names, range=RUN_COLOURS[: len(names)]))


def _tooltip(*fields: str) -> list[Any]:
    import altair as alt

    formats = {"loss:Q": ".4f", "score:Q": ".4g", "bytes:Q": ".3s", "tokens:Q": ",", "regained:Q": ".0%"}
    return [alt.Tooltip(field, format=formats[field]) if field in formats else alt.Tooltip(field) for field in fields]

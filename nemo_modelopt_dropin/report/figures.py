"""Figures over one or more runs: trade-off of size and loss, importance, quantization error, comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair as alt

Runs = Sequence[tuple[str, Mapping[str, Any]]]
# Mid tones: they stand out from white and from near black, and differ in lightness for the colour-blind.
COLOURS = {
    "teacher": "#3b82c4",
    "pruned": "#d1495b",
    "distilled": "#2a9d6f",
    "from scratch": "#c98a1b",
    "quantized": "#8e6bbf",
    "exported": "#5b6675",
}
CANDIDATES = (
    "Held-out loss in nats a token against parameters; colour: KL(original || candidate). The line joins those that no "
    "other beats in both; the diamond was kept."
)
RUN_COLOURS = ["#3b82c4", "#d1495b"]


def front(points: Iterable[Mapping[str, Any]], size: str = "bytes") -> list[Mapping[str, Any]]:
    """Return the points that no other beats in both ``size`` and ``loss``, by size."""
    found: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda point: (point[size], point["loss"])):
        if not found or point["loss"] < found[-1]["loss"]:
            found.append(point)
    return found


def tradeoff_points(runs: Runs) -> list[dict[str, Any]]:
    """Return size and loss of every model and of every exported file that was read back."""
    found = []
    for run, content in runs:
        for model in content["models"]:
            found.append({"run": run, "model": model["name"], "bytes": model["bytes"], "loss": model["heldout_loss"]})
        file = (content.get("exports") or {}).get("hf") or {}
        if file.get("heldout_loss") is not None:
            found.append({"run": run, "model": "exported", "bytes": file["bytes"], "loss": file["heldout_loss"]})
    return found


def tradeoff(runs: Runs) -> alt.LayerChart | None:
    """Return sizes on disk against held-out losses, with the front of each run."""
    import altair as alt

    points = tradeoff_points(runs)
    if len(points) < 2:
        return None
    best = [point for run, _ in runs for point in front(point for point in points if point["run"] == run)]
    x = alt.X("bytes:Q", title="bytes on disk", axis=alt.Axis(format="~s", tickCount=5))
    y = alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False, padding=18))
    names = list(dict.fromkeys(point["model"] for point in points))
    line = (
        alt.Chart(alt.Data(values=best)).mark_line(strokeDash=[4, 3], color="#8b95a3").encode(x=x, y=y, detail="run:N")
    )
    dots = alt.Chart(alt.Data(values=points)).mark_point(filled=True, size=120, opacity=0.9)
    dots = dots.encode(x=x, y=y, color=model_colour(names), tooltip=_tooltip("run:N", "model:N", "bytes:Q", "loss:Q"))
    if len(runs) > 1:
        dots = dots.encode(shape=alt.Shape("run:N", scale=alt.Scale(domain=[run for run, _ in runs])))
    return line + dots


def candidates(tried: Sequence[Mapping[str, Any]]) -> alt.LayerChart | None:
    """Return the candidates of a pruning to a number of parameters: size against held-out loss, with their front.

    Args:
        tried: what `describe_pruning` has as candidates.
    """
    import altair as alt

    if not tried:
        return None
    values = [
        {"kept": "kept" if found["chosen"] else "tried", **found["sizes"], **found, "sizes": None} for found in tried
    ]
    # A loss that is not a number is null in JSON: such a candidate is in the table only.
    measured = [value for value in values if value["loss"] is not None and math.isfinite(value["loss"])]
    x = alt.X("parameters:Q", scale=alt.Scale(zero=False, padding=18), axis=alt.Axis(format="~s", tickCount=6))
    y = alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False, padding=18))
    line = alt.Chart(alt.Data(values=front(measured, "parameters")))
    dots = alt.Chart(alt.Data(values=measured)).mark_point(filled=True, size=110, opacity=1)
    return line.mark_line(strokeDash=[4, 3], color="#8b95a3").encode(x=x, y=y) + dots.encode(
        x=x,
        y=y,
        color=alt.Color("kl:Q", title="KL", scale=alt.Scale(scheme="viridis")),
        shape=alt.Shape("kept:N", scale=alt.Scale(domain=["kept", "tried"], range=["diamond", "circle"])),
        tooltip=[*(f"{name}:Q" for name in tried[0]["sizes"]), alt.Tooltip("loss:Q", format=".4f")],
    )


def recovery(content: Mapping[str, Any]) -> alt.LayerChart | None:
    """Return the held-out loss after no, some and full distillation, with the teacher's as a line."""
    import altair as alt

    points = content.get("recovery")
    if not points:
        return None
    y = alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False, padding=18))
    line = (
        alt.Chart(alt.Data(values=points))
        .mark_line(point=True, color=COLOURS["distilled"])
        .encode(
            x=alt.X("tokens:Q", title="tokens of distillation", axis=alt.Axis(format="~s", tickCount=5)),
            y=y,
            tooltip=[
                "steps:Q",
                "tokens:Q",
                alt.Tooltip("loss:Q", format=".4f"),
                alt.Tooltip("regained:Q", format=".0%"),
            ],
        )
    )
    teacher = [{"loss": model["heldout_loss"]} for model in content["models"] if model["name"] == "teacher"]
    rule = alt.Chart(alt.Data(values=teacher)).mark_rule(strokeDash=[4, 3], color=COLOURS["teacher"]).encode(y=y)
    return rule + line


def layer_importance(content: Mapping[str, Any]) -> alt.Chart | None:
    """Return a bar a layer, those that pruning kept in another colour."""
    import altair as alt

    values = (content.get("importance") or {}).get("layers")
    if not values:
        return None
    colour = alt.Scale(domain=["kept", "dropped"], range=["#3b82c4", "#d1495b"])
    return (
        alt.Chart(alt.Data(values=values))
        .mark_bar()
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("score:Q", title="importance"),
            color=alt.Color("fate:N", scale=colour),
            tooltip=_tooltip("layer:O", "score:Q", "fate:N"),
        )
    )


def unit_importance(content: Mapping[str, Any]) -> alt.Chart | None:
    """Return a map: layers and kinds of units against their rank, coloured by importance."""
    import altair as alt

    values = (content.get("importance") or {}).get("units")
    if not values:
        return None
    rows = [
        {"row": f"{one['kind']} {one['layer']}", "rank": i / len(one["shares"]), "share": share}
        for one in values
        for i, share in enumerate(one["shares"])
    ]
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_rect()
        .encode(
            x=alt.X("rank:O", title="units, most important first", axis=None),
            y=alt.Y("row:N", title=None, sort=list(dict.fromkeys(row["row"] for row in rows))),
            color=alt.Color("share:Q", scale=alt.Scale(scheme="viridis", domain=[0, 1])),
            tooltip=["row:N", alt.Tooltip("rank:O", format=".0%"), alt.Tooltip("share:Q", format=".2f")],
        )
    )


def weight_error(content: Mapping[str, Any]) -> alt.Chart | None:
    """Return the relative error of each layer's matrices after quantization."""
    import altair as alt

    values = content.get("sensitivity")
    if not values:
        return None
    return (
        alt.Chart(alt.Data(values=values))
        .mark_line(point=True)
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("error:Q", title="relative error", axis=alt.Axis(format="%")),
            color=alt.Color("matrix:N"),
            tooltip=["layer:O", "matrix:N", alt.Tooltip("error:Q", format=".2%")],
        )
    )


def losses_of_runs(runs: Runs) -> alt.Chart | None:
    """Return the held-out loss of each model, a point a run."""
    import altair as alt

    values = [
        {"run": run, "model": model["name"], "loss": model["heldout_loss"]}
        for run, content in runs
        for model in content["models"]
    ]
    if not values:
        return None
    return (
        alt.Chart(alt.Data(values=values))
        .mark_point(filled=True, size=140, opacity=0.9)
        .encode(
            x=alt.X("loss:Q", title="nats per token", scale=alt.Scale(zero=False, padding=24)),
            y=alt.Y("model:N", sort=list(dict.fromkeys(value["model"] for value in values)), title=None),
            color=_by_run([run for run, _ in runs]),
            tooltip=_tooltip("run:N", "model:N", "loss:Q"),
        )
    )


def curves_of_runs(runs: Runs) -> alt.Chart | None:
    """Return the held-out losses while training, a colour a run and a dash a model."""
    import altair as alt

    values = [
        {"run": run, "model": curve["model"], "step": point["step"], "loss": point["heldout"]}
        for run, content in runs
        for curve in content["curves"]
        for point in curve["points"]
        if "heldout" in point
    ]
    if not values:
        return None
    return (
        alt.Chart(alt.Data(values=values))
        .mark_line(point=True)
        .encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False)),
            color=_by_run([run for run, _ in runs]),
            strokeDash=alt.StrokeDash("model:N"),
            tooltip=_tooltip("run:N", "model:N", "step:Q", "loss:Q"),
        )
    )


def model_colour(names: list[str], legend: bool = True) -> alt.Color:
    """Return the colours of models, the same in every figure."""
    import altair as alt

    scale = alt.Scale(domain=names, range=[COLOURS.get(name, "#888888") for name in names])
    return alt.Color("model:N", scale=scale, legend=alt.Legend() if legend else None)


def _by_run(names: list[str]) -> alt.Color:
    import altair as alt

    return alt.Color("run:N", scale=alt.Scale(domain=names, range=RUN_COLOURS[: len(names)]))


def _tooltip(*fields: str) -> list[Any]:
    import altair as alt

    formats = {"loss:Q": ".4f", "score:Q": ".4g", "bytes:Q": ".3s"}
    return [alt.Tooltip(field, format=formats[field]) if field in formats else alt.Tooltip(field) for field in fields]

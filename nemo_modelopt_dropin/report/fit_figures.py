"""Draw the figures of a search under budgets: size against expected loss, and predicted against measured losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_modelopt_dropin.fit import limits, pareto
from nemo_modelopt_dropin.report import figures

if TYPE_CHECKING:
    import altair as alt

FRONT = (
    "Expected held-out loss after distillation, in nats per token, against the figure with a budget. The diamond is "
    "the chosen point, circles were measured, the dashed rule is the budget, and the line joins the points that no "
    "other point beats in both."
)
PREDICTION = (
    "Increase of the held-out loss over the original, before distillation, in nats per token. On the line, the "
    "prediction is exact."
)
_UNITS = {
    limits.DISK: ("on disk, MB", 1e6),
    limits.MEMORY: ("memory to serve, MB", 1e6),
    limits.LATENCY: ("time per token, ms", 1e-3),
}


def front(plan: Mapping[str, Any] | None) -> alt.LayerChart | None:
    """Draw the points of a plan; see `FRONT`.

    Args:
        plan: The content of ``plan.json``, or None.
    """
    import altair as alt

    if not plan:
        return None
    kind = plan["kinds"][0]
    title, unit = _UNITS[kind]
    points = [
        {
            "number": point["number"],
            "size": point["figures"][kind] / unit,
            "loss": plan["original"]["loss"] + point["expected"],
            "format": point["format"],
            "point": _state(plan, point),
            "sizes": ", ".join(f"{name} {size}" for name, size in point["sizes"].items()),
        }
        for point in plan["points"]
    ]
    best = [points[position] for position in pareto.front([(one["size"], one["loss"]) for one in points])]
    x = alt.X("size:Q", title=title, scale=alt.Scale(zero=False, padding=18))
    y = alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False, padding=18))
    line = alt.Chart(alt.Data(values=best)).mark_line(strokeDash=[4, 3], color="#8b95a3").encode(x=x, y=y)
    rule = alt.Chart(alt.Data(values=[{"size": plan["budgets"][kind] / unit}])).mark_rule(
        strokeDash=[2, 2], color="#8b95a3"
    )
    dots = alt.Chart(figures.inline(points)).mark_point(size=110, opacity=1, filled=True)
    states = ["chosen", "measured", "predicted"]
    return (
        line
        + rule.encode(x=x)
        + dots.encode(
            x=x,
            y=y,
            color=alt.Color("format:N"),
            shape=alt.Shape("point:N", scale=alt.Scale(domain=states, range=["diamond", "circle", "cross"])),
            tooltip=["number:Q", "sizes:N", "format:N", alt.Tooltip("size:Q", format=".4g"), "loss:Q"],
        )
    )


def _state(plan: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    if point["number"] == plan["chosen"]:
        return "chosen"
    return "predicted" if point["measured"] is None else "measured"


def prediction(plan: Mapping[str, Any] | None) -> alt.LayerChart | None:
    """Draw predicted against measured losses of a plan; see `PREDICTION`."""
    import altair as alt

    tried = [point for point in (plan or {}).get("points", []) if point["measured"] is not None]
    if len(tried) < 2:
        return None
    values = [{name: point[name] for name in ("number", "predicted", "measured", "format")} for point in tried]
    ends = [end(value[name] for value in values for name in ("predicted", "measured")) for end in (min, max)]
    x, y = alt.X("predicted:Q", title="predicted"), alt.Y("measured:Q", title="measured")
    exact = alt.Chart(alt.Data(values=[{"predicted": end, "measured": end} for end in ends]))
    dots = alt.Chart(figures.inline(values)).mark_point(filled=True, size=110, opacity=1)
    tooltip = [
        "number:Q",
        "format:N",
        alt.Tooltip("predicted:Q", format=".4f"),
        alt.Tooltip("measured:Q", format=".4f"),
    ]
    return exact.mark_line(strokeDash=[4, 3], color="#8b95a3").encode(x=x, y=y) + dots.encode(
        x=x, y=y, color="format:N", tooltip=tooltip
    )


def made(plan: Mapping[str, Any] | None) -> dict[str, tuple[str, str, alt.TopLevelMixin | None]]:
    """Return the figures as `charts.figures` takes them."""
    return {
        "fit_front": ("Points of the search", FRONT, front(plan)),
        "fit_prediction": ("Predicted and measured losses", PREDICTION, prediction(plan)),
    }

"""Write the report of a quantization: ``report.json``, a self-contained ``report.html`` and PNG figures."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_modelopt_dropin.report import charts as report_charts
from nemo_modelopt_dropin.report import figures as report_figures
from nemo_modelopt_dropin.report import page as report

if TYPE_CHECKING:
    import altair as alt

_TEMPLATE = "quantization_report.html.j2"
_PACKAGES = ("nemo-toolkit", "megatron-core", "nvidia-modelopt", "torch")
_SERIES = {"weight_sqnr_db": "weight", "activation_sqnr_db": "activations"}
_COLOURS = {"weight": "#3b82c4", "activations": "#c98a1b"}
_ROW_HEIGHT = 16
# More rows would make the figure unreadable; the table has all of them.
_DRAWN = 60


def write(content: Mapping[str, Any], folder: Path) -> Path:
    """Write all files of the report and return the page's path.

    Args:
        content: ``Quantizer.report`` with "settings".
        folder: created if it is missing; an earlier report in it is replaced.
    """
    found = {
        "title": f"Quantization with {content.get('algorithm', content['settings'].get('algorithm'))}",
        "created": time.strftime("%Y-%m-%d %H:%M"),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in _PACKAGES}},
        **content,
    }
    figures = charts(found)
    values = {"title": found["title"], "report": found, "facts": facts(found)}
    page = report.render_template(_TEMPLATE, figures, found, **values)
    return report.write_files(Path(folder), found, figures, page)


def facts(content: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of the first table as text: what was measured, for the original, for the quantized model."""
    shown = {
        "loss": ("loss, nats per token", "{:.4f}"),
        "perplexity": ("perplexity", "{:.2f}"),
        "weight_bytes": ("weights, in 16 bits and in this format", None),
        "disk_bytes": ("on disk, measured", None),
    }
    found = []
    for name, (label, form) in shown.items():
        pair = [content.get(f"{name}_{when}") for when in ("before", "after")]
        text = ["" if v is None else form.format(v) if form else report.megabytes(v) for v in pair]
        if any(text):
            found.append((label, text[0], text[1]))
    if "kl_to_original" in content:
        found.append(("KL to the original, nats", "", f"{content['kl_to_original']:.2e}"))
        found.append(("relative error of the logits", "", f"{content['relative_output_error']:.2%}"))
    if "effective_bits" in content:
        found.append(("average bits per weight", "16", f"{content['effective_bits']:.2f}"))
    found += [(f"{kind} quantizers", "0", str(count)) for kind, count in content.get("quantizers", {}).items()]
    return found


def charts(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return every figure for which the report has data, as `charts.figures` does."""
    return report_charts.figures(
        {
            "sqnr": (
                "Error of each layer",
                "Signal-to-quantization-noise ratio in dB, worst layer first; 6 dB more correspond to one bit more.",
                _errors(content),
            ),
            "sensitivity": (
                "Sensitivity",
                "KL to the original model, in nats per token, if only this group of layers is quantized.",
                _sensitivity(content),
            ),
        }
    )


def _height(rows: int) -> int:
    return max(80, _ROW_HEIGHT * rows)


def _names(field: str, names: list[str]) -> alt.Y:
    """Return the axis of layers in this order; labels leave out the beginning that all names share."""
    import altair as alt

    shared = os.path.commonprefix(names).rpartition(".")[0]
    label = f"slice(datum.label, {len(shared) + 1 if shared else 0})"
    return alt.Y(f"{field}:N", sort=names, title=None, axis=alt.Axis(labelExpr=label))


def _errors(content: Mapping[str, Any]) -> alt.Chart | None:
    import altair as alt

    layers = content.get("layers", [])[:_DRAWN]
    values = [
        {"layer": row["layer"], "quantized": series, "dB": row[key]}
        for row in layers
        for key, series in _SERIES.items()
        if key in row
    ]
    if not values:
        return None
    scale = alt.Scale(domain=list(_COLOURS), range=list(_COLOURS.values()))
    return (
        alt.Chart(report_figures.inline(values))
        .mark_point(filled=True, size=70, opacity=1)
        .encode(
            x=alt.X("dB:Q", scale=alt.Scale(zero=False)),
            y=_names("layer", [row["layer"] for row in layers]),
            color=alt.Color("quantized:N", scale=scale),
            shape=alt.Shape("quantized:N", legend=None),
            tooltip=["layer:N", "quantized:N", alt.Tooltip("dB:Q", format=".1f")],
        )
        .properties(height=_height(len(layers)))
    )


def _sensitivity(content: Mapping[str, Any]) -> alt.Chart | None:
    import altair as alt

    rows = content.get("sensitivity", [])[:_DRAWN]
    if not rows:
        return None
    values = [{"group": row["group"], "kl": row["kl_to_original"]} for row in rows]
    return (
        alt.Chart(report_figures.inline(values))
        .mark_bar(color="#8e6bbf")
        .encode(
            x=alt.X("kl:Q", title="nats per token"),
            y=_names("group", [row["group"] for row in rows]),
            tooltip=["group:N", alt.Tooltip("kl:Q", format=".2e")],
        )
        .properties(height=_height(len(rows)))
    )

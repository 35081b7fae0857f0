"""The report of a quantization as ``report.json`` and as one self-contained page; rendered as the compress job's is."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_modelopt_dropin.report import charts as report_charts
from nemo_modelopt_dropin.report import page as report

if TYPE_CHECKING:
    import altair as alt

_TEMPLATE = "quantization_report.html.j2"
_PACKAGES = ("nemo-toolkit", "megatron-core", "nvidia-modelopt", "torch")
_SERIES = {"weight_sqnr_db": "weight", "activation_sqnr_db": "activations"}
_COLOURS = {"weight": "#3b82c4", "activations": "#c98a1b"}
_ROW_HEIGHT = 16
# A figure of more would be no figure; the table has them all.
_DRAWN = 60


def write(content: Mapping[str, Any], folder: Path) -> Path:
    """Write the files into ``folder`` and return the page's path.

    Args:
        content: ``Quantizer.report`` with "settings".
        folder: Made where it is missing.
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
    """Return (what, original, quantized) of what was measured, as text."""
    shown = {
        "loss": ("loss, nats a token", "{:.4f}"),
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
        found.append(("bits of a weight on average", "16", f"{content['effective_bits']:.2f}"))
    found += [(f"{kind} quantizers", "0", str(count)) for kind, count in content.get("quantizers", {}).items()]
    return found


def charts(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return name -> title, caption and specification of every figure that the report has data for."""
    return report_charts.figures(
        {
            "sqnr": (
                "Error of each layer",
                "Signal-to-quantization-noise ratio in dB, worst layer first: 6 dB more are a bit more.",
                _errors(content),
            ),
            "sensitivity": (
                "Sensitivity",
                "KL to the original model, in nats a token, when only this group of layers is quantized.",
                _sensitivity(content),
            ),
        }
    )


def _height(rows: int) -> int:
    return max(80, _ROW_HEIGHT * rows)


def _errors(content: Mapping[str, Any]) -> alt.Chart | None:
    import altair as alt

    layers = content.get("layers", [])[:_DRAWN]
    values = [
        {"layer": row["layer"], "of": series, "dB": row[key]}
        for row in layers
        for key, series in _SERIES.items()
        if key in row
    ]
    if not values:
        return None
    scale = alt.Scale(domain=list(_COLOURS), range=list(_COLOURS.values()))
    return (
        alt.Chart(report_charts.inline(values))
        .mark_point(filled=True, size=70, opacity=1)
        .encode(
            x=alt.X("dB:Q", scale=alt.Scale(zero=False)),
            y=alt.Y("layer:N", sort=[row["layer"] for row in layers], title=None, axis=alt.Axis(labelLimit=320)),
            color=alt.Color("of:N", scale=scale),
            shape=alt.Shape("of:N", legend=None),
            tooltip=["layer:N", "of:N", alt.Tooltip("dB:Q", format=".1f")],
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
        alt.Chart(report_charts.inline(values))
        .mark_bar(color="#8e6bbf")
        .encode(
            x=alt.X("kl:Q", title="nats a token"),
            y=alt.Y("group:N", sort=[row["group"] for row in rows], title=None, axis=alt.Axis(labelLimit=320)),
            tooltip=["group:N", alt.Tooltip("kl:Q", format=".2e")],
        )
        .properties(height=_height(len(rows)))
    )

"""Write the report of a compression run: ``report.json``, a self-contained ``report.html``, PNG figures, a table.

The page embeds Vega, its data and its style, and needs no network. It shows the numbers of ``report.json``, which it
embeds too; `charts` makes the figures.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_modelopt_dropin import files
from nemo_modelopt_dropin.preflight.output_checks import REPORT_FILES
from nemo_modelopt_dropin.report import charts as report_charts
from nemo_modelopt_dropin.report import headline, scores
from nemo_modelopt_dropin.report.headline import megabytes, millions

if TYPE_CHECKING:
    from rich.table import Table

_TEMPLATE = "report_template.html.j2"


def write(content: Mapping[str, Any], folder: Path) -> Path:
    """Write all files of the report into ``folder`` and return the page's path."""
    charts = report_charts.charts(content)
    return write_files(folder, content, charts, render(content, charts))


def write_files(folder: Path, content: Any, charts: Mapping[str, Mapping[str, Any]], page: str) -> Path:
    """Write ``report.json``, the figures as PNG and ``report.html``, and return the path of the page.

    Args:
        folder: created if it is missing; an earlier report in it is replaced.
        content: the numbers.
        charts: the figures, from `charts.figures`.
        page: the text of the page.

    Raises:
        ModelOptConfigError: if a file of the same name exists that this package did not write.
    """
    files.own(folder, files.REPORT, *REPORT_FILES)
    (folder / "figures").mkdir(exist_ok=True)
    replace_file(folder / "report.json", json.dumps(content, indent=1).encode())
    for name, chart in charts.items():
        replace_file(folder / "figures" / f"{name}.png", report_charts.png(chart["spec"]))
    target = folder / "report.html"
    replace_file(target, page.encode())
    return target


def withdraw(folder: Path) -> None:
    """Remove the report of a run that resumes, because it is out of date."""
    files.remove_entries(folder, *REPORT_FILES)


def render(content: Mapping[str, Any], charts: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Return the report as an HTML page."""
    charts = report_charts.charts(content) if charts is None else charts
    values = {"title": content["title"], "rows": rows(content), "remark": remark(content)}
    values |= {"answers": headline.answers(content), "sizes": headline.SIZES}
    evaluation = content.get("evaluation")
    values |= {"scores": scores.rows(evaluation), "scores_of_members": scores.rows(evaluation, members=True)}
    values |= {"scores_note": f"{scores.described(evaluation)}. {scores.NOTE}" if evaluation else ""}
    return render_template(_TEMPLATE, charts, content, report=content, **values)


def render_template(template: str, charts: Mapping[str, Mapping[str, Any]], data: Any, **values) -> str:
    """Return a page that embeds its figures, its numbers and the library that draws the figures.

    Args:
        template: name of the template in the folder of this file.
        charts: the figures, from `charts.figures`.
        data: the numbers, embedded as JSON.
        **values: variables of the template.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"millions": millions, "megabytes": megabytes, "duration": duration}
    environment.filters["data_uri"] = report_charts.data_uri
    return environment.get_template(template).render(
        charts=charts,
        data=_embedded(data),
        specs=_embedded({name: chart["spec"] for name, chart in charts.items()}),
        vega=library(),
        **values,
    )


@functools.cache
def library() -> str:
    """Return the library that draws the figures; putting it together takes one or two seconds for each page."""
    from vl_convert import javascript_bundle

    return javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def rows(content: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the table of models as text, for the page and the terminal."""
    lines: list[dict[str, str]] = []
    for model in content["models"]:
        first = content["models"][0]
        lines.append(
            {
                "model": model["name"],
                "held-out loss": f"{model['heldout_loss']:.4f}",
                "against teacher": f"{model['heldout_loss'] - first['heldout_loss']:+.4f}",
                "perplexity": f"{model['perplexity']:.2f}",
                "params": millions(model["parameters"]),
                "body": f"{millions(model['body_parameters'])}, "
                f"{model['body_parameters'] / first['body_parameters']:.0%}",
                "in bf16": megabytes(headline.in_bf16(model)),
                "on disk": megabytes(model["bytes"]),
                "tokens/s": f"{model['heldout_tokens_per_second']:,.0f}",
            }
        )
    exported = (content.get("exports") or {}).get("hf")
    if lines and exported:
        lines.append(dict.fromkeys(lines[0], "") | _exported_row(exported, content["models"]))
    return lines


def _exported_row(exported: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the cells of the Hugging Face files; they have no speed, because it was not measured."""
    row = {"model": "hf files", "on disk": megabytes(exported["bytes"])}
    source = next((model for model in models if model["name"] == "quantized"), None)
    if source is not None:  # the files hold the parameters of this model
        row |= {"params": millions(source["parameters"]), "in bf16": megabytes(headline.in_bf16(source))}
    loss = exported.get("heldout_loss")
    if loss is not None:
        row |= {
            "held-out loss": f"{loss:.4f}",
            "against teacher": f"{loss - models[0]['heldout_loss']:+.4f}",
            "perplexity": f"{math.exp(loss):.2f}",
        }
    return row


def remark(content: Mapping[str, Any]) -> str:
    """Return what a reader must know about the numbers of a quantized model; "" if no model is quantized."""
    if not any(model["name"] == "quantized" for model in content["models"]):
        return ""
    return (
        '"quantized" is a NeMo checkpoint that simulates the format: its weights are as wide as before and the '
        "simulation takes time, so neither its size nor its speed is that of the format."
    )


def table(content: Mapping[str, Any]) -> Table:
    """Return the table of models for a terminal, with captions that explain its columns."""
    from rich import box
    from rich.table import Table

    # To fit 80 columns, perplexity is left out and headings break between words; numbers do not.
    text = [{name: value for name, value in row.items() if name != "perplexity"} for row in rows(content)]
    title = f"{content['title']}, job steps took {duration(content['total_seconds'])}"
    caption = "\n".join(filter(None, [headline.SIZES if text else "", remark(content)]))
    shown = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 0), pad_edge=False)
    for name in text[0] if text else ("model",):
        shown.add_column(name.replace(" ", "\n"), justify="left" if name == "model" else "right")
    for row in text:
        shown.add_row(*row.values())
    return shown


def duration(seconds: float) -> str:
    """Return a time as readers expect it, in seconds, minutes or hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _embedded(content: Any) -> str:
    """Return JSON that is safe inside a script element and that browsers can parse."""
    return json.dumps(report_charts.finite(content), allow_nan=False).replace("<", "\\u003c")


def replace_file(path: Path, content: bytes) -> None:
    """Write to a temporary file and rename it, so that readers never see a half-written file."""
    with files.replacing(path) as beside:
        beside.write_bytes(content)

"""Write a compression run's report: ``report.json``, one self-contained ``report.html``, PNG figures, a table.

The page carries Vega, its data and its style inside and asks the network for nothing. It shows the very numbers of
``report.json``, which it embeds; the figures are drawn from it by `report_charts`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_modelopt_dropin import files
from nemo_modelopt_dropin.preflight.output_checks import REPORT_FILES
from nemo_modelopt_dropin.report import charts as report_charts

if TYPE_CHECKING:
    from rich.table import Table

_TEMPLATE = "report_template.html.j2"


def write(content: Mapping[str, Any], folder: Path) -> Path:
    """Write all files of the report into ``folder`` and return the page's path."""
    charts = report_charts.charts(content)
    return write_files(folder, content, charts, render(content, charts))


def write_files(folder: Path, content: Any, charts: Mapping[str, Mapping[str, Any]], page: str) -> Path:
    """Write ``report.json``, the figures as PNG and ``report.html``; return the latter's path.

    Args:
        folder: made if it is missing; an earlier report in it is replaced.
        content: the numbers.
        charts: name -> specification and more.
        page: the text of the page.

    Raises:
        ModelOptConfigError: if a user's file or folder has the name of one of the report's.
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
    """Remove the report of a run that continues, because it is out of date."""
    files.remove_entries(folder, *REPORT_FILES)


def render(content: Mapping[str, Any], charts: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Return the page."""
    charts = report_charts.charts(content) if charts is None else charts
    values = {"title": content["title"], "rows": rows(content), "remark": remark(content)}
    return render_template(_TEMPLATE, charts, content, report=content, **values)


def render_template(template: str, charts: Mapping[str, Mapping[str, Any]], data: Any, **values) -> str:
    """Return a page with its figures, the numbers it shows, and the library that draws them inside.

    Args:
        template: name of the template beside this file.
        charts: name -> title, caption and specification.
        data: the numbers, embedded as JSON.
        **values: what the template uses.
    """
    import jinja2
    from vl_convert import javascript_bundle

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"millions": millions, "megabytes": megabytes, "duration": duration}
    return environment.get_template(template).render(
        charts=charts,
        data=_embedded(data),
        specs=_embedded({name: chart["spec"] for name, chart in charts.items()}),
        vega=javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script"),
        **values,
    )


def rows(content: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the table of models as text, the same on the page and in the terminal."""
    found: list[dict[str, str]] = []
    for model in content["models"]:
        first = content["models"][0]
        found.append(
            {
                "model": model["name"],
                "held-out loss": f"{model['heldout_loss']:.4f}",
                "against teacher": f"{model['heldout_loss'] - first['heldout_loss']:+.4f}",
                "perplexity": f"{model['perplexity']:.2f}",
                "params": millions(model["parameters"]),
                "body": f"{millions(model['body_parameters'])}, "
                f"{model['body_parameters'] / first['body_parameters']:.0%}",
                "on disk": megabytes(model["bytes"]),
                "tokens/s": f"{model['heldout_tokens_per_second']:,.0f}",
            }
        )
    exported = (content.get("exports") or {}).get("hf")
    if found and exported:
        found.append(dict.fromkeys(found[0], "") | _of_files(exported, content["models"][0]["heldout_loss"]))
    return found


def _of_files(exported: Mapping[str, Any], reference: float) -> dict[str, str]:
    """Return what a row of the table says of Hugging Face files: their loss was measured, their speed was not."""
    loss, found = exported.get("heldout_loss"), {"model": "hf files", "on disk": megabytes(exported["bytes"])}
    if loss is not None:
        found |= {
            "held-out loss": f"{loss:.4f}",
            "against teacher": f"{loss - reference:+.4f}",
            "perplexity": f"{math.exp(loss):.2f}",
        }
    return found


def remark(content: Mapping[str, Any]) -> str:
    """Return what must be known of the table's numbers, nothing where nothing was quantized."""
    if not any(model["name"] == "quantized" for model in content["models"]):
        return ""
    return (
        "quantized: a NeMo checkpoint that simulates the format. Its weights are as wide as before, and simulation "
        "takes time: neither its size nor its speed is that of the format."
    )


def table(content: Mapping[str, Any]) -> Table:
    """Return the table of models for a terminal."""
    from rich import box
    from rich.table import Table

    # 80 columns are enough: no perplexity, headings wrap, numbers do not.
    text = [{name: value for name, value in row.items() if name != "perplexity"} for row in rows(content)]
    title = f"{content['title']}, stages took {duration(content['total_seconds'])}"
    found = Table(title=title, caption=remark(content), box=box.SIMPLE_HEAD, padding=(0, 0, 0, 0), pad_edge=False)
    for name in text[0] if text else ("model",):
        width = max(len(row[name]) for row in text) if text else None
        found.add_column(name, justify="left" if name == "model" else "right", min_width=width)
    for row in text:
        found.add_row(*row.values())
    return found


def millions(count: float) -> str:
    """Return a count of parameters as people read it."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def megabytes(count: float) -> str:
    """Return a number of bytes as people read it."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Return a time as people read it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _embedded(content: Any) -> str:
    """Return JSON that is safe inside of a script element."""
    return json.dumps(content).replace("<", "\\u003c")


def replace_file(path: Path, content: bytes) -> None:
    """Write beside the file and rename, so that a reader never sees half of it."""
    with files.replacing(path) as beside:
        beside.write_bytes(content)

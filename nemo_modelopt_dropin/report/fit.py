"""Write the page of a search under budgets: the points with their figures, the chosen one marked."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_modelopt_dropin.report import charts, fit_figures, page

if TYPE_CHECKING:
    from rich.table import Table

_TEMPLATE = "fit_report.html.j2"


def write(plan: Mapping[str, Any], rows: Sequence[Mapping[str, str]], sentences: Sequence[str], folder: Path) -> Path:
    """Write all files of the page and return its path.

    Args:
        plan: The content of ``plan.json``.
        rows: The points as text.
        sentences: What was chosen.
        folder: Created if it is missing; an earlier page in it is replaced.
    """
    created = datetime.datetime.now().isoformat(sep=" ", timespec="minutes")
    content = {"title": "Sizes and formats under a budget", "created": created, "fit": plan}
    shown = charts.figures(fit_figures.made(plan))
    values = {"title": content["title"], "report": content, "rows": rows, "sentences": sentences}
    return page.write_files(folder, content, shown, page.render_template(_TEMPLATE, shown, content, **values))


def table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Return the points as a table for a terminal."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in rows[0]:
        shown.add_column(name, justify="left" if name == "format" else "right")
    for row in rows:
        shown.add_row(*row.values(), style="bold" if "*" in row["point"] else None)
    return shown

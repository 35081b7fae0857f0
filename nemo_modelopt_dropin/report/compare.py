"""Compare two compression runs: a table in the terminal and ``compare.html``, from their ``report.json`` files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_modelopt_dropin import files
from nemo_modelopt_dropin.report import charts as report_charts
from nemo_modelopt_dropin.report import headline, scores
from nemo_modelopt_dropin.report import page as report

if TYPE_CHECKING:
    from rich.table import Table

PAGE = "compare.html"
_TEMPLATE = "compare_template.html.j2"
_NUMBERS = {
    "heldout_loss": ("held-out loss", "{:.4f}".format),
    "perplexity": ("perplexity", "{:.2f}".format),
    "parameters": ("parameters", report.millions),
    "bf16_bytes": ("in bf16", report.megabytes),
    "bytes": ("on disk", report.megabytes),
    "heldout_tokens_per_second": ("tokens/s", "{:,.0f}".format),
}


def show(first: Path, second: Path, output: Path) -> int:
    """Print the comparison of two runs, write the page into ``output`` and return the exit code."""
    import sys

    from rich.console import Console

    names, contents = labels(first, second), [read(first), read(second)]
    files.own(output, files.REPORT, PAGE)
    page = output / PAGE
    report.replace_file(page, render(names, contents).encode())
    screen = Console(file=sys.stdout)
    screen.print(table(names, contents))
    screen.print(f"Report: {page}", highlight=False, soft_wrap=True)
    return 0


def read(folder: Path) -> dict[str, Any]:
    """Return the numbers of a finished run."""
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def labels(first: Path, second: Path) -> tuple[str, str]:
    """Return the shortest trailing parts of the two paths that differ."""
    one, two = first.resolve().parts, second.resolve().parts
    for length in range(1, max(len(one), len(two)) + 1):
        found = "/".join(one[-length:]), "/".join(two[-length:])
        if found[0] != found[1]:
            return found
    return "A", "B"


def numbers(contents: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return one row per model and number that either run has: both values and the relative change."""
    models = [
        {model["name"]: {**model, "bf16_bytes": headline.in_bf16(model)} for model in content["models"]}
        for content in contents
    ]
    for of_run, content in zip(models, contents, strict=True):
        exported = (content.get("exports") or {}).get("hf")
        if exported:
            loss = exported.get("heldout_loss")
            of_run["hf files"] = {**exported, "perplexity": None if loss is None else math.exp(loss)}
    found = []
    for name in dict.fromkeys([*models[0], *models[1]]):
        for key, (title, as_text) in _NUMBERS.items():
            pair = [of_run.get(name, {}).get(key) for of_run in models]
            if any(value is not None for value in pair):
                found.append({"model": name, "number": title, **_pair(pair, as_text)})
        found += _scores(name, contents)
    exact = [content["total_seconds"] for content in contents]
    return found + [{"model": "all job steps", "number": "time", **_pair(exact, report.duration)}]


def _scores(name: str, contents: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return one row per score of a model on a task of lm-eval that either run has."""
    of_runs = [scores.of_model(content.get("evaluation"), name) for content in contents]
    found = []
    for key in dict.fromkeys(key for of_run in of_runs for key in of_run):
        pair = [of_run.get(key) for of_run in of_runs]
        change = _pair([None if one is None else one["value"] for one in pair], str)["change"]
        shown = dict(zip(("first", "second"), map(scores.text, pair), strict=True))
        found.append({"model": name, "number": " ".join(key), **shown, "change": change})
    return found


def _pair(pair: list[Any], as_text) -> dict[str, str]:
    first, second = pair
    change = ""
    if first is not None and second is not None:
        change = f"{(second - first) / first:+.1%}" if first else ""
    return {
        "first": "" if first is None else as_text(first),
        "second": "" if second is None else as_text(second),
        "change": change,
    }


def different_settings(contents: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return the name and both values of every setting that differs between the jobs."""
    flat = [dict(_flat(content["settings"].get("job", {}))) for content in contents]
    names = dict.fromkeys([*flat[0], *flat[1]])
    return [
        (name, str(flat[0].get(name, "")), str(flat[1].get(name, "")))
        for name in names
        if flat[0].get(name) != flat[1].get(name)
    ]


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def table(names: tuple[str, str], contents: list[dict[str, Any]]) -> Table:
    """Return the comparison as a table for a terminal."""
    from rich import box
    from rich.table import Table

    found = Table(title="Two compression runs", caption=_remark(contents), box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("model", "", *names, "change"):
        found.add_column(name, justify="left" if name in ("model", "") else "right", overflow="fold")
    last = ""
    for row in numbers(contents):
        if last and row["model"] != last:
            found.add_section()
        shown = row["model"] if row["model"] != last else ""
        last = row["model"]
        found.add_row(shown, row["number"], row["first"], row["second"], row["change"])
    for name, first, second in different_settings(contents):
        found.add_row("settings" if last != "settings" else "", name, first, second, "", end_section=False)
        last = "settings"
    return found


def _remark(contents: list[dict[str, Any]]) -> str:
    return next(filter(None, map(report.remark, contents)), "")


def render(names: tuple[str, str], contents: list[dict[str, Any]]) -> str:
    """Return the comparison as an HTML page."""
    charts = report_charts.comparison(names, contents)
    return report.render_template(
        _TEMPLATE,
        charts,
        {"names": names, "runs": contents},
        title=f"{names[0]} and {names[1]}",
        names=names,
        runs=contents,
        rows=numbers(contents),
        remark=_remark(contents),
        sizes=headline.SIZES,
        settings=different_settings(contents),
    )

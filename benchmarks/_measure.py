"""Measure peak memory, and compare, write and draw the figures of the distillation benchmarks."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "nemo-toolkit", "megatron-core", "nvidia-modelopt")
_LONGEST_BAR = 30.0
OTHER = "stock or naive"


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the peak of the bytes that a function allocates, counted from the allocator's events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    now = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def about() -> dict[str, Any]:
    """Return the machine and the package versions of this run."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, one thread per rank",
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
    }


def row(ours: dict[str, Any], other: dict[str, Any] | None, unit: int) -> dict[str, Any]:
    """Compare one of our variants with stock's or with a naive implementation.

    Args:
        ours: ``seconds``, ``worst``, ``peak bytes``.
        other: the same figures of the implementation it is compared with, or None.
        unit: bytes of one logits tensor.
    """
    found = {"ours": ours, "other": other, "peak in L": {"ours": ours["peak bytes"] / unit}}
    if other:
        found["peak in L"]["other"] = other["peak bytes"] / unit
        found["time other / ours"] = other["seconds"] / ours["seconds"]
        found["peak other / ours"] = other["peak bytes"] / max(1, ours["peak bytes"])
    return found


def table(rows: dict[str, dict[str, Any]], other: str = OTHER) -> str:
    """Return the rows as a Markdown table; ``other`` is what ours is compared with."""
    lines = [
        f"| | CPU seconds, ours (worst) | {other} | ratio | peak / L, ours | {other} | ratio | gradient difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        ours, theirs, peak = found["ours"], found["other"], found["peak in L"]
        cells = [f"{ours['seconds']:.3f} ({ours['worst']:.3f})"]
        cells += [f"{theirs['seconds']:.3f}", f"{found['time other / ours']:.2f}x"] if theirs else ["", ""]
        cells += [f"{peak['ours']:.2f}"]
        cells += [f"{peak['other']:.2f}", f"{found['peak other / ours']:.1f}x"] if theirs else ["", ""]
        cells += [f"{found['gradient difference']:.0e}" if "gradient difference" in found else ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if "time fused / matrix products alone" in found:
            alone = found["time fused / matrix products alone"]
            lines.append(f"| time of fused / time of the matrix products alone | {alone:.2f} |")
    return "\n".join(lines) + "\n"


def plot(rows: dict[str, dict[str, Any]], other: str = OTHER) -> str:
    """Return an SVG with two bars for each row: the ratios of CPU time and of peak memory."""
    found = [(name, r["time other / ours"], r["peak other / ours"]) for name, r in rows.items() if r["other"]]
    widest = max(max(a, min(b, _LONGEST_BAR)) for _, a, b in found)
    parts, height = [], 44 + 26 * len(found)
    left = max(330.0, 5.4 * max(len(name) for name, *_ in found))
    for i, (name, faster, leaner) in enumerate(found):
        y = 34 + 26 * i
        parts.append(f'<text x="{left:.0f}" y="{y + 13}" text-anchor="end">{name}</text>')
        for offset, value, colour in ((0, faster, "#4477aa"), (10, leaner, "#ccbb44")):
            width = 330 * min(value, _LONGEST_BAR) / widest
            parts.append(f'<rect x="{left + 8:.0f}" y="{y + offset}" width="{width:.1f}" height="9" fill="{colour}"/>')
            parts.append(f'<text x="{left + 12 + width:.1f}" y="{y + offset + 8}">{value:.1f}x</text>')
    title = f'<text x="8" y="18">ratio {other} / ours: CPU time (blue), peak extra memory (yellow)</text>'
    style = '<style>text{font:10px sans-serif}</style><rect width="100%" height="100%" fill="white"/>'
    body = style + title + "".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + 410:.0f}" height="{height}">{body}</svg>\n'


def write(
    name: str,
    rows: dict[str, dict[str, Any]],
    folder: Path,
    notes: str = "",
    more: dict | None = None,
    other: str = OTHER,
) -> str:
    """Write the results as a JSON file, a table and a plot, and return the table.

    Args:
        name: name of the files, without an ending.
        rows: results of `row` by label.
        folder: folder of the files; created if it does not exist.
        notes: text below the table.
        more: further entries of the JSON file.
        other: what ours is compared with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = {**about(), **(more or {}), "rows": rows}
    text = table(rows, other) + (f"\n{notes}\n" if notes else "")
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / f"{name}.md").write_text(f"{result['machine']}; {result['versions']}\n\n{text}")
    (folder / f"{name}.svg").write_text(plot(rows, other))
    return text

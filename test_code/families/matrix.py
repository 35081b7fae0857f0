"""Take every step with every family and print the table: ``python -m test_code.families.matrix [FAMILY ...]``.

With ``--write``, the rows also replace those of the same families in ``docs/families.md``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from test_code.families import jobs, models, steps

# Layouts of ranks in which the logits are compared with those of `transformers`.
LAYOUTS = {"tp2": {"tp": 2}, "ep2": {"ep": 2}}
COLUMNS = ("import", *steps.STEPS, *LAYOUTS)
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- matrix: begin; made by make test-families WRITE=--write -->\n", "<!-- matrix: end -->"


def can_split(name: str, layout: str) -> bool:
    """Return whether two ranks can share a family's model in a layout: experts with biases need expert parallelism."""
    family = models.FAMILIES[name]
    if layout == "ep2":
        return family.experts
    return family.query_groups % 2 == 0 and name != "gpt-oss"


def cells(one: Any, two: Any, name: str, folder: Path) -> dict[str, tuple[str, str | None]]:
    """Return what is shown of each step of a family, and what is wrong.

    Args:
        one: The pool of one rank.
        two: The pool of two ranks.
        name: The family.
        folder: Where the checkpoints are written.
    """
    (imported,) = one.run(jobs.import_and_compare, name, str(folder / "import"))
    (found,) = one.run(steps.take, name, str(folder / "steps"), timeout=600)
    shown = {}
    for step, result in {"import": imported, **found}.items():
        wrong = steps.outcome(name, step, result)
        refused = steps.refusal(name, step)
        shown[step] = (wrong or ("refused" if refused else f"{result['difference']:.1g}"), wrong)
    for layout, sizes in LAYOUTS.items():
        if can_split(name, layout):
            source = folder / "steps"
            difference = max(two.run(jobs.compare_layout, str(source / "nemo"), str(source), **sizes))
            wrong = None if difference < steps.SAME else f"logits differ by {difference:.2g}"
            shown[layout] = (wrong or f"{difference:.1g}", wrong)
    return shown


def row(name: str, values: Sequence[str]) -> str:
    """Return a line of the table."""
    return f"| {' | '.join([name, *values])} |\n"


def rows_of(page: str) -> dict[str, list[str]]:
    """Return the cells of the table in a page by family."""
    lines = page.partition(BEGIN)[2].partition(END)[0].splitlines()[2:]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0]: cells[1:] for cells in found}


def with_rows(page: str, new: Mapping[str, Sequence[str]]) -> str:
    """Return a page with the rows of some families replaced."""
    rows = {**rows_of(page), **new}
    before, _, rest = page.partition(BEGIN)
    table = row("family", COLUMNS) + "|---" * (len(COLUMNS) + 1) + "|\n"
    table += "".join(row(name, rows[name]) for name in models.FAMILIES if name in rows)
    return before + BEGIN + table + END + rest.partition(END)[2]


def main(arguments: list[str]) -> int:
    """Print the table; return the number of steps that failed."""
    from test_code.support.ranks import RankPool

    names = [name for name in arguments if name != "--write"] or list(models.FAMILIES)
    failed, out, rows = 0, sys.stdout, {}
    out.write(row("family", [*COLUMNS, "seconds"]) + "|---" * (len(COLUMNS) + 2) + "|\n")
    with tempfile.TemporaryDirectory() as folder:
        one, two = (RankPool(size, Path(folder) / f"logs-{size}") for size in (1, 2))
        for name in names:
            started = time.monotonic()
            shown = cells(one, two, name, Path(folder) / name)
            failed += sum(wrong is not None for _, wrong in shown.values())
            rows[name] = [shown[column][0] if column in shown else "" for column in COLUMNS]
            out.write(row(name, [*rows[name], f"{time.monotonic() - started:.0f}"]))
            out.flush()
        one.close()
        two.close()
    if "--write" in arguments and not failed:
        PAGE.write_text(with_rows(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return failed


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))

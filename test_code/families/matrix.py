"""Take every step with every family and print the table: ``python -m test_code.families.matrix [FAMILY ...]``."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from test_code.families import jobs, models

# Relative change of the logits of a random model; a scale that is wrong or lost changes them by one or more.
CHANGED_BY = {"fp8": 0.25, "int8": 0.15, "int4_awq": 0.6}
# Models that hold the same weights compute the same numbers, with sums in another order.
SAME = 2e-6


def problem(step: str, found: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the result of a step, None if nothing is."""
    if "error" in found:
        return str(found["error"]).splitlines()[0]
    if step in CHANGED_BY:
        if found["left"]:
            return f"not quantized: {found['left']}"
        return None if 1e-4 < found["difference"] < CHANGED_BY[step] else f"logits changed by {found['difference']:.2g}"
    if not found["difference"] < SAME:
        return f"logits differ by {found['difference']:.2g}"
    if "parameters" in found:
        before, after = found["parameters"]
        return None if after < before and found["changed"] > 0 else "nothing was pruned"
    losses = [step["kd_loss"] for step in found["losses"]]
    return None if len(losses) == 2 and all(map(math.isfinite, losses)) else f"losses {losses}"


def main(names: list[str]) -> int:
    """Print the table; return the number of steps that failed."""
    from test_code.support.ranks import RankPool

    failed = 0
    out = sys.stdout
    out.write(f"| {' | '.join(['family', 'import', *jobs.STEPS, 'seconds'])} |\n{'|---' * (len(jobs.STEPS) + 3)}|\n")
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(1, Path(folder) / "logs")
        for name in names or models.FAMILIES:
            started = time.monotonic()
            (imported,) = pool.run(jobs.import_and_compare, name, f"{folder}/{name}-import")
            cells = {
                "import": imported.get("error") or problem("import", {**imported, "parameters": (1, 0), "changed": 1})
            }
            (found,) = pool.run(jobs.take_steps, name, f"{folder}/{name}", timeout=600)
            cells |= {step: problem(step, result) for step, result in found.items()}
            failed += sum(cell is not None for cell in cells.values())
            numbers = {"import": imported, **found}
            shown = [cell or f"{numbers[step]['difference']:.1g}" for step, cell in cells.items()]
            out.write(f"| {' | '.join([name, *shown, f'{time.monotonic() - started:.0f}'])} |\n")
            out.flush()
        pool.close()
    return failed


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))

"""The steps that each family takes, on ranks, and what is expected of their results."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_modelopt_dropin.preflight import families
from test_code.families import exports, jobs, models

FORMATS = ("fp8", "int8", "int4_awq")
PRUNED = ("width", "depth")
# Steps after the import: quantize, prune, distill, and write each of these models as a Hugging Face folder.
STEPS = (*FORMATS, *PRUNED, "logits", "pair", "plain-hf", *(f"{name}-hf" for name in (*FORMATS, *PRUNED)))

# Relative change of the logits of a random model; a scale that is wrong or lost changes them by one or more.
CHANGED_BY = {"fp8": 0.25, "int8": 0.15, "int4_awq": 0.6}
# Models that hold the same weights compute the same numbers, with sums in another order.
SAME = 2e-6
# Scales of AWQ are stored in bf16, with eight bits: 0.2 percent in each layer.
SAME_AWQ = 0.015


def take(name: str, folder: str | Path, steps: Sequence[str] = STEPS) -> dict[str, dict[str, Any]]:
    """Import a family and take each step from the imported checkpoint; return what each found, or its error."""
    from test_code.support import ranks

    checkpoint = jobs.import_hf(name, folder)
    ranks.reset()
    found: dict[str, dict[str, Any]] = {}
    for step in steps:
        try:
            found[step] = _step(name, step, checkpoint, Path(folder))()
        except Exception as error:
            found[step] = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        ranks.reset()
    return found


def _step(name: str, step: str, checkpoint: Path, folder: Path) -> Callable[[], dict[str, Any]]:
    family = models.FAMILIES[name]
    if step in FORMATS:
        return lambda: jobs.quantize(checkpoint, folder, step)
    if step in PRUNED:
        return lambda: jobs.prune(checkpoint, folder / step, family.request(step))
    if step.endswith("hf"):
        first = step.removesuffix("-hf")
        source = folder / first if first in PRUNED else checkpoint
        algorithm = first if first in FORMATS else None
        return lambda: exports.export(source, folder / step, algorithm, block=family.block)
    pair = {"intermediate_layer_pairs": [["decoder.layers.0", "decoder.layers.1"]]}
    student = next(folder / one for one in (*PRUNED, "nemo") if (folder / one / "context").exists())
    return lambda: jobs.distill(student, checkpoint, folder / step, pair if step == "pair" else {})


def refusal(name: str, step: str) -> str | None:
    """Return why a step of a family is not supported, None if it is."""
    limit, algorithm = families.FAMILIES[name].files, step.removesuffix("-hf")
    return (
        limit.reason if limit and step.endswith("-hf") and algorithm in FORMATS and limit.applies(algorithm) else None
    )


def outcome(name: str, step: str, found: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the result of a family's step, a refusal without its reason included."""
    reason = refusal(name, step)
    if reason is None:
        return problem(step, found)
    error = str(found.get("error"))
    return None if error.startswith("ModelOptConfigError") and reason in error else f"not refused: {error}"


def problem(step: str, found: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the result of a step, None if nothing is."""
    if "error" in found:
        return str(found["error"]).splitlines()[0]
    if found.get("left"):
        return f"not quantized: {found['left']}"
    difference = found["difference"]
    if step in CHANGED_BY:
        return None if 1e-4 < difference < CHANGED_BY[step] else f"logits changed by {difference:.2g}"
    if not difference < (SAME_AWQ if step == "int4_awq-hf" else SAME):
        return f"logits differ by {difference:.2g}"
    if "rounded" in found:
        # A value on the edge of two codes is rounded either way, which changes other values. A wrong scale of an input
        # changes the logits by as much as rounding does, or more.
        allowed = max(SAME_AWQ, found["rounding"] / 2)
        return None if found["rounded"] < allowed else f"with rounded inputs, logits differ by {found['rounded']:.2g}"
    if "parameters" in found:
        before, after = found["parameters"]
        return None if after < before and found["changed"] > 0 else "nothing was pruned"
    if "losses" in found:
        losses = [step["kd_loss"] for step in found["losses"]]
        return None if len(losses) == 2 and all(map(math.isfinite, losses)) else f"losses {losses}"
    return None

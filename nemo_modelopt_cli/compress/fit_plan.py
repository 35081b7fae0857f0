"""The result of the search for sizes and formats: a file that a person can read, and its effect on a job."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_modelopt_cli.compress.fit_settings import Fit
from nemo_modelopt_cli.compress.settings import TARGETS, Job, SettingsError
from nemo_modelopt_cli.compress.stages import StageError, read_record
from nemo_modelopt_dropin.fit import choice, formats, grid, limits, pareto
from nemo_modelopt_dropin.fit.choice import Point, Problem
from nemo_modelopt_dropin.preflight import model_sizes

# Names of the sizes in a table.
_SHORT = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "ffn_hidden_size": "ffn",
    "num_attention_heads": "heads",
    "experts": "experts",
}
_WIDTH = 130
STAGE, NAME, REPORT = "search", "plan.json", "report"


def content(
    problem: Problem, points: Sequence[Point], tried: Sequence[Point], chosen: Point, job: Job, loss: float
) -> dict[str, Any]:
    """Return the plan as it is written.

    Args:
        problem: What was searched.
        points: The Pareto front.
        tried: The points that were measured.
        chosen: One of those that were measured, or of the front.
        job: The job.
        loss: Held-out loss of the original.
    """
    from nemo_modelopt_dropin.fit.prediction import rank_correlation  # imports numpy

    recovery = job.fit.recovery
    listed = {_key(point): point for point in [*points, *tried, chosen]}
    order = sorted(listed.values(), key=lambda point: [point.figures[kind] for kind in kinds(job.fit)])
    most = problem.resolved()
    predicted = [point.predicted for point in tried if point.measured is not None]
    measured = [point.measured for point in tried if point.measured is not None]
    return {
        "original": {
            "sizes": grid.sizes_of(problem.shape),
            "figures": problem.original,
            "loss": loss,
            "shape": problem.shape.describe(),
        },
        "budgets": most,
        "kinds": kinds(job.fit),
        "context": job.fit.context,
        "batch": job.fit.batch,
        "device": problem.device.name,
        "recovery": recovery,
        "points": [{"number": number, **_plain(point, recovery, most)} for number, point in enumerate(order, start=1)],
        "chosen": 1 + [_key(point) for point in order].index(_key(chosen)),
        "rank_correlation": rank_correlation(predicted, measured),
    }


def kinds(fit: Fit) -> list[str]:
    """Return the kinds of budgets that are set."""
    return [kind for kind in limits.KINDS if getattr(fit, kind) is not None]


def _key(point: Point) -> tuple[Any, ...]:
    return (*point.sizes.items(), point.format)


def _plain(point: Point, recovery: float, most: Mapping[str, float]) -> dict[str, Any]:
    return {
        "sizes": dict(point.sizes),
        "attention": point.format.attention,
        "mlp": point.format.mlp,
        "fp8_cache": point.format.fp8_cache,
        "format": point.format.name,
        "figures": dict(point.figures),
        "from_shape": point.from_shape,
        "from_format": point.from_format,
        "predicted": point.predicted,
        "measured": point.measured,
        "expected": point.after(recovery),
        "in_budget": all(point.figures[kind] <= value for kind, value in most.items()),
    }


def on_the_front(points: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """Return the points of a plan that no other beats in one figure and the expected loss."""
    pairs = [(point["figures"][kind], point["expected"]) for point in points]
    return [points[position] for position in pareto.front(pairs)]


def read(root: Path) -> dict[str, Any] | None:
    """Return the plan of a run whose search is finished, else None."""
    folder = root / STAGE
    if read_record(folder) is None:
        return None
    try:
        return json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def point_of(plan: Mapping[str, Any], fit: Fit) -> dict[str, Any]:
    """Return the point that a job uses: the chosen one, or that of ``fit.point``.

    Raises:
        SettingsError: If the plan has no such point.
    """
    number = fit.point or plan["chosen"]
    found = next((point for point in plan["points"] if point["number"] == number), None)
    if found is None:
        raise SettingsError(f"fit-point {number}: the search found the points 1 to {len(plan['points'])}")
    return found


def check_point(root: Path, job: Job) -> None:
    """Check that a finished search has the point of a job.

    Raises:
        SettingsError: See `point_of`.
    """
    if job.fit.is_set and job.fit.point is not None and (plan := read(root)) is not None:
        point_of(plan, job.fit)


def applied(job: Job, plan: Mapping[str, Any] | None) -> Job:
    """Return a job with the sizes and formats of its plan; a job without budgets is returned as it is.

    Raises:
        StageError: If the search has not finished.
        SettingsError: See `point_of`.
    """
    if not job.fit.is_set:
        return job
    if plan is None:
        raise StageError("the search for sizes and formats has not finished")
    point = point_of(plan, job.fit)
    shape = model_sizes.read(job.teacher)
    sizes = {f"target_{name}": size for name, size in grid.targets(shape, point["sizes"]).items()}
    targets: dict[str, Any] = {name: sizes.get(name) for name in TARGETS}
    pruning = replace(job.pruning, **targets)
    attention = None if point["attention"] == point["mlp"] else point["attention"]
    quantization = replace(
        job.quantization, algorithm=point["mlp"], attention_algorithm=attention, enable_kv_cache=point["fp8_cache"]
    )
    return replace(job, pruning=pruning, quantization=quantization, fit=Fit())


def made(root: Path, job: Job, names: Sequence[str]) -> Path:
    """Return the checkpoint of the last step that wrote one, or the teacher: a plan may need no pruning.

    Args:
        root: The run's folder.
        job: The job.
        names: Names of steps, in order.
    """
    folders = [root / name / "checkpoint" for name in names]
    # Without a budget, each step writes a checkpoint.
    found = [folder for folder in folders if folder.exists() or not may_skip(job)]
    return found[-1] if found else Path(job.teacher)


def may_skip(job: Job) -> bool:
    """Return whether a step of the job may have nothing to do."""
    return job.fit.is_set or job.quantization.weights == formats.Format(block=job.quantization.awq_block_size)


def prunes(job: Job) -> bool:
    """Return whether a job changes the sizes of the teacher."""
    names = (*TARGETS, "target_params", "drop_layers")
    return any(getattr(job.pruning, name) for name in names)


def rows(plan: Mapping[str, Any], fit: Fit) -> list[dict[str, str]]:
    """Return the points as text, one row each; the used one is marked."""
    used, original = point_of(plan, fit)["number"], plan["original"]
    sizes = [name for name in original["sizes"] if len({point["sizes"][name] for point in plan["points"]}) > 1]
    found = []
    for point in plan["points"]:
        row = {"point": f"{point['number']}{' *' if point['number'] == used else ''}"}
        row["/".join(_SHORT[name] for name in sizes) or "sizes"] = "/".join(str(point["sizes"][name]) for name in sizes)
        row["format"] = point["format"]
        row |= {kind: choice.shown(kind, point["figures"][kind]) for kind in limits.KINDS}
        row["predicted"] = f"{point['predicted']:+.4f}"
        row["measured"] = "" if point["measured"] is None else f"{point['measured']:+.4f}"
        row["expected"] = f"{original['loss'] + point['expected']:.4f}"
        row["budget"] = "" if point["in_budget"] else "above"
        found.append(row)
    return found


def sentences(plan: Mapping[str, Any], fit: Fit) -> list[str]:
    """Return what was chosen and how good the prediction was, in sentences."""
    point, original = point_of(plan, fit), plan["original"]
    changed = [
        f"{name.replace('_', ' ')} {size} to {point['sizes'][name]}"
        for name, size in original["sizes"].items()
        if size != point["sizes"][name]
    ]
    budgets = ", ".join(f"{kind} at most {choice.shown(kind, value)}" for kind, value in plan["budgets"].items())
    figures = ", ".join(f"{kind} {choice.shown(kind, point['figures'][kind])}" for kind in plan["budgets"])
    found = [
        f"Budget: {budgets}. Point {point['number']} of {len(plan['points'])}: {figures}.",
        f"Sizes: {', '.join(changed) or 'unchanged'}. Format: {point['format']}.",
        f"Expected held-out loss after distillation: {original['loss'] + point['expected']:.4f} (original "
        f"{original['loss']:.4f}, {plan['recovery']:.0%} of the loss by pruning regained).",
    ]
    tried = sum(one["measured"] is not None for one in plan["points"])
    correlation = plan["rank_correlation"]
    if tried:
        ranks = "" if correlation is None else f"; the rank correlation with the predictions is {correlation:.2f}"
        found.append(f"{tried} combinations were measured{ranks}.")
    return found


def show(found: Mapping[str, Any] | None, job: Job) -> None:
    """Print the points of a plan, if there is one."""
    from rich.console import Console

    from nemo_modelopt_dropin.report import fit

    if found is None:
        return
    screen = Console(file=sys.stdout)
    # In a narrow terminal, lines that wrap are better than cells that are cut.
    screen = Console(file=sys.stdout, width=max(screen.width, _WIDTH))
    screen.print(fit.table(rows(found, job.fit)))
    for sentence in sentences(found, job.fit):
        screen.print(sentence, highlight=False)
    screen.print("To use another point, add --fit-point N.", highlight=False)

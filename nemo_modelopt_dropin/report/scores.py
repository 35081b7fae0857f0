"""Scores on tasks of lm-eval, for the report and the screen: a row for each score, a column for each model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 3
_ARROWS = {True: " ↑", False: " ↓", None: ""}

NOTE = "± is one standard error, estimated by lm-eval from a task's rows. ↑: higher is better, ↓: lower is better."


def rows(evaluation: Mapping[str, Any] | None, members: bool = False) -> list[dict[str, str]]:
    """Return the table as text: task, metric, one column for each model, and the change from the first to the last.

    Args:
        evaluation: the scores of all models; None or empty if none were computed.
        members: return the tasks that belong to groups, in place of the groups and all other tasks.
    """
    models = (evaluation or {}).get("models") or []
    names = [model["model"] for model in models]
    scored = [_by_key(model["scores"]) for model in models]
    found = []
    for key in dict.fromkeys(key for one in scored for key in one):
        cells = [one.get(key) for one in scored]
        score = next(cell for cell in cells if cell is not None)
        if bool(score.get("part_of")) is not members:
            continue
        row = {"task": score["task"], "metric": f"{metric(score)}{_ARROWS[score.get('higher_is_better')]}"}
        row |= {name: text(cell) for name, cell in zip(names, cells, strict=True)}
        if len(models) > 1:
            both = cells[0] is not None and cells[-1] is not None
            row["change"] = number(cells[-1]["value"] - cells[0]["value"], "+") if both else ""  # type: ignore[index]
        found.append(row)
    return found


def metric(score: Mapping[str, Any]) -> str:
    """Return the name of a metric, with its filter if that is not the only one."""
    return score["metric"] if score["filter"] == "none" else f"{score['metric']} ({score['filter']})"


def text(score: Mapping[str, Any] | None) -> str:
    """Return a score with its standard error."""
    if score is None:
        return ""
    error = score.get("stderr")
    return number(score["value"]) + ("" if error is None else f" ± {number(error)}")


def number(value: float, sign: str = "") -> str:
    """Return a score, an error or a difference with as many digits as its size needs.

    Args:
        value: the number.
        sign: "+" shows the sign of positive numbers, too.
    """
    return f"{value:{sign}.4f}" if abs(value) < 10 else f"{value:{sign}.2f}"


def of_model(evaluation: Mapping[str, Any] | None, name: str) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return the scores of one model that belong to no group, by task and metric."""
    for model in (evaluation or {}).get("models") or []:
        if model["model"] == name:
            return {key: score for key, score in _by_key(model["scores"]).items() if not score.get("part_of")}
    return {}


def sentences(evaluation: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield a sentence for the first score of each of the first tasks, if the teacher and a last model have it."""
    models = (evaluation or {}).get("models") or []
    if len(models) < 2 or models[0]["model"] != "teacher":
        return
    first, last = models[0]["model"], models[-1]["model"]
    before = of_model(evaluation, first)
    told: set[str] = set()
    for key, score in of_model(evaluation, last).items():
        if key not in before or key[0] in told or len(told) == _SHOWN:
            continue
        told.add(key[0])
        yield f"{key[0]}, {metric(score)}: {text(score)} ({last}), the teacher {text(before[key])}."


def table(evaluation: Mapping[str, Any]) -> Table:
    """Return the scores as a table for a terminal."""
    from rich import box
    from rich.table import Table

    found = Table(
        title=f"Scores of lm-eval, {described(evaluation)}", caption=NOTE, box=box.SIMPLE_HEAD, pad_edge=False
    )
    shown = rows(evaluation)
    for name in shown[0] if shown else ("task",):
        found.add_column(name, justify="left" if name in ("task", "metric") else "right", overflow="fold")
    for row in shown:
        found.add_row(*row.values())
    return found


def described(evaluation: Mapping[str, Any]) -> str:
    """Return in a few words what computed the scores."""
    packages = evaluation.get("packages") or {}
    backend = {"hf": "transformers"}.get(evaluation["backend"], evaluation["backend"])
    versions = [f"{name.replace('_', '-')} {packages[name]}" for name in ("lm_eval", backend) if name in packages]
    limit = evaluation.get("limit")
    return ", ".join([*versions, *([] if limit is None else [f"at most {limit} rows of each task"])])


def _by_key(found: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {(score["task"], metric(score)): score for score in found}

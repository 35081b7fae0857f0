"""Scores from lm-eval's results, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Keys of a task's results that are not scores: they have no filter after a comma.
_ERROR = "_stderr"


def of_answer(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each task, metric and filter, in lm-eval's order.

    Args:
        answer: of the harness for one model.

    Returns:
        Rows with ``task``, ``metric``, ``filter``, ``value``, ``stderr`` (None if it is not computed),
        ``higher_is_better`` (None if unknown), ``fewshot``, ``rows``, ``part_of`` (a group, or None) and ``version`` of
        the task.
    """
    groups = {
        child: group for group, children in (answer.get("group_subtasks") or {}).items() for child in children or ()
    }
    found = []
    for task, results in answer["results"].items():
        better = (answer.get("higher_is_better") or {}).get(task) or {}
        rows = (answer.get("n-samples") or {}).get(task) or {}
        for key, value in results.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith(_ERROR) or not isinstance(value, (int, float)):
                continue
            error = results.get(f"{metric}{_ERROR},{name}")
            found.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": name,
                    "value": value,
                    "stderr": error if isinstance(error, (int, float)) else None,
                    "higher_is_better": better.get(metric),
                    "fewshot": (answer.get("n-shot") or {}).get(task),
                    "rows": rows.get("effective"),
                    "part_of": groups.get(task),
                    "version": (answer.get("versions") or {}).get(task),
                }
            )
    return found

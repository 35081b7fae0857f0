"""Run EleutherAI's lm-eval: ``python harness.py REQUEST.json RESPONSE.json``.

`child` starts this file with the interpreter that has lm-eval, which may have neither NeMo nor this package. So it
imports only the standard library and lm-eval.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import Any

# What is kept of lm-eval's results; the rest describes its own environment.
_KEPT = ("results", "groups", "group_subtasks", "n-shot", "n-samples", "higher_is_better", "versions")
_PACKAGES = ("lm_eval", "transformers", "vllm", "torch", "datasets", "compressed-tensors")


def main(request_path: str, response_path: str) -> int:
    """Answer the request in a file, and return the exit code."""
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != own]  # our modules must not hide those of others
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    try:
        answer = _ACTIONS[request["action"]](request)
    except BaseException as error:
        traceback.print_exc()
        answer = {"error": _text(error)}
    with open(response_path, "w", encoding="utf-8") as file:
        json.dump(answer, file, default=str)
    return 1 if "error" in answer else 0


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Load the tasks and their data, without a model.

    Returns:
        The missing modules, or the versions of the packages and the tasks that are unknown or cannot be loaded.
    """
    missing = [name for name in request["modules"] if importlib.util.find_spec(name) is None]
    if missing:
        return {"missing": missing}
    found: dict[str, Any] = {"packages": _versions(), "unknown": [], "failed": {}}
    if "lm_eval" not in found["packages"] or _numbers(found["packages"]["lm_eval"]) < _numbers(request["least"]):
        return found
    manager = _manager(request)
    for name in request["tasks"]:
        specs = _matching(manager, name)
        if not specs:
            found["unknown"].append(name)
            continue
        try:
            manager.load(specs)
        except Exception as error:
            traceback.print_exc()
            found["failed"][name] = _text(error)
    if found["unknown"]:
        found["known"] = list(manager.all_tasks)
    return found


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Score one model on the tasks."""
    from lm_eval import simple_evaluate

    manager = _manager(request)
    specs = [spec for name in request["tasks"] for spec in _matching(manager, name)]
    found = simple_evaluate(
        model=request["model"],
        model_args=request["model_args"],
        tasks=specs,
        num_fewshot=request["fewshot"],
        batch_size=request["batch_size"],
        device=request["device"],
        limit=request["limit"],
        apply_chat_template=request["chat_template"],
        task_manager=manager,
        log_samples=False,
    )
    return {"packages": _versions(), **{name: found[name] for name in _KEPT if name in found}}


_ACTIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"check": check, "run": run}


def _manager(request: dict[str, Any]) -> Any:
    """Return lm-eval's index of tasks; its own ones take seconds to read and are left out if none can be meant."""
    from lm_eval.tasks import TaskManager

    include = request["include"] or None
    return TaskManager(include_path=include, include_defaults=request["built_in"], metadata=request.get("model_args"))


def _matching(manager: Any, name: str) -> list[str]:
    """Return the tasks that a name, a pattern or a path means."""
    return [name] if os.path.isfile(name) else list(manager.match_tasks([name]))


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:3] if part.isdecimal()]


def _text(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Check, before a model is loaded, that lm-eval is installed and that it has the tasks and their data."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from nemo_modelopt_cli.evaluation import child, tasks
from nemo_modelopt_cli.evaluation.harness_settings import Harness
from nemo_modelopt_dropin.errors import ModelOptConfigError, suggestion
from nemo_modelopt_dropin.preflight import readers

LEAST = "0.4.13"
REQUIREMENT = "lm-eval>=0.4.13,<0.5"
# Modules that the backends need besides lm-eval, and the package of each that has another name.
_MODULES = {readers.TRANSFORMERS: ("torch", "transformers", "accelerate"), readers.VLLM: ("vllm",)}
_COMPRESSED = "compressed_tensors"
_PACKAGES = {"lm_eval": f"'{REQUIREMENT}'", _COMPRESSED: "compressed-tensors"}


def check(
    names: Sequence[str], harness: Harness, compressed: bool = False, flag: str = "--evaluate-python"
) -> dict[str, str]:
    """Return the versions of lm-eval's packages if all tasks can be run.

    Args:
        names: tasks, one by one.
        harness: checked settings.
        compressed: whether a model in the layout of compressed-tensors is among those to score.
        flag: sets the interpreter, for messages.

    Raises:
        ModelOptConfigError: naming what is missing or unknown, and what to do.
    """
    modules = ["lm_eval", *_MODULES[harness.reader]]
    modules += [_COMPRESSED] if compressed and harness.reader == readers.TRANSFORMERS else []
    request = {"action": "check", "modules": modules, "least": LEAST, **of_tasks(names)}
    answer = json.loads(_asked(harness.interpreter, json.dumps(request, sort_keys=True)))
    if "error" in answer:
        output = f"\n{answer['output']}" if answer.get("output") else ""
        raise ModelOptConfigError(f"lm-eval cannot be started with {harness.interpreter}: {answer['error']}{output}")
    if problems := list(_problems(answer, harness, flag)):
        raise ModelOptConfigError("\n".join(problems))
    return answer["packages"]


def of_tasks(names: Iterable[str]) -> dict[str, Any]:
    """Return the part of a request that names the tasks."""
    wanted, folders, built_in = [], [], False
    for name in names:
        if not tasks.is_path(name):
            wanted.append(name)
            built_in = True
            continue
        found = tasks.chosen(name)
        # lm-eval 0.4.13 loads tasks by their paths, but groups only by name, from the folders that it searches.
        wanted += [str(one.path) if one.members is None else one.name for one in found]
        folders += [str(folder) for folder in tasks.searched(name)]
        # A group may name tasks of lm-eval.
        built_in = built_in or any(one.members is not None for one in found)
    return {"tasks": wanted, "include": list(dict.fromkeys(folders)), "built_in": built_in}


@functools.lru_cache
def _asked(python: str, request: str) -> str:
    """Ask the harness once in this process: reading lm-eval's tasks takes seconds."""
    return json.dumps(child.ask(python, json.loads(request)))


def _problems(answer: dict[str, Any], harness: Harness, flag: str) -> Iterable[str]:
    python = harness.interpreter
    if missing := answer.get("missing"):
        packages = " ".join(_PACKAGES.get(name, name) for name in missing)
        yield (
            f"The evaluation needs {', '.join(missing)}, which {python} does not have. Install it with {python} -m pip "
            f"install {packages}, or choose an interpreter that has it: {flag}."
        )
        return
    version = answer["packages"].get("lm_eval")
    if version is None or _numbers(version) < _numbers(LEAST):
        yield (
            f"lm-eval {version or 'of unknown version'} is installed for {python}, and {LEAST} or newer is needed. "
            f"Install it with {python} -m pip install '{REQUIREMENT}'."
        )
        return
    for name in answer["unknown"]:
        yield (
            f"tasks {name}: lm-eval {version} has no such task, group or tag.{suggestion(name, answer['known'])} "
            f"List them with {python} -m lm_eval ls tasks, or pass a YAML file."
        )
    for name, reason in answer["failed"].items():
        yield f"tasks {name}: lm-eval cannot load the task or its data: {reason}.{_offline(reason)}"


def _offline(reason: str) -> str:
    """Return a hint if the data are probably not in the cache."""
    lowered = reason.lower()
    signs = ("offline", "couldn't reach", "connection", "cache", "hub")
    offline = child.environment(os.environ).get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    if not offline or not any(sign in lowered for sign in signs):
        return ""
    return " Data come from the cache of datasets; set the environment variable HF_HUB_OFFLINE=0 to download them."


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:3] if part.isdecimal()]

"""Score the model in a Hugging Face folder with lm-eval, with a progress bar on the screen."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_modelopt_cli.evaluation import check, child, scores
from nemo_modelopt_cli.evaluation.harness_settings import Harness


class ScoringError(RuntimeError):
    """lm-eval failed on a model; the message contains its error."""


def summary(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores and the time of an answer of `score`."""
    return {"seconds": answer["seconds"], "scores": scores.of_answer(answer)}


def score(
    folder: Path, names: tuple[str, ...], harness: Harness, label: str, cpu: bool, devices: int
) -> dict[str, Any]:
    """Return lm-eval's answer for the model in a Hugging Face folder, with a progress bar.

    Args:
        folder: the model.
        names: tasks, one by one.
        harness: the settings.
        label: name of the model, for the bar and messages.
        cpu: whether to run on the CPU.
        devices: GPUs to split the model over.

    Raises:
        ScoringError: if lm-eval fails, with its error.
    """
    request: dict[str, Any] = {
        "action": "run",
        **check.of_tasks(names),
        "model": harness.backend,
        "model_args": {"pretrained": str(folder), **harness.arguments(devices)},
        "limit": harness.limit,
        "fewshot": harness.fewshot,
        "batch_size": harness.batch(),
        "chat_template": harness.chat_template,
        "device": None if harness.backend == "vllm" else "cpu" if cpu else "cuda",
    }
    started = time.perf_counter()
    with _Bar(label) as bar:
        answer = child.ask(harness.interpreter, request, bar.show)
    if "error" in answer:
        hint = " Lower the batch size." if "out of memory" in answer["error"].lower() else ""
        output = f"\n{answer['output']}" if answer.get("output") else ""
        raise ScoringError(f"lm-eval failed on {label} ({folder}): {answer['error']}.{hint}{output}")
    return {**answer, "request": request, "seconds": round(time.perf_counter() - started, 1)}


class _Bar:
    """One progress bar of ours at a time, for lm-eval's bars."""

    def __init__(self, label: str):
        self.label, self.title = label, ""
        self.bar: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, title: str, done: int, whole: int) -> None:
        """Move the bar, or begin one with another title."""
        from nemo_modelopt_dropin.console import screen

        if "requests" not in title:  # files that are read, a bootstrap: short
            return
        if self.bar is None or title != self.title or whole != self.bar.total:
            self.__exit__()
            self.title = title
            self.bar = screen.bar(total=whole, desc=f"{self.label}: {title.lower()}", unit="request")
        self.bar.update(done - self.bar.n)

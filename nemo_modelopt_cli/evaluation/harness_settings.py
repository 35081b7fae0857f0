"""Settings of lm-eval, checked before it is started: for the job step of compress and for the command evaluate."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nemo_modelopt_cli.evaluation import tasks as task_files
from nemo_modelopt_cli.options import option
from nemo_modelopt_dropin.errors import did_you_mean
from nemo_modelopt_dropin.preflight import algorithms, families, model_sizes, readers

# The program that loads the model -> its name in the table of readers.
BACKENDS = {"hf": readers.TRANSFORMERS, "vllm": readers.VLLM}
EXPORTED = "exported"
MODELS = ("teacher", "pruned", "distilled", EXPORTED)
_AUTO = re.compile(r"auto(:\d+)?")
_WORDS = {"true": True, "false": False, "none": None}
_HF_BATCH = 8


@dataclass(frozen=True)
class Harness:
    """How lm-eval runs; None leaves the choice to lm-eval."""

    limit: int | None = field(default=None, metadata=option("rows of each task to use (default: all)"))
    fewshot: int | None = field(
        default=None, metadata=option("examples in front of each question (default: those of the task)")
    )
    batch_size: str | None = field(
        default=None,
        metadata=option(f"rows per forward pass, or auto (default: {_HF_BATCH}; vllm: auto)", metavar="N"),
    )
    backend: str = field(
        default="hf", metadata=option("what loads the models: hf (transformers) or vllm", metavar="NAME")
    )
    chat_template: bool = field(
        default=False, metadata=option("format the questions with the tokenizer's chat template")
    )
    model_args: str | None = field(
        default=None,
        metadata=option("arguments of lm-eval's model, for example dtype=float32,max_length=2048", metavar="K=V,..."),
    )
    python: str | None = field(
        default=None, metadata=option("Python interpreter that has lm-eval (default: the one of this command)")
    )

    def harness_problems(self, where: str = "") -> list[str]:
        """Return what is wrong with these settings.

        Args:
            where: what precedes the name of a setting in a message.
        """
        found = []
        if self.limit is not None and self.limit < 1:
            found.append(f"{where}limit must be positive, got {self.limit}")
        if self.fewshot is not None and self.fewshot < 0:
            found.append(f"{where}fewshot must not be negative, got {self.fewshot}")
        size = self.batch_size
        if size is not None and not (_AUTO.fullmatch(size) or (size.isdecimal() and int(size) > 0)):
            found.append(f"{where}batch_size must be a positive number or auto, got {size!r}")
        if self.backend not in BACKENDS:
            found.append(
                f"{where}unknown backend {self.backend!r}; allowed: {', '.join(BACKENDS)}"
                f"{did_you_mean(self.backend, BACKENDS)}"
            )
        if any("=" not in one for one in _split(self.model_args)):
            found.append(f"{where}model_args must be NAME=VALUE,..., got {self.model_args!r}")
        if shutil.which(self.interpreter) is None:
            found.append(f"{where}python {self.python}: there is no such program")
        return found

    @property
    def interpreter(self) -> str:
        """The interpreter that runs lm-eval."""
        return os.path.expanduser(self.python) if self.python else sys.executable

    @property
    def reader(self) -> str:
        """The program that loads the models, as the table of readers names it."""
        return BACKENDS[self.backend]

    def batch(self) -> str:
        """Return the batch size for lm-eval."""
        return self.batch_size or ("auto" if self.backend == "vllm" else str(_HF_BATCH))

    def arguments(self, devices: int) -> dict[str, Any]:
        """Return the arguments of lm-eval's model, without its folder; those of the user win.

        Args:
            devices: GPUs to split a model over.
        """
        found: dict[str, Any] = {"dtype": "auto"}
        if self.backend == "hf":
            # lm-eval's default is the model's type: in bf16, log probabilities near -5 have steps of 0.03, which hide
            # what compression changes.
            found["softmax_dtype"] = "float32"
        if devices > 1:
            found |= {"tensor_parallel_size": devices} if self.backend == "vllm" else {"parallelize": True}
        for one in _split(self.model_args):
            name, _, value = one.partition("=")
            found[name.strip()] = _value(value.strip())
        return found


@dataclass(frozen=True)
class Evaluation(Harness):
    """Tasks of lm-eval on which models of a compression job are scored; no tasks: no such step."""

    tasks: tuple[str, ...] = field(
        default=(),
        metadata=option(
            "tasks of EleutherAI's lm-eval to score the models on: names, patterns, YAML files of tasks or folders of "
            "them, separated by commas (default: none)",
            "--evaluate",
            metavar="TASKS",
        ),
    )
    models: tuple[str, ...] = field(
        default=("teacher", EXPORTED), metadata=option(f"models to score, any of {', '.join(MODELS)}", metavar="MODEL")
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, one by one."""
        return task_files.names(self.tasks)

    @property
    def ordered(self) -> tuple[str, ...]:
        """The models to score, in the order of the job."""
        return tuple(name for name in MODELS if name in self.models)

    def problems(self, algorithm: str, hf_layout: str, formats: tuple[str, ...], teacher: str | None) -> list[str]:
        """Return what is wrong with the settings, and whether the exported files cannot be loaded.

        Args:
            algorithm: of the quantization.
            hf_layout: requested layout of Hugging Face files.
            formats: of the export.
            teacher: checkpoint of the teacher; None if it does not exist yet.
        """
        if not self.names:
            usual = Evaluation()
            others = [one.name for one in fields(self) if getattr(self, one.name) != getattr(usual, one.name)]
            unused = f"evaluation: {', '.join(others)} without tasks (--evaluate) has no effect; set tasks"
            return [unused] if others else []
        found = self.harness_problems("evaluation: ")
        found += [f"evaluation: {problem}" for name in self.names for problem in task_files.problems(name)]
        unknown = [name for name in self.models if name not in MODELS]
        found += [
            f"evaluation: unknown model {name!r}; allowed: {', '.join(MODELS)}{did_you_mean(name, MODELS)}"
            for name in unknown
        ]
        if not self.models:
            found.append(f"evaluation: set at least one model, any of {', '.join(MODELS)}")
        if {*self.models} - {EXPORTED, *unknown}:
            found += [f"evaluation: {problem}" for problem in conversion_problems(teacher)]
        if EXPORTED in self.models and not found:
            shape = model_sizes.known(teacher)
            found += self._export_problems(algorithm, hf_layout, formats, bool(shape is not None and shape.experts))
        return found

    def _export_problems(self, algorithm: str, hf_layout: str, formats: tuple[str, ...], experts: bool) -> list[str]:
        """Return why the exported files cannot be loaded by the backend."""
        otherwise = "or leave the exported model out (--evaluate-models teacher distilled)"
        if "hf" not in formats:
            missing = "lm-eval loads Hugging Face files, which are not exported"
            return [f"evaluation: {missing}: add hf to --formats, {otherwise}"]
        hf_format = algorithms.hf_format_of(algorithm)
        if hf_format is None or algorithms.layout_problems("hf_layout", algorithm, hf_layout):
            return []  # reported with the export
        layout = algorithms.layout_of(hf_format, hf_layout)
        reason = unreadable(hf_format, layout, self.reader, experts)
        if reason is None:
            return []
        remedies = [
            *(
                f"--hf-layout {other}"
                for other in readers.LAYOUTS
                if other != layout and self.reader in readers.of(hf_format, other, experts)
            ),
            *(
                f"--evaluate-backend {name}"
                for name, reader in BACKENDS.items()
                if reader != self.reader and reader in readers.of(hf_format, layout, experts)
            ),
        ]
        choices = f"use {', or '.join(remedies)}, {otherwise}" if remedies else f"use another algorithm, {otherwise}"
        return [
            f"evaluation: {self.reader} cannot load the exported files ({algorithm} in the layout {layout}): {reason}; "
            f"{choices}"
        ]


def conversion_problems(checkpoint: str | None) -> list[str]:
    """Return why a NeMo checkpoint, or a pruned one of it, cannot be written as Hugging Face files with a tokenizer.

    Args:
        checkpoint: the checkpoint; None for none.
    """
    context = Path(checkpoint or "") / "context"
    if not checkpoint or not context.is_dir():
        return []
    problem = families.file_problem(model_sizes.config_of(checkpoint), algorithms.NO_QUANT)
    found = [f"{checkpoint} cannot be written as Hugging Face files: {problem}"] if problem else []
    if any(context.rglob("*.model")) and not any(context.rglob("tokenizer_config.json")):
        found.append(f"the tokenizer of {checkpoint} is not one of transformers, which lm-eval needs")
    return found


def unreadable(hf_format: str, layout: str, reader: str, experts: bool = False) -> str | None:
    """Return why a program does not read a format in a layout, None if it does or if that is not known."""
    cell = readers.cells(hf_format, layout).get(reader)
    if cell is None or (cell.reads and (cell.experts or not experts)):
        return None
    return "it does not read quantized experts" if cell.reads else cell.reason or cell.how


def _split(model_args: str | None) -> list[str]:
    return [one for one in (model_args or "").split(",") if one.strip()]


def _value(text: str) -> Any:
    """Return an argument as lm-eval reads it on its command line."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

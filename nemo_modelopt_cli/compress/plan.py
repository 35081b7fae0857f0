"""The steps of a compression job, in order. Importing this is cheap: NeMo is imported when a step runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from nemo_modelopt_cli.compress import evaluating, expert_scales, fit_plan
from nemo_modelopt_cli.compress.digests import Digests
from nemo_modelopt_cli.compress.facts import MODELS as MODELS
from nemo_modelopt_cli.compress.settings import TARGETS, Job, Quantization, Training
from nemo_modelopt_cli.compress.stages import Record, Stage

_STEPS = ("tokens", "teacher", fit_plan.STAGE, "prune", "distill", "scratch", "quantize", "export", "evaluate")
# Steps that only some jobs have.
_OPTIONAL = {
    "scratch": lambda job: job.scratch,
    fit_plan.STAGE: lambda job: job.fit.is_set,
    "evaluate": lambda job: bool(job.evaluation.names),
}
# Newer settings, which the records omit at their defaults, so that results of earlier versions stay valid.
_NEWER = ("attention_algorithm", "target_num_moe_experts", "target_moe_ffn_hidden_size")
# Settings of quantization that only the export step depends on, those that it always records first.
_OF_EXPORT = ("formats", "verify", "hf_layout", "max_shard_size")

# Called with `jobs`, the step's folder and the stream for progress bars.
_Work = Callable[[Any, Path, "TextIO | None"], dict[str, Any]]


def step_names(job: Job) -> list[str]:
    """Return the names of a job's steps in order, without reading its inputs."""
    return [name for name in _STEPS if name not in _OPTIONAL or _OPTIONAL[name](job)]


def compression_stages(job: Job, root: Path, before: str | None = None, digests: Digests | None = None) -> list[Stage]:
    """Return the steps tokens, teacher, (search,) prune, distill, (scratch,) quantize, export(, evaluate).

    A job with budgets gets its sizes and formats from the search, when its later steps run.

    Args:
        job: checked settings.
        root: the run's folder.
        before: name of a step that writes the teacher and the texts; None: they exist already.
        digests: of the inputs, if some are known already; new ones are added.
    """
    digests = digests or Digests()
    first = (before,) if before else ()
    inputs: dict[str, Any] = {"seq_length": job.seq_length, "cpu": job.layout.cpu}
    texts: dict[str, Any] = {}
    if before is None:
        texts = {"train": digests.file(job.train_text), "heldout": digests.file(job.heldout_text)}
        inputs["teacher"] = digests.folder(job.teacher)
    training = outcome(job.distillation) | {"cpu": job.layout.cpu}
    config = digests.file(job.distill_config) if job.distill_config else None
    known_teacher = before is None
    tokens = root / "tokens"
    after_teacher = ("teacher", fit_plan.STAGE) if job.fit.is_set else ("teacher",)

    def chosen() -> Job:
        return fit_plan.applied(job, fit_plan.read(root))

    def made(*names: str) -> Path:
        return fit_plan.made(root, job, names)

    steps = [
        _step("tokens", lambda jobs, folder, out: jobs.tokenize(folder, job), texts, first),
        _step(
            "teacher",
            lambda jobs, folder, out: jobs.measure(Path(job.teacher), tokens, job),
            inputs,
            (*first, "tokens"),
        ),
        _step(
            fit_plan.STAGE,
            lambda jobs, folder, out: jobs.search(folder, job, tokens, root),
            _searched(job),
            ("teacher",),
            keeps_progress=True,
        ),
        _step(
            "prune",
            lambda jobs, folder, out: jobs.prune(folder, chosen(), tokens, root),
            _pruned_to(job, known_teacher),
            after_teacher,
        ),
        _step(
            "distill",
            lambda jobs, folder, out: jobs.distill(folder, chosen(), made("prune"), tokens, out, root),
            training | {"config": config},
            ("prune",),
            keeps_progress=True,
        ),
        _step(
            "scratch",
            lambda jobs, folder, out: jobs.from_scratch(folder, job, made("prune"), tokens, out),
            training,
            ("prune",),
            keeps_progress=True,
        ),
        _step(
            "quantize",
            lambda jobs, folder, out: jobs.quantize(folder, chosen(), made("prune", "distill"), tokens, root),
            _quantized_with(job, known_teacher),
            ("distill",),
        ),
        _step(
            "export",
            lambda jobs, folder, out: jobs.export(folder, chosen(), made("prune", "distill", "quantize"), tokens, root),
            _exported_as(job),
            ("quantize",),
        ),
        _step(
            "evaluate",
            lambda jobs, folder, out: evaluating.evaluate(folder, job, root),
            evaluating.settings(job, digests),
            ("export",),
            keeps_progress=True,
            ready=lambda: evaluating.ready(job),
        ),
    ]
    return [step for step in steps if step.name in step_names(job)]


def search_stages(steps: Sequence[Stage]) -> list[Stage]:
    """Return the steps of a job up to its search."""
    return list(itertools.takewhile(lambda step: step.name != "prune", steps))


def _searched(job: Job) -> dict[str, Any]:
    """Return the settings on which the outcome of the search depends."""
    if not job.fit.is_set:
        return {}
    fit = {name: value for name, value in asdict(job.fit).items() if name != "point"}
    fixed = {name: size for name in TARGETS if (size := getattr(job.pruning, name)) is not None}
    names = ("awq_block_size", "calibration_size", "calibration_batch_size", "calibration_seq_len", "hf_layout")
    samples = {name: getattr(job.pruning, name) for name in ("num_samples", "micro_batch_size", "heldout_batches")}
    quantization = {name: getattr(job.quantization, name) for name in names}
    return {**fit, "fixed": fixed, **samples, **quantization}


def _pruned_to(job: Job, known_teacher: bool) -> dict[str, Any]:
    """Return the settings on which the outcome of pruning depends."""
    # The search of a parameter budget depends on these, too; given sizes do not.
    multiples = job.size_multiples() if known_teacher else {}
    found = _without_newer(asdict(job.pruning)) | ({"size_multiples": multiples} if multiples else {})
    return found | ({"fit_point": job.fit.point} if job.fit.point is not None else {})


def _quantized_with(job: Job, known_teacher: bool) -> dict[str, Any]:
    """Return the settings on which the outcome of quantization depends."""
    found = {k: v for k, v in _without_newer(asdict(job.quantization)).items() if k not in _OF_EXPORT}
    if job.fit.is_set:  # the search chooses these
        return {k: v for k, v in found.items() if k not in ("algorithm", "enable_kv_cache")} | {
            "hf_layout": job.quantization.hf_layout
        }
    if job.quantization.layout_of_scales:
        found["hf_layout"] = job.quantization.layout_of_scales
    # Change the text if the calibration of experts changes, so that finished results run again.
    if known_teacher and (layout := expert_scales.layout(job.quantization, job.teacher)):
        found["expert_inputs"] = f"weighted outputs, for {layout}"
    return found


def _exported_as(job: Job) -> dict[str, Any]:
    """Return the settings on which only the exported files depend."""
    usual = Quantization()
    return {
        name: value
        for name in _OF_EXPORT
        if (value := getattr(job.quantization, name)) != getattr(usual, name) or name in ("formats", "verify")
    }


def _without_newer(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _NEWER or value is not None}


def _step(
    name: str,
    work: _Work,
    settings: Mapping[str, Any],
    after: tuple[str, ...],
    keeps_progress: bool = False,
    ready: Callable[[], None] | None = None,
) -> Stage:
    """Return a step that imports NeMo only when it runs."""

    def run(folder: Path, records: Mapping[str, Record], out: TextIO | None) -> dict[str, Any]:
        from nemo_modelopt_cli.compress import jobs

        return work(jobs, folder, out)

    return Stage(name, run, settings, after, keeps_progress, ready)


def outcome(training: Training) -> dict[str, Any]:
    """Return the settings on which the outcome of a training run depends."""
    return {name: value for name, value in asdict(training).items() if name != "save_every"}

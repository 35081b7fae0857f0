"""The steps of a compression job, in order. Importing this is cheap: NeMo is imported when a step runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from nemo_modelopt_cli.compress import evaluating, expert_scales
from nemo_modelopt_cli.compress.digests import Digests
from nemo_modelopt_cli.compress.facts import MODELS as MODELS
from nemo_modelopt_cli.compress.settings import Job, Quantization, Training
from nemo_modelopt_cli.compress.stages import Record, Stage

_STEPS = ("tokens", "teacher", "prune", "distill", "scratch", "quantize", "export", "evaluate")
# Settings of quantization that only the export step depends on, those that it always records first.
_OF_EXPORT = ("formats", "verify", "hf_layout", "max_shard_size")

# Called with `jobs`, the step's folder and the stream for progress bars.
_Work = Callable[[Any, Path, "TextIO | None"], dict[str, Any]]


def step_names(job: Job) -> list[str]:
    """Return the names of a job's steps in order, without reading its inputs."""
    optional = {"scratch": job.scratch, "evaluate": bool(job.evaluation.names)}
    return [name for name in _STEPS if optional.get(name, True)]


def compression_stages(job: Job, root: Path, before: str | None = None, digests: Digests | None = None) -> list[Stage]:
    """Return the steps tokens, teacher, prune, distill, (scratch,) quantize, export(, evaluate).

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
    # The search for sizes depends on these, too; given sizes do not.
    multiples = job.size_multiples() if before is None else {}
    pruned_to = asdict(job.pruning) | ({"size_multiples": multiples} if multiples else {})
    quantization = {k: v for k, v in asdict(job.quantization).items() if k not in _OF_EXPORT}
    if job.quantization.layout_of_scales:
        quantization["hf_layout"] = job.quantization.layout_of_scales
    # Change the text if the calibration of experts changes, so that finished results run again.
    if before is None and (layout := expert_scales.layout(job.quantization, job.teacher)):
        quantization["expert_inputs"] = f"weighted outputs, for {layout}"
    # The newer settings are omitted at their defaults, so that results of earlier versions stay valid.
    usual = Quantization()
    formats = {
        name: value
        for name in _OF_EXPORT
        if (value := getattr(job.quantization, name)) != getattr(usual, name) or name in ("formats", "verify")
    }

    tokens = root / "tokens"
    pruned, distilled, quantized = (root / name / "checkpoint" for name in ("prune", "distill", "quantize"))
    steps = [
        _step("tokens", lambda jobs, folder, out: jobs.tokenize(folder, job), texts, first),
        _step(
            "teacher",
            lambda jobs, folder, out: jobs.measure(Path(job.teacher), tokens, job),
            inputs,
            (*first, "tokens"),
        ),
        _step("prune", lambda jobs, folder, out: jobs.prune(folder, job, tokens), pruned_to, ("teacher",)),
        _step(
            "distill",
            lambda jobs, folder, out: jobs.distill(folder, job, pruned, tokens, out),
            training | {"config": config},
            ("prune",),
            keeps_progress=True,
        ),
        _step(
            "scratch",
            lambda jobs, folder, out: jobs.from_scratch(folder, job, pruned, tokens, out),
            training,
            ("prune",),
            keeps_progress=True,
        ),
        _step(
            "quantize",
            lambda jobs, folder, out: jobs.quantize(folder, job, distilled, tokens),
            quantization,
            ("distill",),
        ),
        _step(
            "export",
            lambda jobs, folder, out: jobs.export(folder, job, quantized, tokens, root),
            formats,
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

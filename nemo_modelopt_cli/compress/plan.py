"""The stages of a compression job, in order. Importing this is cheap: NeMo comes in when a stage runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from nemo_modelopt_cli.compress.settings import Job, Training, file_digest, folder_digest
from nemo_modelopt_cli.compress.stages import Record, Stage

# Where the held-out loss of each model is found, and what people call it, in the order of the job.
MODELS = {
    "teacher": "teacher",
    "prune": "pruned",
    "distill": "distilled",
    "scratch": "from scratch",
    "quantize": "quantized",
}


def compression_stages(job: Job, root: Path, before: str | None = None, out: TextIO | None = None) -> list[Stage]:
    """Return the stages tokens, teacher, prune, distill, (scratch,) quantize, export.

    Args:
        job: checked settings.
        root: the run's folder.
        before: name of a stage that writes the teacher and the texts; None: they exist already.
        out: where progress bars go.
    """
    first = (before,) if before else ()
    inputs: dict[str, Any] = {"seq_length": job.seq_length, "cpu": job.layout.cpu}
    texts: dict[str, Any] = {}
    if before is None:
        texts = {"train": file_digest(job.train_text), "heldout": file_digest(job.heldout_text)}
        inputs["teacher"] = folder_digest(job.teacher)
    distillation = outcome(job.distillation) | {"cpu": job.layout.cpu}
    config = file_digest(job.distill_config) if job.distill_config else None

    def checkpoint(name: str) -> Path:
        return root / name / "checkpoint"

    def stage(name, work, settings, after, keeps_progress=False):
        def run(folder: Path, records: Mapping[str, Record]) -> dict[str, Any]:
            from nemo_modelopt_cli.compress import jobs

            return work(jobs, folder)

        return Stage(name, run, settings, after, keeps_progress)

    token_folder = root / "tokens"
    # What the search of sizes depends on besides its own settings; nothing for sizes that are given.
    multiples = job.size_multiples() if before is None else {}
    pruned_to = asdict(job.pruning) | ({"size_multiples": multiples} if multiples else {})
    pruned, distilled = checkpoint("prune"), checkpoint("distill")
    stages = [
        stage("tokens", lambda jobs, folder: jobs.tokenize(folder, job), texts, first),
        stage(
            "teacher",
            lambda jobs, folder: jobs.measure(Path(job.teacher), token_folder, job),
            inputs,
            (*first, "tokens"),
        ),
        stage("prune", lambda jobs, folder: jobs.prune(folder, job, token_folder), pruned_to, ("teacher",)),
        stage(
            "distill",
            lambda jobs, folder: jobs.distill(folder, job, pruned, token_folder, out),
            distillation | {"config": config},
            ("prune",),
            True,
        ),
        stage(
            "quantize",
            lambda jobs, folder: jobs.quantize(folder, job, distilled, token_folder),
            {k: v for k, v in asdict(job.quantization).items() if k not in ("formats", "verify")},
            ("distill",),
        ),
        stage(
            "export",
            lambda jobs, folder: jobs.export(folder, job, checkpoint("quantize"), token_folder),
            {"formats": job.quantization.formats, "verify": job.quantization.verify},
            ("quantize",),
        ),
    ]
    if job.scratch:
        scratch = stage(
            "scratch",
            lambda jobs, folder: jobs.from_scratch(folder, job, pruned, token_folder, out),
            distillation,
            ("prune",),
            True,
        )
        stages.insert(4, scratch)
    return stages


def outcome(training: Training) -> dict[str, Any]:
    """Return the settings that the outcome of a training run depends on."""
    return {name: value for name, value in asdict(training).items() if name != "save_every"}

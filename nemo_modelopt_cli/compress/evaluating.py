"""The job step that scores models on tasks of lm-eval: what it runs, and what must be there before the job starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from nemo_modelopt_cli.compress import fit_plan
from nemo_modelopt_cli.compress.digests import Digests
from nemo_modelopt_cli.compress.settings import Job
from nemo_modelopt_cli.compress.stages import StageError, write_json
from nemo_modelopt_cli.evaluation import check, scoring, tasks
from nemo_modelopt_cli.evaluation.harness_settings import EXPORTED
from nemo_modelopt_dropin import ranks
from nemo_modelopt_dropin.preflight import algorithms, readers

# Names of the models in the report.
LABELS = {EXPORTED: "hf files"}


def settings(job: Job, digests: Digests) -> dict[str, Any]:
    """Return the settings on which the scores depend, with the digests of local task files and of their data."""
    own = job.evaluation
    found = {name: getattr(own, name) for name in ("limit", "fewshot", "backend", "chat_template", "model_args")}
    found |= {"tasks": ", ".join(own.names), "models": own.ordered, "cpu": job.layout.cpu}
    for name in own.names:
        if tasks.is_path(name):
            found |= {str(path): digests.file(path) for path in tasks.inputs(name)}
    return found


def ready(job: Job) -> None:
    """Raise an error if lm-eval could not run the tasks at the end of the job.

    Raises:
        ModelOptConfigError: naming what is missing or unknown, and what to do.
    """
    own, compressed = job.evaluation, False
    if EXPORTED in own.models:
        hf_format = algorithms.hf_format_of(job.quantization.algorithm)
        layout = None if hf_format is None else algorithms.layout_of(hf_format, job.quantization.hf_layout)
        compressed = layout == readers.COMPRESSED_TENSORS
    check.check(own.names, own, compressed)


def evaluate(folder: Path, job: Job, root: Path) -> dict[str, Any]:
    """Score the models one after the other; those that an interrupted attempt scored are kept.

    The models that NeMo saved are first written as Hugging Face files, by all ranks, and removed once they are scored.

    Args:
        folder: the step's folder.
        job: the settings.
        root: the run's folder, with the results of the steps before.
    """
    own = job.evaluation
    sources = {"teacher": Path(job.teacher)}
    sources |= {"pruned": fit_plan.made(root, job, ("prune",))}
    sources |= {"distilled": fit_plan.made(root, job, ("prune", "distill"))}
    # First all conversions: the other ranks take part in these only, and must not wait for lm-eval in one.
    for name in own.ordered:
        if name in sources and not (folder / f"{name}.json").exists() and not _files(folder, name).exists():
            _to_hugging_face(sources[name], _files(folder, name), job)
    if ranks.number() != 0:
        return {}
    found, packages = [], dict[str, str]()
    for name in own.ordered:
        kept = folder / f"{name}.json"
        if not kept.exists():
            source = root / "export" / "hf" if name == EXPORTED else _files(folder, name)
            devices = 1 if job.layout.cpu else job.layout.devices
            try:
                write_json(kept, scoring.score(source, own.names, own, LABELS.get(name, name), job.layout.cpu, devices))
            except scoring.ScoringError as error:
                raise StageError(str(error)) from None
        answer = json.loads(kept.read_text(encoding="utf-8"))
        found.append({"model": LABELS.get(name, name), **scoring.summary(answer)})
        packages |= answer["packages"]
        if _files(folder, name).exists():
            shutil.rmtree(_files(folder, name))
    shutil.rmtree(folder / "hf", ignore_errors=True)
    return {"backend": own.backend, "limit": own.limit, "packages": packages, "models": found}


def _files(folder: Path, name: str) -> Path:
    """Return the folder of a model that this step writes as Hugging Face files."""
    return folder / "hf" / name


def _to_hugging_face(checkpoint: Path, target: Path, job: Job) -> None:
    """Write a NeMo checkpoint that is not quantized as Hugging Face files, in bf16; all ranks call this."""
    from nemo.collections import llm
    from nemo.collections.llm.modelopt import ExportConfig, QuantizationConfig
    from nemo_modelopt_cli.compress import training
    from nemo_modelopt_dropin.preflight import model_sizes

    layout = job.layout
    training.release()
    llm.ptq(
        model_path=str(checkpoint),
        export_config=ExportConfig(path=str(target), export_format="hf", dtype="bf16"),
        quantization_config=QuantizationConfig(algorithm=None),
        calibration_tp=layout.tp,
        calibration_pp=layout.pp,
        **model_sizes.unequal_stages(checkpoint, layout.pp),
        devices=layout.devices,
        num_nodes=layout.num_nodes,
    )
    training.release()

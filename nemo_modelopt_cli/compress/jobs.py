"""The work of each step of the compression job, over NeMo's API, and the figures that it reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from nemo.lightning.ckpt_utils import ckpt_to_context_subdir

from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.llm.modelopt import ExportConfig, ModelOptConfigError, PruningConfig, QuantizationConfig
from nemo.collections.llm.modelopt.quantization import comparison
from nemo_modelopt_cli import intermediate, run_script, tokens
from nemo_modelopt_cli.compress import expert_scales, exported, fit_plan, fit_search, heldout, quantizing, training
from nemo_modelopt_cli.compress.settings import TARGETS, Job, Layout, Training
from nemo_modelopt_cli.compress.stages import SKIPPED, read_record
from nemo_modelopt_dropin import files, ranks
from nemo_modelopt_dropin.console import screen
from nemo_modelopt_dropin.preflight import algorithms, model_sizes, pair_checks, prune_layout
from nemo_modelopt_dropin.report import importance

_CHECKPOINT = "checkpoint"
_SCORES, _REPORT = "scores", "report"


def measure(checkpoint: Path, token_folder: Path, job: Job) -> dict[str, Any]:
    """Return held-out loss, speed, parameters, shape and size of a checkpoint under the job's layout."""
    return heldout.measure(
        checkpoint, token_folder / "heldout.npy", job.layout, job.seq_length, job.distillation.micro_batch_size
    )


def tokenize(folder: Path, job: Job) -> dict[str, Any]:
    """Encode both texts with the teacher's tokenizer into ``train.npy`` and ``heldout.npy``."""
    counts: dict[str, Any] = {}
    if ranks.number() == 0:
        tokenizer = tokens.checkpoint_tokenizer(job.teacher)
        for name, path in (("train", job.train_text), ("heldout", job.heldout_text)):
            ids = tokens.encode(path, tokenizer)
            if len(ids) <= job.seq_length + 1:
                raise ModelOptConfigError(
                    f"{path} has {len(ids)} tokens; at least {job.seq_length + 2} are needed for samples of "
                    f"{job.seq_length}: use more text, or a smaller --seq-length"
                )
            np.save(folder / f"{name}.npy", ids)
            counts[f"{name}_tokens"] = len(ids)
            counts[f"{name}_documents"] = sum(1 for _ in tokens.read_documents(path))
    return counts


def search(folder: Path, job: Job, token_folder: Path, root: Path) -> dict[str, Any]:
    """Choose sizes and formats under the job's budgets, and write the plan."""
    return fit_search.run(folder, job, token_folder, root)


def skipped(root: Path, step: str) -> dict[str, Any]:
    """Return the result of a step that has nothing to do: that of the step before."""
    record = read_record(root / step)
    return {**(record.result if record is not None else {}), SKIPPED: True}


def prune(folder: Path, job: Job, token_folder: Path, root: Path | None = None) -> dict[str, Any]:
    """Prune the teacher with llm.prune; ranks that would be data parallel become pipeline stages.

    Importance is measured on whole layers and llm.prune runs one micro-batch at a time, so tensor- and data-parallel
    ranks would have no work. Scores of a search are used.
    """
    if root is not None and not fit_plan.prunes(job):
        return skipped(root, "teacher")
    settings, layout = job.pruning, job.layout
    searched = root / fit_plan.STAGE / fit_search.SCORES if root is not None else None
    scores = searched if searched is not None and searched.exists() else folder / _SCORES
    world = layout.devices * layout.num_nodes
    stages = world // layout.tp
    shared: dict[str, Any] = {"tp_size": layout.tp, "pp_size": stages}
    shared |= model_sizes.unequal_stages(job.teacher, stages) if settings.drop_layers else {}
    if not settings.drop_layers:
        shared = prune_layout.for_importance(job.teacher, world)
    prune_layout.announce(layout.tp, shared)
    config = PruningConfig(
        **{name: getattr(settings, name) for name in TARGETS},
        drop_layers=list(settings.drop_layers) if settings.drop_layers else None,
        **{name: getattr(settings, name) for name in ("target_params", "max_candidates", "heldout_batches")},
        size_multiples=job.size_multiples() or None,
        scores_path=None if settings.drop_layers else str(scores),
        report_path=str(folder / _REPORT),
    )
    batch, samples = settings.micro_batch_size, settings.num_samples
    data = None
    if not settings.drop_layers:
        tokenizer = tokens.checkpoint_tokenizer(job.teacher)
        data = tokens.TokenDataModule(token_folder, tokenizer, job.seq_length, batch, batch, samples)
    training.release()
    with run_script.standing_in(folder):  # the measurement of importance may write logs to the current folder
        llm.prune(
            nemo_checkpoint=job.teacher,
            save_path=str(folder / _CHECKPOINT),
            pruning_config=config,
            devices=layout.devices,
            num_nodes=layout.num_nodes,
            **shared,
            num_train_samples=samples,
            data=data,
        )
    return measure(folder / _CHECKPOINT, token_folder, job) | {"importance": importance.read(folder / _REPORT)}


def check_blocks(student: Path, job: Job) -> None:
    """Raise an error before a step if the student's sizes are not multiples of the weight blocks that the export needs.

    Raises:
        ModelOptConfigError: naming sizes, blocks and options.
    """
    found = job.block_problems(model_sizes.known(student))
    if found:
        raise ModelOptConfigError(f"{student}: {'; '.join(found)}.")


def fit_trainer(
    folder: Path, title: str, settings: Training, layout: Layout, out: TextIO | None, student: Path | None = None
) -> nl.Trainer:
    """Return the trainer of a training run, with checkpoints, a curve, and held-out losses if they are enabled.

    Args:
        folder: folder of the step.
        title: title of the progress bar.
        settings: settings of the training.
        layout: ranks and parallel sizes.
        out: stream for the progress bar.
        student: checkpoint of the model, to split layers unequally if the pipeline stages do not divide them.
    """
    options: dict[str, Any] = {"max_steps": settings.steps, "enable_checkpointing": True}
    if settings.evaluate_every:
        options |= {"val_check_interval": settings.evaluate_every, "limit_val_batches": 1.0}
    curve = training.Curve(folder, title)
    curve.out = out
    unequal = model_sizes.unequal_stages(student, layout.pp) if student else {}
    return training.trainer(layout, unequal, callbacks=[training.Keeper(folder, settings.save_every), curve], **options)


def fit_data(token_folder: Path, tokenizer, settings: Training, seq_length: int) -> tokens.TokenDataModule:
    """Return the data of a training run: enough windows for all steps."""
    return tokens.TokenDataModule(
        token_folder,
        tokenizer,
        seq_length,
        settings.micro_batch_size,
        settings.global_batch_size,
        settings.steps * settings.global_batch_size,
        settings.seed,
    )


def resume(run: nl.Trainer, start_from: str | None = None) -> nl.AutoResume:
    """Resume from the newest intermediate checkpoint of the trainer's `Keeper`, else start from other weights."""
    latest = next(c for c in run.callbacks if isinstance(c, training.Keeper)).latest()
    # The tokenizer is the student's anyway, and AutoResume does not find the artifacts of an explicit path.
    restore = nl.RestoreConfig(path=start_from, load_artifacts=False) if start_from else None
    return nl.AutoResume(resume_from_path=str(latest) if latest else None, restore_config=restore)


def logger(folder: Path) -> nl.NeMoLogger:
    """Return a NeMo logger that writes its files below the step's folder."""
    return nl.NeMoLogger(name="log", log_dir=str(folder), use_datetime_version=False, log_global_rank_0_only=True)


def distill(
    folder: Path, job: Job, student: Path, token_folder: Path, out: TextIO | None, root: Path | None = None
) -> dict[str, Any]:
    """Train the pruned student on the teacher's logits with llm.distill; a complete training is not repeated."""
    if root is not None and student == Path(job.teacher):
        return {**skipped(root, "prune"), "curve": []}
    if not (folder / _CHECKPOINT).exists():
        _train_student(folder, job, student, token_folder, out)
    intermediate.Steps(folder / training.STEPS).remove()  # a kill may have left them next to the complete checkpoint
    found = measure(folder / _CHECKPOINT, token_folder, job)
    return found | {"curve": training.read_curve(folder / "losses.jsonl")}


def _train_student(folder: Path, job: Job, student: Path, token_folder: Path, out: TextIO | None) -> None:
    settings = job.distillation
    check_blocks(student, job)
    training.release()
    if warning := pair_checks.larger_student(str(student), job.teacher):
        screen.warn(warning)
    torch.manual_seed(settings.seed)
    run = fit_trainer(folder, "distill", settings, job.layout, out, student)
    llm.distill(
        student_model_path=str(student),
        teacher_model_path=str(job.teacher),
        data=fit_data(token_folder, tokens.checkpoint_tokenizer(job.teacher), settings, job.seq_length),
        trainer=run,
        distillation_config_path=job.distill_config,
        log=logger(folder),
        resume=resume(run, str(student)),
        optim=training.optimizer(settings, job.layout),
    )


def from_scratch(folder: Path, job: Job, student: Path, token_folder: Path, out: TextIO | None) -> dict[str, Any]:
    """Train a model of the student's shape from random weights with the same steps and samples, without a teacher."""
    if not (folder / _CHECKPOINT).exists():
        _train_from_scratch(folder, job, student, token_folder, out)
    intermediate.Steps(folder / training.STEPS).remove()
    found = measure(folder / _CHECKPOINT, token_folder, job)
    return found | {"curve": training.read_curve(folder / "losses.jsonl")}


def _train_from_scratch(folder: Path, job: Job, student: Path, token_folder: Path, out: TextIO | None) -> None:
    settings = job.distillation
    training.release()
    torch.manual_seed(settings.seed)
    model = nl.io.load_context(ckpt_to_context_subdir(student), subpath="model")
    run = fit_trainer(folder, "from scratch", settings, job.layout, out, student)
    llm.train(
        model=model,
        data=fit_data(token_folder, model.tokenizer, settings, job.seq_length),
        trainer=run,
        log=logger(folder),
        resume=resume(run),
        optim=training.optimizer(settings, job.layout),
    )


def _layout_for_readers(settings: Any, student: Path) -> str:
    """Return the layout for whose readers the NeMo checkpoint is calibrated, ``auto`` if they need nothing else.

    They need other scales of inputs for AWQ and SmoothQuant, and for experts.
    """
    return settings.layout_of_scales or expert_scales.layout(settings, student) or algorithms.AUTO


def quantize(folder: Path, job: Job, student: Path, token_folder: Path, root: Path | None = None) -> dict[str, Any]:
    """Quantize the student with llm.ptq, calibrated on the training text, into a NeMo checkpoint."""
    settings, layout = job.quantization, job.layout
    if root is not None and quantizing.is_plain(settings):
        return skipped(root, "distill")
    check_blocks(student, job)
    training.release()
    llm.ptq(
        model_path=str(student),
        export_config=ExportConfig(
            path=str(folder / _CHECKPOINT),
            export_format="nemo",
            dtype="bf16",
            hf_layout=_layout_for_readers(settings, student),
            report_path=str(folder / _REPORT),
        ),
        calibration_tp=layout.tp,
        calibration_pp=layout.pp,
        **model_sizes.unequal_stages(student, layout.pp),
        devices=layout.devices,
        num_nodes=layout.num_nodes,
        quantization_config=quantizing.config_of(settings, job.train_text, folder),
    )
    return {**measure(folder / _CHECKPOINT, token_folder, job), **_compared(folder / _REPORT)}


def _compared(folder: Path) -> dict[str, Any]:
    """Return how the quantized model differs from the one before, from the report of the quantization, if it says so.

    Only rank zero can be sure to see the report, and keeps the result.
    """
    path = folder / "report.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: report[name] for name in ("kl_to_original", "evaluation_tokens") if name in report}


def export(folder: Path, job: Job, quantized: Path, token_folder: Path, root: Path) -> dict[str, Any]:
    """Write the quantized model in the other formats, and measure the held-out loss of Hugging Face files.

    Only rank zero exports, because NeMo's exporters load the whole model in one process; the others wait.

    Args:
        folder: the step's folder.
        job: the settings.
        quantized: the quantized NeMo checkpoint.
        token_folder: folder of the held-out tokens.
        root: the run's folder, with the records of the steps before.
    """
    training.release()
    result: dict[str, Any] = {}
    if ranks.number() != 0:
        return result
    for target in job.quantization.formats:
        path = quantized if target == "nemo" else folder / target
        if target != "nemo":
            with files.written(path, files.checkpoint(target)) as beside, training.alone():
                _write(quantized, target, beside, job)
                if target == "hf":
                    exported.describe(beside, job, root)
        result[target] = {"path": str(path), "bytes": comparison.bytes_on_disk(path)}
        if target == "hf":
            ids = np.load(token_folder / "heldout.npy")
            batch = job.distillation.micro_batch_size
            result[target]["heldout_loss"] = exported.heldout_loss(path, ids, job.seq_length, batch)
    return result


def _write(checkpoint: Path, target: str, path: Path, job: Job) -> None:
    """Write a checkpoint in another format, from this one process; without quantization in 16 bits."""
    names = ("verify", "hf_layout", "max_shard_size")
    options = {name: getattr(job.quantization, name) for name in names}
    if quantizing.is_plain(job.quantization):
        config = ExportConfig(path=str(path), export_format=target, dtype="bf16", **options)
        llm.ptq(str(checkpoint), config, devices=1, quantization_config=QuantizationConfig(algorithm=None))
        return
    llm.export_ckpt(path=checkpoint, target=target, output_path=path, overwrite=True, modelopt_export_kwargs=options)

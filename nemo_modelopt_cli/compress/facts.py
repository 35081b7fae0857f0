"""Describe the finished steps of a compression job in words, for the report and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemo_modelopt_cli.compress.settings import Job
from nemo_modelopt_cli.compress.stages import Record

# Steps that measure a held-out loss, in the order of the job -> the name of the model in the report.
MODELS = {
    "teacher": "teacher",
    "prune": "pruned",
    "distill": "distilled",
    "scratch": "from scratch",
    "quantize": "quantized",
}


def done(records: Mapping[str, Record], job: Job) -> list[str]:
    """Return one sentence for each finished job step."""
    found = []
    shapes = {name: records[name].result.get("shape", {}) for name in ("teacher", "prune") if name in records}
    if "prune" in records:
        before, after = shapes.get("teacher", {}), shapes["prune"]
        changed = [
            f"{name.replace('_', ' ')} {before[name]} to {after[name]}"
            for name in before
            if before[name] != after.get(name)
        ]
        found.append(f"Pruned: {', '.join(changed) or 'the shape stayed'}.")
    if "distill" in records:
        training = job.distillation
        tokens = training.steps * training.global_batch_size * job.seq_length
        found.append(f"Distilled: {training.steps} steps, {tokens:,} tokens, peak learning rate {training.lr:g}.")
    if "quantize" in records:
        found.append(f"Quantized: {job.quantization.weights.name}.")
    if "export" in records:
        found.append(f"Exported: {', '.join(job.quantization.formats)}.")
    if "evaluate" in records:
        names = [Path(name).name for name in job.evaluation.names]
        found.append(f"Scored with lm-eval: {', '.join(names)}.")
    return found

"""Jobs of the tests that compress to a budget, run on live ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from nemo_modelopt_cli.compress import plan, stages
from nemo_modelopt_cli.compress.fit_settings import Fit
from nemo_modelopt_cli.compress.settings import Job, Layout, Pruning, Quantization, Training
from test_code.support import devices, jobs_compress, jobs_scales, ranks


def job(folder: str, fit: dict, quantization: dict | None = None, pruning: dict | None = None) -> Job:
    """Return a small job over the files of `jobs_compress.make_teacher`."""
    here = Path(folder)
    calibration = {"calibration_size": 8, "calibration_batch_size": 4, "calibration_seq_len": 32}
    return Job(
        str(here / "checkpoint"),
        str(here / "train.jsonl"),
        str(here / "heldout.jsonl"),
        seq_length=32,
        layout=Layout(cpu=not devices.machine().on_gpus),
        pruning=Pruning(num_samples=8, micro_batch_size=4, heldout_batches=2, **(pruning or {})),
        distillation=Training(steps=2, global_batch_size=4, micro_batch_size=4, warmup_steps=1),
        quantization=Quantization(formats=("hf",), awq_block_size=32, **calibration, **(quantization or {})),
        fit=Fit(**fit),
    )


def make_moe_teacher(folder: str) -> None:
    """Write a tiny Qwen3 with four experts in each layer, and the texts of `jobs_compress.make_teacher`."""
    jobs_compress.make_teacher(folder)
    shutil.rmtree(Path(folder, "checkpoint"))
    jobs_scales.make_moe(str(Path(folder, "checkpoint")))


def run(folder: str, output: str, fit: dict, quantization: dict | None = None, **more) -> dict[str, dict]:
    """Run all steps of a job below a folder; return their results by name.

    Args:
        folder: Has the teacher and the texts.
        output: The run's folder.
        fit: Settings of the search.
        quantization: Settings of the quantization.
        **more: Settings of pruning.
    """
    found = job(folder, fit, quantization, more)
    found.check()
    steps = plan.compression_stages(found, Path(output))
    records = stages.run_stages(steps, Path(output), redo=[step.name for step in steps])
    ranks.reset()
    return json.loads(json.dumps({name: record.result for name, record in records.items()}, default=str))

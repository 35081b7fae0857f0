"""Compare the memory that a dry run reports with the peak of the real run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from nemo_modelopt_cli import dry_run
from nemo_modelopt_dropin.preflight import model_sizes
from test_code.support import command_lines, jobs_prune, tiny

pytestmark = pytest.mark.cpu

# Wide enough that logits, weights and activations are each a good part of the whole.
SIZES = {"vocab_size": 4096, "hidden_size": 128, "ffn_hidden_size": 512}
BATCHES = [(2, 32), (16, 64)]  # weights outweigh what a batch needs, and the other way round
# The estimate sums up by formula what is held at the peak. It ignores short-lived copies of loading, cutting and saving
# weights, and memory that is freed early. Within 1.5 it still shows which machine is large enough.
FACTOR = 1.5
# Checksums and divergences are computed in pieces of a fixed size, which matters for a model of 8 MB only.
BUFFERS = 12e6


def _estimate(name: str, given: argparse.Namespace, script: Any) -> model_sizes.Memory:
    """Return the memory that the script's plan is made with."""
    with patch.object(dry_run, "memory", wraps=dry_run.memory) as shown:
        if name == "prune":
            dry_run.pruning(given, script.TARGETS)
        else:
            {"distill": dry_run.distillation, "ptq": dry_run.quantization}[name](given)
    return shown.call_args.args[0]


def peak_of_script(name: str, arguments: list[str]) -> dict[str, float]:
    """Do a script's work on this rank; return the bytes of tensors at the peak, and the estimate by its parts."""
    script = command_lines.script_of(name)
    given = script.resolve(arguments)
    estimate = _estimate(name, given, script)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        script.work(given)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return {"peak": peak, "estimate": estimate.total, **estimate.parts}


@pytest.fixture(scope="module")
def folder(ranks_factory, tmp_path_factory) -> Path:
    """A folder with a checkpoint and a text."""
    found = tmp_path_factory.mktemp("memory")
    (found / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in tiny.texts(100)))
    ranks_factory(1).run(jobs_prune.save_checkpoint, str(found / "model"), **SIZES)
    return found


def _commands(folder: Path, output: Path, batch: int, seq: int) -> dict[str, list[str]]:
    model, text = str(folder / "model"), str(folder / "text.jsonl")
    common = ["--cpu", "--text", text, "--seq_length", str(seq), "--mbs", str(batch)]
    prune = ["--restore_path", model, "--save_path", str(output / "pruned"), "--target_ffn_hidden_size", "256"]
    distill = ["--name", "kd", "--log_dir", str(output / "log"), "--model_path", model, "--teacher_path", model]
    ptq = ["--cpu", "-nc", model, "-out", str(output / "quantized"), "--export_format", "nemo", "--no_report"]
    return {
        "prune": [*prune, "--num_train_samples", str(2 * batch), "--no_report", *common],
        "distill": [*distill, "--max_steps", "2", "--gbs", str(batch), "--lr", "1e-4", "--precision", "32", *common],
        "ptq": [*ptq, "-calib_ds", text, "-algo", "int8", "-bs", str(batch), "-calib_size", "16", "-sl", str(seq)],
    }


@pytest.mark.parametrize(("batch", "seq"), BATCHES)
@pytest.mark.parametrize("name", ["prune", "distill", "ptq"])
def test_the_estimate_is_near_the_measured_peak(ranks, folder, tmp_path, name, batch, seq):
    found = ranks(1).run(peak_of_script, name, _commands(folder, tmp_path, batch, seq)[name])[0]
    fixed = BUFFERS if name == "ptq" else 0
    assert found["estimate"] / FACTOR <= found["peak"] <= found["estimate"] * FACTOR + fixed, found


def test_the_estimate_follows_the_batch(ranks, folder, tmp_path):
    """What a larger batch adds is seen in both, and not hidden behind the weights."""
    small, large = (
        ranks(1).run(peak_of_script, "distill", _commands(folder, tmp_path / str(i), *batch)["distill"])[0]
        for i, batch in enumerate(BATCHES)
    )
    added = large["peak"] - small["peak"]
    assert added == pytest.approx(large["estimate"] - small["estimate"], rel=0.25)

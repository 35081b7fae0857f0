"""The command ``compress``, from a teacher to the exported files, on Transformer Engine's layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_code.support import installed, tolerances
from test_code.te_on_cpu import jobs

pytestmark = pytest.mark.te

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = """--seq-length 32 --target-ffn-hidden-size 64 --target-num-layers 3 --prune-samples 8 --distill-steps 4
  --distill-global-batch-size 4 --distill-micro-batch-size 2 --distill-warmup-steps 1 --distill-evaluate-every 0
  --calibration-size 4 --calibration-batch-size 2 --calibration-seq-len 32 --formats nemo hf --no-scratch --cpu"""


@installed.prunes
def test_the_report_equals_that_of_local_layers(ranks, llama, tmp_path):
    """In a process of its own, each step loads what the one before wrote, and the files are compared with the model."""
    ranks(1).run(jobs.write_texts, str(tmp_path))
    losses = {}
    for name in jobs.SPECS:
        output = tmp_path / name
        inputs = ["--teacher", llama[0][name], "--train-text", str(tmp_path / "train.jsonl")]
        inputs += ["--heldout-text", str(tmp_path / "heldout.jsonl"), "--output", str(output)]
        command = [sys.executable, str(ROOT / "scripts" / "compress.py"), *inputs, *SETTINGS.split()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:] + (output / "log" / "rank0.txt").read_text()[-3000:]
        report = json.loads((output / "report.json").read_text())
        losses[name] = {model["name"]: model["heldout_loss"] for model in report["models"]}
        assert list((output / "export").rglob("*.safetensors"))
    assert losses["te"].keys() == losses["local"].keys() == {"teacher", "pruned", "distilled", "quantized"}
    assert losses["te"] == pytest.approx(losses["local"], rel=2 * tolerances.of(tolerances.LOSS))

"""Tests that need a GPU; deselected without one."""

from __future__ import annotations

import json
import math
import subprocess

import pytest
import torch

from nemo.collections.llm.modelopt._divergence.vocab_parallel import DIRECTIONS, kl_divergence
from nemo_modelopt_dropin import cpu_backend as backend_module
from test_code.support import devices, jobs_compress

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("direction", DIRECTIONS)
# bf16 gradients have 8 bits; fp32 sums run in another order than on the CPU.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_kl_on_cuda_equals_the_cpu(direction, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(64, 2, 32_003, generator=generator).to(dtype) for _ in range(2))
    results = {}
    for device in ("cpu", "cuda"):
        leaf = student.to(device).requires_grad_()
        loss = kl_divergence(leaf, teacher.to(device), temperature=2.0, direction=direction)
        loss.sum().backward()
        results[device] = loss.detach().cpu(), leaf.grad.float().cpu()
    torch.testing.assert_close(results["cuda"][0], results["cpu"][0], rtol=1e-4, atol=1e-5)
    scale = results["cpu"][1].abs().max()
    assert (results["cuda"][1] - results["cpu"][1]).abs().max() <= tolerance * scale


def test_the_cpu_backend_refuses_a_real_gpu():
    with pytest.raises(backend_module.CpuBackendError, match="machine with CUDA"):
        backend_module.enable()


SETTINGS = """--seq-length 32 --target-ffn-hidden-size 64 --target-num-layers 3 --prune-samples 8 --distill-steps 4
  --distill-global-batch-size 4 --distill-micro-batch-size 2 --distill-warmup-steps 1 --distill-evaluate-every 0
  --calibration-size 4 --calibration-batch-size 2 --calibration-seq-len 32 --formats nemo hf --no-scratch"""


@pytest.mark.parametrize(("count", "layout"), [(1, []), (2, ["--tp", "2"]), (2, ["--pp", "2"])])
def test_compress_from_a_teacher_to_its_export(ranks, tmp_path, count, layout):
    """As users start it: one process for each GPU, in bf16, with NeMo's own layers."""
    command = devices.command("compress", [*SETTINGS.split(), *layout], count)
    ranks(1).run(jobs_compress.make_teacher, str(tmp_path), llama=True)
    command += ["--teacher", str(tmp_path / "checkpoint"), "--train-text", str(tmp_path / "train.jsonl")]
    command += ["--heldout-text", str(tmp_path / "heldout.jsonl"), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-6000:]
    models = {model["name"]: model for model in json.loads((tmp_path / "out" / "report.json").read_text())["models"]}
    assert models.keys() == {"teacher", "pruned", "distilled", "quantized"}
    assert all(math.isfinite(model["heldout_loss"]) for model in models.values())
    assert models["distilled"]["heldout_loss"] != models["pruned"]["heldout_loss"]
    assert list((tmp_path / "out" / "export").rglob("*.safetensors"))

"""Tests that need a GPU; deselected by default (run with ``-m gpu``)."""

from __future__ import annotations

import pytest
import torch

from nemo.collections.llm.modelopt._divergence.vocab_parallel import DIRECTIONS, kl_divergence
from nemo_modelopt_dropin import cpu_backend as backend_module

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

"""The numbers hold on other processors: older instructions, other threads, and sums in another order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from test_code.support import other_sums

pytestmark = pytest.mark.cpu

FOLDER = Path(__file__).resolve().parents[1]
# Files that compare numbers of a model; the others do not depend on how products are rounded.
FILES = [
    "quantization/test_auto.py",
    "quantization/test_calibration.py",
    "test_checkpoints.py",
    "distill/test_distill_kinds.py",
    "distill/test_distill_loss.py",
    "distill/test_distill_model.py",
    "distill/test_distill_state.py",
    "test_distillation_utils.py",
    "quantization/test_export.py",
    "quantization/test_export_checks.py",
    "quantization/test_hf_check.py",
    "quantization/test_hf_codes.py",
    "quantization/test_hf_kv_cache.py",
    "quantization/test_hf_scales.py",
    "quantization/test_input_scales.py",
    "end_to_end/test_functional.py",
    "distill/test_fused_logits.py",
    "prune/test_hybrid.py",
    "test_parity.py",
    "prune/test_prune_after.py",
    "prune/test_prune_budget.py",
    "test_pruner.py",
    "quantization/test_qat.py",
    "test_quantizer.py",
    "distill/test_recorded_teacher.py",
    "quantization/test_state.py",
    "test_teacher_provider.py",
]
# What the libraries of this processor's products read; they choose AVX2 or older code then.
OLDER = {
    "DNNL_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "2",
    other_sums.VARIABLE: "1",
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_numbers_hold_with_other_instructions_and_other_sums():
    tests = [str(FOLDER / name) for name in FILES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=0", *tests],
        env={**os.environ, **OLDER},
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


SNIPPET = """
import torch
from test_code.support import other_sums

left, right = torch.randn(3, 2, 5), torch.randn(3, 5, 7)
products = [
    lambda: torch.bmm(left, right),
    lambda: left[0] @ right[0],
    lambda: torch.nn.functional.linear(left, right[0].t(), torch.ones(7)),
    lambda: torch.baddbmm(torch.ones(3, 2, 7), left, right, beta=0.5),
]
before = [product() for product in products]
other_sums.enable_if_asked()
for product, old in zip(products, before, strict=True):
    new = product()
    assert torch.equal(new, product())
    assert 0 < float((new - old).abs().max()) < 2e-6 * float(old.abs().max()), (new - old).abs().max()
    other_sums.assert_equal_but_for_sums(new, old)
"""


def test_products_move_by_a_rounding_error_and_always_by_the_same():
    run = [sys.executable, "-c", SNIPPET]
    done = subprocess.run(run, env={**os.environ, other_sums.VARIABLE: "1"}, cwd=FOLDER.parent, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_a_lost_scale_is_no_rounding_error():
    expected = torch.randn(4, 8)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        other_sums.assert_equal_but_for_sums(expected * 1.01, expected)

"""Quantization of whole models on a fake GPU: quantizers, calibration, comparison, errors of layers."""

from __future__ import annotations

import pytest

from nemo_modelopt_dropin.preflight import algorithms
from test_code.fake_gpu import jobs_quantize as jobs
from test_code.support import installed

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not installed.KV_CACHE, reason="modelopt 0.37 reads other numbers"),
]

# The functions of this package that read something, each once for a model and not for a layer or a batch.
READS = {
    "any_rank",  # patterns that match nothing, after the first run of the data
    "evaluate",
    "gather_objects",
    "model_parallel_sum",  # numbers of quantizers
    "table",
}
# AWQ's search runs eleven scales for each layer.
_SEARCHES = ("int4_awq", "w4a8_awq", "nvfp4_awq")
# GPTQ looks for columns of zeros, which takes numbers: tensors of a fake GPU have none.
_ALGORITHMS = [
    pytest.param(name, marks=pytest.mark.slow) if name in _SEARCHES else name
    for name in algorithms.TABLE
    if algorithms.version_problem(name) is None and name != "gptq"
]
LAYERS = 2 * 4  # 4 linear layers in each of 2


@pytest.mark.parametrize("algorithm", _ALGORITHMS)
def test_every_algorithm(gpu, algorithm):
    found = gpu(jobs.quantize, algorithm, 2)
    assert found.quantizers >= LAYERS
    assert set(found.waits) <= READS and len(found.waits) <= 12
    assert found.forward == 0


@pytest.mark.parametrize("stage", [0, 1])
def test_a_pipeline_stage(gpu, stage):
    found = gpu(jobs.quantize, "fp8", 2, 2, stage)
    assert found.quantizers == LAYERS  # of inputs and weights in half of the layers
    assert set(found.waits) <= READS


def test_a_quantized_cache(gpu):
    found = gpu(jobs.quantize, "fp8", 2, enable_kv_cache=True)
    assert found.quantizers == 2 * LAYERS + 2 * 2
    assert found.forward == 0


@pytest.mark.parametrize(
    ("layout", "algorithm"),
    [
        *(("modelopt", name) for name in ("fp8", "int8", "block_fp8", "int4", "nvfp4", "mxfp8")),
        *(("compressed_tensors", name) for name in ("fp8_pc_pt", "fp8_wo", "int8_wo", "nvfp4", "w4a16_nvfp4")),
    ],
)
def test_export(gpu, tmp_path, layout, algorithm):
    """Codes and scales are computed on the device; AWQ and SmoothQuant also exchange weights, which torch cannot."""
    files, tensors = gpu(jobs.export, algorithm, layout, str(tmp_path))
    assert "model.safetensors" in files and "config.json" in files
    for layer in range(2):
        for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            found = [tensor for tensor in tensors if tensor.startswith(f"model.layers.{layer}.{name}.weight")]
            assert len(found) >= 2  # codes and scale


@pytest.mark.parametrize(("tp", "pp", "stage"), [(1, 1, 0), (2, 1, 0), (2, 2, 0), (2, 2, 1)])
def test_logits_that_verify_an_export(gpu, tp, pp, stage):
    """Two forward passes: each copies the tokens to the device and the logits back, and no part of them twice."""
    assert gpu(jobs.logits_in_memory, tp, pp, stage) == ["_logits"] * 4

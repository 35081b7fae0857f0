"""The formulas of serving memory against what vLLM keeps and allocates."""

from __future__ import annotations

import json

import pytest

from nemo_modelopt_dropin.fit import serving
from nemo_modelopt_dropin.fit.formats import Format
from nemo_modelopt_dropin.fit.serving import Load
from nemo_modelopt_dropin.preflight import model_sizes
from test_code.serving import cells, client
from test_code.support import jobs_serving

pytestmark = pytest.mark.serving

# 12 million parameters: scales and buffers are small compared with them.
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def checkpoint(ranks_factory, work):
    (work / "memory").mkdir()
    return ranks_factory(1).run(jobs_serving.make, "llama", str(work / "memory"), **SIZES)[0][0]


# vLLM has kernels for these on every CPU; other weights are decoded to 16 or 32 bits for each product.
ON_EVERY_CPU = ("no_quant", "int8")
CASES = [
    ("no_quant", "", False),
    ("fp8", cells.MODELOPT, False),
    ("fp8", cells.MODELOPT, True),
    ("mxfp8", cells.MODELOPT, False),
    ("int8", cells.COMPRESSED, False),
    ("int8_wo", cells.COMPRESSED, False),
    ("int4_awq", cells.COMPRESSED, False),
]


@pytest.mark.parametrize(("algorithm", "layout", "cache"), CASES)
def test_memory_is_what_vllm_keeps_and_allocates(engine, checkpoint, ranks_factory, work, algorithm, layout, cache):
    folder = work / "memory" / (f"{algorithm}-{cache}" if layout else "original")
    if layout:
        settings = {"quant": {"enable_kv_cache": cache}, "export": {"hf_layout": layout}, "draws": 0}
        ranks_factory(1).run(jobs_serving.export, checkpoint, str(folder), algorithm, **settings)
    measured = engine.serve(folder, memory=True)["memory"]
    shape = model_sizes._from_hugging_face(json.loads((folder / "config.json").read_text()))
    length = jobs_serving.prompts().shape[1]
    found = serving.memory(shape, Format(algorithm, algorithm, cache), Load(length, client.TOGETHER)).parts
    # vLLM merges the scales of q, k and v, and of gate and up; some are loaded as the shapes of tensors.
    assert found["weights"] == pytest.approx(measured["parameters"], rel=1e-4)
    positions = Load(context=measured["positions"])
    assert serving.cache_bytes(shape, positions, cache) == measured["cache"]
    if algorithm in ON_EVERY_CPU:
        # vLLM keeps one more of a layer's hidden states than the formula counts.
        assert measured["peak"] == pytest.approx(found["activations"] + found["logits"], rel=0.1)
    # What the formula leaves out: the table of the rotary positions.
    assert measured["buffers"] < 0.01 * measured["parameters"]

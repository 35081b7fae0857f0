"""transformers with the library compressed-tensors loads and runs every folder in that layout."""

from __future__ import annotations

import pytest
import torch

from test_code.serving import cells, client
from test_code.support import installed, jobs_serving

FAMILIES = ("llama", "qwen2-tied", "mixtral")
# It also rounds the inputs of FP8 by block. They have as many bits as the weights, whose rounding changes as much.
ROUNDS_INPUTS_TOO = ("block_fp8",)
# The library decodes these to bf16, whatever the dtype of the model is.
IN_BF16 = ("mxfp8", "nvfp4", "w4a16_nvfp4")
PAIRS = [
    (family, cell)
    for cell in cells.VLLM
    if cell.layout == cells.COMPRESSED
    for family in FAMILIES
    if family in cell.families
]


@installed.since_0_43
def test_transformers_reads_the_scales_of_the_kv_cache(ranks, exported):
    folder, memory = exported("llama", "fp8", cells.COMPRESSED, quant={"enable_kv_cache": True})
    (found,) = ranks(1).run(jobs_serving.transformers_logits, str(folder))
    assert jobs_serving.divergence(memory.logprobs, found) <= client.bound(memory.noise)


@pytest.mark.parametrize(("family", "cell"), PAIRS, ids=[f"{family}-{cell.algorithm}" for family, cell in PAIRS])
def test_transformers_computes_what_is_in_memory(ranks, made, exported, family, cell):
    _, _, original = made(family)
    folder, memory = exported(family, cell.algorithm, cell.layout)
    dtype = torch.bfloat16 if cell.algorithm in IN_BF16 else torch.float32
    (found,) = ranks(1).run(jobs_serving.transformers_logits, str(folder), dtype)
    allowed = client.bound(memory.noise)
    if cell.algorithm in ROUNDS_INPUTS_TOO:
        allowed += jobs_serving.divergence(memory.logprobs, original)
    assert jobs_serving.divergence(memory.logprobs, found) <= allowed

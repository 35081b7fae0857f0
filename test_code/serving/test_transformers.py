"""transformers with the library compressed-tensors loads and runs every folder in that layout."""

from __future__ import annotations

import pytest
import torch

from test_code.serving import cells, client
from test_code.support import jobs_serving

FAMILIES = ("llama", "qwen2-tied", "mixtral")
# Part of what quantization changes that transformers may differ by: it also rounds the inputs of FP8 by block, and the
# scales of INT8 weights, which are stored in bf16, change as much as the codes do. MXFP8 is computed in bf16, which
# changes the choice of experts.
SHARES = {"block_fp8": 1.0, "int8_wo": 1.0, "mxfp8": 1.0}
# The library decodes these to bf16, whatever the dtype of the model is.
IN_BF16 = ("mxfp8", "nvfp4", "w4a16_nvfp4")
PAIRS = [
    (family, cell)
    for cell in cells.VLLM
    if cell.layout == cells.COMPRESSED
    for family in FAMILIES
    if family in cell.families
]


@pytest.mark.parametrize(("family", "cell"), PAIRS, ids=[f"{family}-{cell.algorithm}" for family, cell in PAIRS])
def test_transformers_computes_what_is_in_memory(ranks, made, exported, family, cell):
    _, _, original = made(family)
    folder, expected = exported(family, cell.algorithm, cell.layout)
    dtype = torch.bfloat16 if cell.algorithm in IN_BF16 else torch.float32
    (found,) = ranks(1).run(jobs_serving.transformers_logits, str(folder), dtype)
    changed = client.divergence(expected, original)
    # The decoded weights, and norms with factors of inputs, are rounded to bf16.
    assert client.divergence(expected, found) <= client.bound(0.0, changed, SHARES.get(cell.algorithm, cell.allowed))

"""transformers with the library compressed-tensors loads and runs every folder in that layout."""

from __future__ import annotations

import pytest

from test_code.serving import cells, client
from test_code.support import jobs_serving

FAMILIES = ("llama", "qwen2-tied", "mixtral")
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
    (found,) = ranks(1).run(jobs_serving.transformers_logits, str(folder))
    changed = client.divergence(expected, original)
    # Both compute in fp32; only the decoded weights, and norms with factors of inputs, are rounded to bf16.
    assert client.divergence(expected, found) <= client.bound(0.0, changed, cell.allowed)

"""Experts and multi-latent attention on Transformer Engine's layers, in models of families that NeMo imports."""

from __future__ import annotations

import pytest

from test_code.families import jobs as families
from test_code.support import installed, tolerances
from test_code.te_on_cpu import jobs

pytestmark = pytest.mark.te

# Both models compute in fp32, with sums in another order (`test_code/families/test_imports.py`).
TOLERANCE = 2e-6
LOSS = 2 * tolerances.of(tolerances.LOSS)
LAYERS = {
    "gemma": {"TELayerNormColumnParallelLinear", "TERowParallelLinear"},
    "llama-3.2": {"TELayerNormColumnParallelLinear", "TERowParallelLinear"},
    "mixtral": {"SequentialMLP", "TEColumnParallelLinear", "TERowParallelLinear"},
    "qwen3-moe": {"TEGroupedMLP", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"},
    "deepseek-3": {"MLASelfAttention", "TEColumnParallelLinear", "TELinear", "TEGroupedMLP"},
}


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=pytest.mark.main) if n == "qwen3-moe" else n for n in LAYERS]
)
def family(request, ranks_factory, tmp_path_factory):
    """Return a family's name, its folder with the imported checkpoint, and the classes of the imported model."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, ranks_factory(1).run(jobs.import_family, request.param, str(folder))[0]


def test_logits_equal_those_of_transformers(family):
    """In the layers that NeMo chooses, and in those of Model Optimizer's spec, in which models are quantized."""
    name, _, found = family
    assert LAYERS[name] <= found["layers"]
    assert found["own"] < TOLERANCE and found["modelopt"] < TOLERANCE


def test_experts_on_two_ranks_train_as_on_one(ranks, family):
    """With expert parallelism: each rank has half of the experts, and they exchange tokens."""
    name, folder, found = family
    if "TEGroupedMLP" not in found["layers"]:
        pytest.skip("no grouped experts")
    layout = {"strategy_kwargs": {"expert_model_parallel_size": 2}}
    one = ranks(1).run(jobs.train_again, str(folder / "nemo"))[0]
    assert ranks(2).run(jobs.train_again, str(folder / "nemo"), layout=layout)[0] == pytest.approx(one, rel=LOSS)
    assert ranks(2).run(families.compare_layout, str(folder / "nemo"), str(folder), ep=2)[0] < TOLERANCE


@installed.drops
def test_a_pruned_model_trains_in_its_own_layers(ranks, family):
    """Layers with experts or latent attention save more without extra state in Model Optimizer's spec."""
    name, folder, _ = family
    target = folder / "pruned"
    ranks(1).run(families.prune, str(folder / "nemo"), str(target), {"drop_layers": [2]})
    assert ranks(1).run(jobs.keys_that_are_missing, str(target))[0] == []
    assert len(ranks(1).run(jobs.train_again, str(target))[0]) == 3


def test_a_quantized_model_restores_with_its_scales(ranks, family):
    name, folder, _ = family
    found = ranks(1).run(families.quantize, str(folder / "nemo"), str(folder), "fp8")[0]
    # FP8 has a relative step of 1/16; random weights are sensitive, and no result would differ by 1 or more.
    assert 0 < found["difference"] < 0.5

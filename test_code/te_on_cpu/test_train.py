"""Training and checkpoints on Transformer Engine's layers, against Megatron's local layers with the same weights."""

from __future__ import annotations

import pytest

from test_code.support import tolerances
from test_code.te_on_cpu import jobs

pytestmark = pytest.mark.te

# Both compute in fp32; they differ by the order of sums, which three steps of Adam with a rate of 1e-3 enlarge.
LOSS, WEIGHT = tolerances.of(tolerances.LOSS), tolerances.of(tolerances.WEIGHT)


@pytest.mark.main
def test_layers_are_those_of_transformer_engine(llama):
    made = {name: layers for name, (_, layers) in llama[1].items()}
    own = {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"}
    assert own <= made["te"] and not own & made["local"]


@pytest.mark.main
@pytest.mark.parametrize("written", jobs.SPECS)
def test_training_equals_that_of_local_layers(ranks, llama, written):
    """A checkpoint of either spec trains in both: losses and weights are the same."""
    trained = {name: ranks(1).run(jobs.train_from, llama[0][written], name)[0] for name in jobs.SPECS}
    assert trained["te"][0] == pytest.approx(trained["local"][0], rel=LOSS)
    local, te = trained["local"][1], trained["te"][1]
    assert te.keys() == local.keys()
    for name, weight in local.items():
        assert (te[name] - weight).abs().max() < WEIGHT, name


def test_training_in_bf16_equals_that_of_local_layers(ranks, llama):
    found = {name: ranks(1).run(jobs.train_in_bf16, llama[0][name], name)[0] for name in jobs.SPECS}
    assert found["te"] == pytest.approx(found["local"], rel=tolerances.of(tolerances.LOSS, tolerances.BF16))

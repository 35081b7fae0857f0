"""Transformer Engine's layers over tensor-parallel ranks, sequence parallelism and pipeline stages."""

from __future__ import annotations

import pytest

from test_code.support import installed, jobs_prune, jobs_quant, tolerances
from test_code.te_on_cpu import jobs

pytestmark = pytest.mark.te

LAYOUTS = {"TP=2": {"tp": 2}, "TP=2 SP": {"tp": 2, "sp": True}, "PP=2": {"pp": 2}}
# Sums over ranks are added in another order, too.
LOSS = 2 * tolerances.of(tolerances.LOSS)
AMAX = tolerances.of(tolerances.AMAX)


@pytest.fixture(scope="module")
def on_one_rank(ranks_factory, llama):
    """Return the losses of local layers on one rank."""
    return ranks_factory(1).run(jobs.train_from, llama[0]["local"], "local")[0][0]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.main) if name == "TP=2 SP" else name for name in LAYOUTS]
)
def test_training_equals_that_of_one_rank_of_local_layers(ranks, llama, on_one_rank, layout):
    losses = ranks(2).run(jobs.train_from, llama[0]["te"], "te", layout=LAYOUTS[layout])[0][0]
    assert losses == pytest.approx(on_one_rank, rel=LOSS)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}])
def test_scales_equal_those_of_one_rank(ranks, llama, texts, tmp_path, layout):
    """Of a checkpoint that was calibrated on two ranks; it is restored on one."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    expected = ranks(1).run(jobs_quant.ptq, llama[0]["te"], one, "fp8", quant=texts)[0]["amax"]
    ranks(2).run(jobs_quant.ptq, llama[0]["te"], two, "fp8", quant=texts, **layout)
    restored = ranks(1).run(jobs_quant.restored_amax, two)[0]
    assert restored.keys() == expected.keys()
    for name, amax in expected.items():
        # Row-parallel layers see sums over ranks, in another order.
        assert ((restored[name] - amax).abs() <= AMAX * amax.abs()).all(), name


@installed.prunes
def test_a_model_pruned_on_two_stages_loads_with_tensor_parallelism(ranks, llama, tmp_path):
    target = str(tmp_path / "pruned")
    ranks(2).run(
        jobs_prune.prune_checkpoint,
        llama[0]["te"],
        target,
        {"target_ffn_hidden_size": 64, "target_num_layers": 2},
        pp_size=2,
    )
    expected = ranks(1).run(jobs.train_again, target)[0]
    assert ranks(2).run(jobs.train_again, target, layout={"tp": 2})[0] == pytest.approx(expected, rel=LOSS)

"""Pruning on Transformer Engine's norms and attention, and loading the result into its layers."""

from __future__ import annotations

import pytest

from nemo_modelopt_dropin import versions
from test_code.support import installed, jobs_prune, jobs_quant, tolerances
from test_code.support.ranks import RankError
from test_code.te_on_cpu import jobs

pytestmark = pytest.mark.te

# What pruning keeps does not depend on the last bits of the importance.
LOSS = tolerances.of(tolerances.LOSS)

REQUESTS = {
    "width": {"target_ffn_hidden_size": 64, "target_hidden_size": 32, "target_num_attention_heads": 2},
    "depth": {"target_num_layers": 2},
    "layers": {"drop_layers": [2]},
}


@pytest.mark.parametrize(
    "request_name",
    [pytest.param(name, marks=installed.drops if name == "layers" else installed.prunes) for name in REQUESTS],
)
def test_pruned_checkpoints_equal_those_of_local_layers(ranks, llama, tmp_path, request_name):
    """The checkpoint loads into the layers that its context names and trains as one of local layers."""
    losses = {}
    for name in jobs.SPECS:
        target = str(tmp_path / name)
        ranks(1).run(jobs_prune.prune_checkpoint, llama[0][name], target, REQUESTS[request_name])
        losses[name] = ranks(1).run(jobs.train_again, target)[0]
    assert losses["te"] == pytest.approx(losses["local"], rel=LOSS)


@installed.drops
def test_other_checkpoints_without_extra_state_of_norms_load(ranks, llama, tmp_path):
    """Stock's pruning, and earlier versions of this package, write none."""
    losses = ranks(1).run(jobs.prune_without_extra_state, llama[0]["te"], str(tmp_path / "pruned"))[0]
    assert len(losses) == 3


@pytest.mark.main
@installed.drops
def test_a_pruned_checkpoint_has_all_keys_of_its_model(ranks, llama, tmp_path):
    """Without any tolerance when loading: NeMo without this package reads it, too."""
    target = str(tmp_path / "pruned")
    ranks(1).run(jobs_prune.prune_checkpoint, llama[0]["te"], target, REQUESTS["layers"])
    assert ranks(1).run(jobs.keys_that_are_missing, target)[0] == []


@pytest.mark.skipif(versions.pruning_problem() is None, reason="this modelopt prunes by importance")
@pytest.mark.parametrize("request_name", ["width", "depth"])
def test_importance_that_cannot_be_measured_raises_an_error_first(ranks, llama, tmp_path, request_name):
    """From modelopt 0.44, conversion fails half-way in the layers that NeMo restores, and leaves no usable model."""
    with pytest.raises(RankError, match=r"the pruning of.*Install nvidia-modelopt 0\.43\. The model is as it was"):
        ranks(1).run(jobs_prune.prune_checkpoint, llama[0]["te"], str(tmp_path / "x"), REQUESTS[request_name])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.main
@installed.prunes
def test_what_follows_pruning_equals_local_layers(ranks, llama, texts, tmp_path):
    """Distil from the original, resume, and quantize: as in ``compress``, each step loads what the one before wrote."""
    found = {}
    for name in jobs.SPECS:
        pruned, student = str(tmp_path / f"pruned-{name}"), str(tmp_path / f"student-{name}")
        ranks(1).run(jobs_prune.prune_checkpoint, llama[0][name], pruned, REQUESTS["width"])
        found[name], last = ranks(1).run(jobs.distill_twice, pruned, llama[0][name], student)[0]
        amax = ranks(1).run(jobs_quant.ptq, last, str(tmp_path / f"fp8-{name}"), "fp8", quant=texts)[0]["amax"]
        assert ranks(1).run(jobs_quant.restored_amax, str(tmp_path / f"fp8-{name}"))[0].keys() == amax.keys()
    assert len(found["te"]) == 2 and found["te"] == pytest.approx(found["local"], rel=LOSS)

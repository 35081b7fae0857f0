"""Students and teachers with heads that predict further tokens."""

from __future__ import annotations

import pytest
import torch

from test_code.support import jobs_distill, tolerances

BLOCK = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1}


@pytest.fixture(scope="module")
def results(ranks_factory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    paths = [
        ranks_factory(2).run(jobs_distill.teacher, str(folder / name), **overrides)[0]
        for name, overrides in {"plain": {}, "mtp": BLOCK}.items()
    ]
    settings = folder / "settings.yaml"
    settings.write_text("skip_lm_loss: true\n")
    return ranks_factory(2).run(jobs_distill.multi_token_prediction, *paths, str(settings))


@pytest.mark.parametrize("layout", ["1 rank", "TP=2", "PP=2"])
def test_the_heads_are_trained_on_their_own_loss(results, layout):
    """No other loss reaches the block, so its weights after a step are those of a plain training."""
    with_block = 0
    for rank in results:
        plain, distilled = rank[layout, "plain"], rank[layout, "distilled"]
        assert plain.keys() == distilled.keys()
        for name, weight in plain.items():
            # A step changes a weight by up to 1e-3, and Adam divides the rounding of tiny gradients by their size.
            torch.testing.assert_close(distilled[name], weight, rtol=0, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")
        with_block += bool(plain)
    assert with_block == (1 if layout == "PP=2" else 2)


@pytest.mark.parametrize("layout", ["1 rank", "TP=2", "PP=2"])
def test_the_block_of_the_teacher_does_not_run(results, layout):
    """It has no part in the next-token logits: without it, all losses are the same."""
    for rank in results:
        both, without = rank[layout, "both"], rank[layout, "without"]
        names = [name for name in without if "loss" in name]
        assert "kd_logits_loss" in names
        assert {name: both[name] for name in names} == pytest.approx(
            {name: without[name] for name in names}, rel=tolerances.of("loss")
        )

"""`DistillationGPTModel` in real training: against stock, over layouts, with its checkpoints, metrics and refusals."""

from __future__ import annotations

import os

import pytest

from test_code import jobs_distill as jobs
from test_code.ranks import RankPool

PAIR = "intermediate_layer_pairs: [[decoder.final_layernorm, decoder.final_layernorm]]\n"


@pytest.fixture(scope="module")
def teacher_path(ranks_factory, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "checkpoint"
    return ranks_factory(1).run(jobs.teacher, str(path))[0]


@pytest.fixture(scope="module")
def pair_settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("settings") / "pair.yaml"
    path.write_text(PAIR)
    return str(path)


@pytest.fixture(scope="module")
def stock_ranks(tmp_path_factory):
    pool = RankPool(2, tmp_path_factory.mktemp("stock"), env={"NEMO_MODELOPT": "stock"})
    yield pool
    pool.close()


# Half the hidden size of the teacher: the pair is compared through a projection.
STUDENTS = {"same hidden size": {}, "projected": {"hidden_size": 32}}


@pytest.fixture(scope="module", params=STUDENTS)
def both(request, ranks_factory, stock_ranks, teacher_path, pair_settings):
    """The losses of ours and of stock. Without masks in the data: stock averages micro-batches, not tokens."""
    arguments = (teacher_path, pair_settings, STUDENTS[request.param], {"masked": False})
    ours = ranks_factory(2).run(jobs.distill_everywhere, *arguments)
    stock = stock_ranks.run(jobs.distill_everywhere, *arguments)
    return ours, stock


def test_the_oracle_is_stock(stock_ranks, ranks):
    assert "site-packages" in stock_ranks.run(jobs.which_subpackage)[0]
    assert ranks(2).run(jobs.which_subpackage)[0].startswith(os.getcwd())


@pytest.mark.parametrize("objective", ["logits", "pair"])
@pytest.mark.parametrize("layout", ["1 rank", "TP=2", "TP=2 SP", "PP=2"])
def test_training_losses_equal_stock(both, layout, objective):
    ours, stock = both
    for rank in range(2):
        mine, theirs = ours[rank][layout, objective], stock[rank][layout, objective]
        assert len(mine) == 4
        # fp32 sums in another order, four optimizer steps on: 1e-5 of the loss.
        assert mine == pytest.approx(theirs, rel=1e-5)

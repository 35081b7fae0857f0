"""Values that are the same on all ranks, and parameters that are counted once whatever the layout is."""

from __future__ import annotations

import pytest


def count(**layout) -> tuple[dict[str, int], dict[str, int]]:
    """Return the parameters of a tiny model with tied embeddings as compress.py counts them and as pruning does."""
    from nemo.collections.llm.modelopt.prune import _report
    from nemo_modelopt_cli.compress import heldout
    from test_code.support import jobs_prune, tiny

    core = tiny.core(jobs_prune.build(share_embeddings_and_output_weights=True, **layout)[0])
    return heldout.parameters(core), _report.measure(core)


def shared_values() -> dict[str, list]:
    """Return what the wrappers of collectives make of each rank's own values."""
    import torch

    from nemo.collections.llm.modelopt import _parallel
    from test_code.support import jobs_prune

    jobs_prune.build(pp=2)
    rank = torch.distributed.get_rank()
    return {
        "objects": _parallel.gather_objects({"rank": rank}),
        "stages": _parallel.gather_over_stages(rank),
        "first": _parallel.from_rank_zero(["of rank", rank]),
        "any": _parallel.any_rank([rank == 1, False, True]),
        "sums": _parallel.model_parallel_sum([1.0, rank]),
    }


def test_tied_embeddings_are_counted_once(ranks):
    (whole, pruned), *_ = ranks(1).run(count)
    for layout in ({"pp": 2}, {"tp": 2}):
        for by_compress, by_pruning in ranks(2).run(count, **layout):
            assert by_compress == whole
            assert by_pruning == pruned
    assert whole["parameters"] == pruned["parameters"] > whole["body_parameters"]


def test_every_rank_gets_the_same_values(ranks):
    for found in ranks(2).run(shared_values):
        assert found == {
            "objects": [{"rank": 0}, {"rank": 1}],
            "stages": [0, 1],
            "first": ["of rank", 0],
            "any": [True, False, True],
            "sums": [2.0, 1.0],
        }


@pytest.mark.parametrize("flags", [[], [True, False]])
def test_without_a_process_group_a_rank_answers_for_itself(flags):
    from nemo.collections.llm.modelopt import _parallel

    assert _parallel.any_rank(flags) == flags
    assert _parallel.gather_objects("own") == ["own"]
    assert _parallel.from_rank_zero("own") == "own"

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


def wait_for_rank_zero(fail: bool) -> dict:
    """Let rank zero work for longer than a collective may take; return how long this rank was there, and its error."""
    import datetime
    import time

    import torch

    from nemo.collections.llm.modelopt import _parallel
    from test_code.support import devices

    limit = datetime.timedelta(seconds=1)
    torch.distributed.init_process_group(devices.machine().backend, timeout=limit)
    found: dict = {"error": None}
    for _ in range(2):  # the second time must not be answered by the first
        torch.distributed.barrier()
        started = time.monotonic()
        try:
            with _parallel.while_rank_zero_works():
                if torch.distributed.get_rank() == 0:
                    time.sleep(2.5)
                    if fail:
                        raise OSError("the disk is gone")
        except OSError as error:
            found["error"] = str(error)
        found.setdefault("seconds", []).append(time.monotonic() - started)
    # The group still works.
    found["ranks"] = _parallel.gather_objects(torch.distributed.get_rank())
    return found


@pytest.mark.parametrize("fail", [False, True])
def test_rank_zero_may_work_for_longer_than_a_collective(ranks, fail):
    zero, other = ranks(2).run(wait_for_rank_zero, fail)
    assert min(*zero["seconds"], *other["seconds"]) > 2.4
    assert (zero["error"], other["error"]) == ("the disk is gone" if fail else None, None)
    assert zero["ranks"] == other["ranks"] == [0, 1]


def test_a_rank_alone_waits_for_nobody():
    from nemo.collections.llm.modelopt import _parallel

    with _parallel.while_rank_zero_works():
        pass


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

"""Pruning on a fake GPU: the host reads importance, fingerprints and losses once, not for every layer and batch."""

from __future__ import annotations

import pytest

from test_code.fake_gpu import jobs_prune as jobs
from test_code.support import installed

pytestmark = [
    pytest.mark.cpu,
    installed.prunes,
    pytest.mark.skipif(not installed.KV_CACHE, reason="modelopt 0.37 prunes in other steps"),
]


@pytest.mark.parametrize(
    "targets", [{"hidden_size": 128, "ffn_hidden_size": 256}, {"num_layers": 1}, {"num_attention_heads": 2}, {}]
)
def test_importance_is_read_twice(gpu, targets):
    """Scores of layers and the check of all activations, after any number of micro-batches with a loss mask."""
    waits, sizes = gpu(jobs.prune, targets, 3)
    assert waits == ["finish_scores", "finish_scores"]
    assert sizes == {**sizes, **targets}


def test_fingerprints_are_read_once(gpu):
    """Two layers of Llama 3.1 8B and its embedding: sums in fp64 take parts of a weight, and one read for all."""
    waits, of_search, largest = gpu(jobs.fingerprints)
    assert waits == ["fingerprint", "gather_objects"]
    assert of_search == ["_identity"]
    assert largest <= 2**22


@pytest.mark.parametrize("batches", [1, 3])
def test_candidates_are_compared_with_one_read(gpu, batches):
    """The hidden states of the original are kept on the host, batch by batch; a candidate reads nothing but losses."""
    observed, evaluated = gpu(jobs.compare, batches)
    assert observed == ["keep"] * batches + ["_means"]
    assert evaluated == ["_means"]

"""Weights that are not cut keep their memory, and the pruned model is the one that modelopt returns with copies."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from test_code.support import jobs_prune as jobs

REQUESTS = {
    "ffn": {"target_ffn_hidden_size": 64},
    "depth": {"target_num_layers": 2},
    "hidden": {"target_hidden_size": 32, "target_ffn_hidden_size": 64},
}
ENDS = ("embedding.word_embeddings.weight", "output_layer.weight")


def with_and_without(request: dict, **settings) -> list[tuple[dict, dict, list[bool]]]:
    """Prune with weights set aside and without.

    Returns:
        Each time the weights, attributes of the ends' weights, and whether these have the memory they had.
    """
    from nemo.collections.llm.modelopt.prune import _uncut
    from test_code.support import ranks, tiny

    found = []
    for set_aside in (_uncut.Uncut.set_aside, lambda self: None):
        ranks.reset()
        model, module, run = jobs.build(**settings)
        core = tiny.core(model)
        before = {name: value for name, value in core.named_parameters() if name in ENDS}
        with patch.object(_uncut.Uncut, "set_aside", set_aside):
            jobs.run_prune(model, request, module, run)
        after = {name: value for name, value in core.named_parameters() if name in ENDS}
        attributes = {name: (type(value), value.requires_grad, sorted(vars(value))) for name, value in after.items()}
        same = [after[name].data_ptr() == value.data_ptr() for name, value in before.items()]
        found.append((jobs.weights(model), attributes, same))
    return found


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize(
    "settings", [{}, {"share_embeddings_and_output_weights": True}, {"pp": 2}], ids=["untied", "tied", "PP"]
)
def test_weights_that_are_not_cut_are_not_copied(ranks, kind, settings):
    for (ours, attributes, same), (theirs, expected, copied) in ranks(2 if "pp" in settings else 1).run(
        with_and_without, REQUESTS[kind], **settings
    ):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name
        assert attributes == expected
        assert same and not any(copied)
        assert all(same) == (kind == "ffn")

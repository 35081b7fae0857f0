"""Importance is measured without the output layer, and is the same as with it."""

from __future__ import annotations

import contextlib
from unittest.mock import patch

import pytest
import torch

from test_code.support import jobs_prune as jobs

REQUESTS = {
    "width": {"target_hidden_size": 32, "target_ffn_hidden_size": 64, "target_num_attention_heads": 2},
    "depth": {"target_num_layers": 2},
}


def with_and_without(request: dict, **settings) -> list[tuple[dict, set[int]]]:
    """Prune with the output layer and without it; return the weights, and the last sizes of the layer's outputs."""
    from nemo.collections.llm.modelopt.prune import _output
    from test_code.support import ranks, tiny

    found = []
    for context in (_output.left_out, lambda core: contextlib.nullcontext()):
        ranks.reset()
        model, module, run = jobs.build(**settings)
        seen: set[int] = set()
        layer = getattr(tiny.core(model), "output_layer", None)
        if layer is not None:
            layer.register_forward_hook(lambda _, args, output, seen=seen: seen.add(output[0].shape[-1]))
        with patch.object(_output, "left_out", context):
            jobs.run_prune(model, request, module, run)
        found.append((jobs.weights(model), seen))
        assert layer is None or not {"forward", "compute_language_model_loss"} & {*vars(layer), *vars(tiny.core(model))}
    return found


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize(
    "settings", [{}, {"share_embeddings_and_output_weights": True}, {"pp": 2}], ids=["untied", "tied", "PP"]
)
def test_the_output_layer_is_left_out(ranks, kind, settings):
    results = ranks(2 if "pp" in settings else 1).run(with_and_without, REQUESTS[kind], **settings)
    for (ours, _), (theirs, _) in results:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    # On the last pipeline stage.
    (_, without), (_, with_logits) = results[-1]
    assert without == {1} and with_logits == {256}

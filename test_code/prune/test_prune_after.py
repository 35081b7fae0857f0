"""What a width- and depth-pruned checkpoint is good for: Hugging Face export, quantization, distillation."""

from __future__ import annotations

import math

import pytest
import torch

from test_code.support import jobs_prune_after as jobs

# 40 / 2 heads is not the 16 channels that a head keeps.
REQUEST = {
    "target_hidden_size": 40,
    "target_ffn_hidden_size": 64,
    "target_num_attention_heads": 2,
    "target_num_query_groups": 1,
    "target_num_layers": 3,
}


@pytest.fixture(scope="module")
def folder(ranks_factory, tmp_path_factory):
    """Return a folder with the checkpoints ``original`` and ``pruned``."""
    path = str(tmp_path_factory.mktemp("after"))
    ranks_factory(1).run(jobs.make, path, REQUEST)
    return path


def test_hugging_face_export_has_the_sizes_and_the_same_logits(ranks, folder):
    config, (theirs, ours) = ranks(1).run(jobs.export_to_hf, folder)[0]
    assert {name: config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")} == {
        "hidden_size": 40,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "head_dim": 16,
    }
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]) == (2, 1, 256)
    # fp32 on both sides, other matmuls.
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_it_is_quantized_and_exported(ranks, folder):
    config = ranks(1).run(jobs.quantize, folder)[0]
    assert config["head_dim"] == 16
    assert config["hidden_size"] == 40


def test_it_is_distilled(ranks, folder):
    losses = ranks(1).run(jobs.distill, folder)[0]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)

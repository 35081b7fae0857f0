"""NeMo imports entries that it ignores on a GPU, or the import is an error. `test_exports` imports each family."""

from __future__ import annotations

import re

import pytest

from test_code.families import jobs, models
from test_code.support import installed

# On a GPU, NeMo's own importers run, which the CPU backend corrects (docs/families.md).
pytestmark = pytest.mark.cpu

# Both models compute in fp32, with sums in another order.
TOLERANCE = 2e-6
GROUPS = {"topk_method": "group_limited_greedy", "n_routed_experts": 8}


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("mixtral", {"sliding_window": models.WINDOW}),
        ("gemma", {"head_dim": 32}),
        ("deepseek-2", {"n_group": 2}),  # not used with `topk_method: greedy`
        ("deepseek-2", {**GROUPS, "n_group": 4, "topk_group": 2}),
        ("deepseek-3", {"q_lora_rank": None}),
    ],
)
def test_entries_that_nemo_ignores_are_read(ranks, tmp_path, name, entries):
    installed.need_family(name, entries)
    (found,) = ranks(1).run(jobs.import_and_compare, name, str(tmp_path), entries)
    assert found.get("traceback") is None
    assert found["difference"] < TOLERANCE


def test_imports_at_the_same_time_keep_their_tokenizers(ranks, tmp_path):
    assert ranks(1).run(jobs.two_tokenizers, "llama-2", str(tmp_path)) == [(256, 257)]


@pytest.mark.parametrize("name", ["mistral-window", "gemma-2"])
def test_windows_are_exported_as_they_were(ranks, tmp_path, name):
    installed.need_family(name)
    assert ranks(1).run(jobs.exported_window, name, str(tmp_path)) == [models.WINDOW]


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        (
            "llama-3.2",
            {"rope_scaling": {**models.ROPE_SCALING, "original_max_position_embeddings": 16}},
            r"NeMo's Llama computes rope_scaling with .*8192.* only; the checkpoint has .*16",
        ),
        (
            "phi-3",
            {"partial_rotary_factor": 0.75},
            r"NeMo's Phi-3 has no partial_rotary_factor; the checkpoint has .*0\.75",
        ),
        (
            "qwen3-moe",
            {"mlp_only_layers": [0]},
            r"NeMo's Qwen3 has experts in all layers; the checkpoint has layers without \(mlp_only_layers=\[0\]",
        ),
        (
            "gemma-3",
            {"layer_types": ["full_attention"] + ["sliding_attention"] * 6},
            r"NeMo's Gemma 3 repeats local layers and a global one; the checkpoint has \[True, False",
        ),
        ("gemma-3", {"final_logit_softcapping": 30.0}, "NeMo's Gemma 3 caps no scores"),
        ("deepseek-2", {**GROUPS, "n_group": 2, "topk_group": 1}, "best 2 scores of a group.* best 1 for DeepSeek V2"),
        ("deepseek-3", {"norm_topk_prob": False}, "norm_topk_prob is false"),
    ],
)
def test_what_nemo_does_not_compute_is_not_imported(ranks, tmp_path, name, entries, message):
    (found,) = ranks(1).run(jobs.import_and_compare, name, str(tmp_path), entries)
    assert re.search(message, found["error"], re.DOTALL), found
    assert not (tmp_path / "nemo").exists()

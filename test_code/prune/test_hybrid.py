"""Pruning of hybrid models: their layer pattern stays what the layers are, from modelopt's cut to the saved checkpoint.

The hybrids are Megatron's own, of attention and MLP layers: these need no mamba-ssm. Mixers of Mamba are not run.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from test_code.support import jobs_hybrid as jobs


class TestPatterns:
    @settings(deadline=None)
    @given(kept=st.sets(st.integers(1, 8), min_size=1))
    def test_letters_of_the_layers_are_kept_in_order(self, cpu_backend, kept):
        from nemo.collections.llm.modelopt.prune._hybrid import keep_pattern

        pattern = "M*M-M*ME"
        assert keep_pattern(pattern, kept) == "".join(c for i, c in enumerate(pattern, 1) if i in kept)

    @settings(deadline=None)
    @given(
        layers=st.integers(2, 12),
        attention=st.sampled_from([0.0, 0.25, 0.5]),
        mlp=st.sampled_from([0.0, 0.25, 0.5]),
        data=st.data(),
    )
    def test_megatron_builds_the_layers_that_are_left(self, cpu_backend, layers, attention, mlp, data):
        from megatron.core.ssm.mamba_hybrid_layer_allocation import allocate_layers

        from nemo.collections.llm.modelopt.prune._hybrid import cut_pattern

        kept = sorted(data.draw(st.sets(st.integers(1, layers), min_size=1, max_size=layers)))
        letters = allocate_layers(layers, attention, mlp)
        shares = {"hybrid_attention_ratio": attention, "hybrid_mlp_ratio": mlp}
        core, config = (SimpleNamespace(hybrid_override_pattern="".join(letters), **shares) for _ in range(2))
        core.config = config
        cut_pattern(core, kept)
        for found in (core, config):
            pattern = found.hybrid_override_pattern
            built = allocate_layers(len(kept), found.hybrid_attention_ratio, found.hybrid_mlp_ratio, pattern)
            assert built == [letters[number - 1] for number in kept]

    def test_shares_that_stay_are_refused_by_megatron(self, cpu_backend):
        """The reason why shares are given up: this is what loading such a checkpoint would meet."""
        from megatron.core.ssm.mamba_hybrid_layer_allocation import allocate_layers

        with pytest.raises(ValueError, match="number of each type of layer"):
            allocate_layers(2, 0.5, 0.5, "**")

    def test_a_model_that_lost_no_layer_keeps_shares_and_pattern(self, cpu_backend):
        from nemo.collections.llm.modelopt.prune._hybrid import cut_pattern

        core = SimpleNamespace(config=SimpleNamespace(hybrid_override_pattern="M*", hybrid_attention_ratio=0.5))
        cut_pattern(core, [1, 2])
        assert vars(core.config) == {"hybrid_override_pattern": "M*", "hybrid_attention_ratio": 0.5}


class TestHybrids:
    def test_dropped_layers_leave_the_pattern(self, ranks):
        out = ranks(1).run(jobs.prune, {"drop_layers": [2, 3]}, "*--*", 4)[0]
        assert set(out["patterns"].values()) == {"**"}
        assert out["report"]["kept_layers"] == [1, 4]
        for name, value in out["after"].items():
            assert torch.equal(value, out["before"][name.replace("layers.1.", "layers.3.")]), name

    @pytest.mark.parametrize("pattern", ["*-*-", None])
    def test_importance_cuts_the_pattern(self, ranks, pattern):
        request = {"target_num_layers": 3, "target_ffn_hidden_size": 64}
        shares = {} if pattern else {"hybrid_attention_ratio": 0.5, "hybrid_mlp_ratio": 0.5}
        out = ranks(1).run(jobs.prune, request, pattern, 4, **shares)[0]
        kept, scores = out["report"]["kept_layers"], out["report"]["layer_scores"]
        assert kept == sorted(sorted(scores, key=scores.get, reverse=True)[:3])
        letters = pattern or jobs.spelled(4, 0.5, 0.5)
        assert set(out["patterns"].values()) == {"".join(letters[number - 1] for number in kept)}
        before, after = ({n.split("layers.")[-1][2:]: v for n, v in out[when].items()} for when in ("before", "after"))
        assert after["self_attention.linear_qkv.weight"].shape == before["self_attention.linear_qkv.weight"].shape
        assert after["mlp.linear_fc2.weight"].shape == (64, 64)
        # The cache is that of attention layers alone: keys and values of 2 groups of 16 channels in fp32.
        assert out["report"]["cost"]["before"]["kv_cache_bytes_per_token"] == 2 * (2 * 2 * 16 * 4)

    @pytest.mark.parametrize("request_", [{"drop_layers": [2]}, {"target_num_layers": 2}])
    def test_a_model_given_by_shares_is_saved_and_loads(self, ranks, tmp_path, request_):
        shares = {"hybrid_attention_ratio": 0.5, "hybrid_mlp_ratio": 0.5}
        out = ranks(1).run(jobs.prune_and_load, str(tmp_path / "pruned"), request_, None, 4, **shares)[0]
        assert out["same"]
        assert out["saved"]["num_layers"] == len(out["saved"]["hybrid_override_pattern"])
        assert (out["saved"]["hybrid_attention_ratio"], out["saved"]["hybrid_mlp_ratio"]) == (0.0, 0.0)

    def test_a_failed_run_takes_the_spelled_pattern_back(self, ranks):
        out = ranks(1).run(jobs.prune, {"target_num_layers": 3}, None, 4, fails=True, hybrid_attention_ratio=1.0)[0]
        assert out["refused"] == "the disk is gone"
        assert set(out["patterns"].values()) == {None}
        assert all(torch.equal(out["before"][name], value) for name, value in out["after"].items())

    @pytest.mark.parametrize("request_", [{"drop_layers": [1]}, {"target_num_layers": 2}])
    def test_without_mamba_ssm_they_are_refused(self, ranks, request_):
        out = ranks(1).run(jobs.prune, request_, "*-*-", 4, known=False)[0]
        assert "only where the package mamba_ssm can be imported" in out["refused"]
        assert "install mamba_ssm and causal_conv1d" in out["refused"]
        assert set(out["patterns"].values()) == {"*-*-"}

    def test_layers_that_modelopt_leaves_are_noticed(self, ranks):
        """Without a rule for the model, modelopt cuts no layer and says nothing, while the configuration claims it."""
        out = ranks(1).run(jobs.prune, {"target_num_layers": 3}, "*-*-", 4, rules=False)[0]
        assert "left 4 layers where 3 were asked for: the model is no longer usable" in out["refused"]

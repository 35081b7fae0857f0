"""Requests that cannot work raise an error before a forward pass, which names what is allowed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from test_code.support import jobs_prune as jobs

SIZES = {
    "num_layers": 12,
    "hidden_size": 2048,
    "ffn_hidden_size": 8192,
    "num_attention_heads": 16,
    "num_query_groups": 4,
}


@pytest.fixture(scope="module")
def pruner(cpu_backend):
    import nemo.collections.llm.modelopt.prune.pruner as module

    return module


@pytest.fixture(scope="module")
def checks(cpu_backend):
    from nemo.collections.llm.modelopt.prune import _checks

    return _checks


class TestConfig:
    """What is wrong for every model raises an error when the configuration is made."""

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"target_hidden_size": 0}, r"target_hidden_size=0 is out of range.*at least 1"),
            ({"target_ffn_hidden_size": -64}, r"target_ffn_hidden_size=-64 is out of range"),
            ({"target_num_layers": 1.5}, r"target_num_layers=1\.5 is out of range.*between 0 and 1"),
            ({"target_num_layers": 1.0}, r"target_num_layers=1\.0 is out of range"),
            ({"target_num_layers": float("nan")}, r"target_num_layers=nan is out of range"),
            ({"target_num_layers": -0.5}, r"target_num_layers=-0\.5 is out of range"),
            ({"target_num_layers": True}, r"target_num_layers=True is not a number"),
            ({"target_hidden_size": "1024"}, r"target_hidden_size='1024' is not a number"),
            ({"target_mamba_head_dim": 0}, r"target_mamba_head_dim=0 is out of range"),
            ({"target_num_query_groups": 2}, r"needs target_num_attention_heads"),
            (
                {"target_num_attention_heads": 6, "target_num_query_groups": 4},
                r"target_num_attention_heads=6 is not divisible by target_num_query_groups=4; allowed.*multiples of 4",
            ),
            (
                {"drop_layers": [1], "target_num_layers": 2},
                r"^drop_layers cannot be used with other pruning parameters: drop_layers=\[1\], target_num_layers",
            ),
        ],
    )
    def test_refused(self, pruner, fields, message):
        with pytest.raises(ValueError, match=message):
            pruner.PruningConfig(**fields)

    def test_stock_fields_come_first(self, pruner):
        config = pruner.PruningConfig(1, 2, 4, 2, 3, 4, 5)
        assert config.target_ffn_hidden_size == 1
        assert config.target_num_layers == 5
        assert config.scores_path is None

    def test_an_empty_configuration_can_be_made_but_prunes_nothing(self, pruner):
        with pytest.raises(ValueError, match="pruning configuration is empty; set drop_layers or at least one of"):
            pruner.prune_language_model(object(), pruner.PruningConfig(), object(), object())


class TestSizes:
    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            ({"hidden_size": 4096}, r"target_hidden_size=4096 is above the model's 2048; allowed: 1 to 2048"),
            ({"num_layers": 13}, r"target_num_layers=13 is above the model's 12"),
            ({"mamba_num_heads": 2}, r"target_mamba_num_heads.*no such dimension; allowed.*target_hidden_size"),
            (
                {"num_attention_heads": 6},
                r"=6 with 4 query groups \(target_num_query_groups is not set\).*\[4, 8, 12, 16\]",
            ),
            (
                {"num_attention_heads": 10, "num_query_groups": 2},
                r"=10 with 2 query groups is impossible.*\[2, 4, 6, 8\]",
            ),
            ({"num_attention_heads": 16, "num_query_groups": 8}, r"target_num_query_groups=8 is above the model's 4"),
            ({"hidden_size": 2048, "num_layers": 12}, r"All targets equal the model's sizes"),
        ],
    )
    def test_refused(self, checks, targets, message):
        with pytest.raises(ValueError, match=message):
            checks.resolve_targets(targets, SIZES)

    def test_groups_default_to_the_models(self, checks):
        assert checks.resolve_targets({"num_attention_heads": 8}, SIZES) == {
            "num_attention_heads": 8,
            "num_query_groups": 4,
        }

    @settings(deadline=None)
    @given(
        ratio=st.floats(min_value=0.001, max_value=0.999),
        name=st.sampled_from(sorted(set(SIZES) - {"num_query_groups"})),
    )
    def test_a_ratio_gives_a_legal_size_near_it(self, checks, ratio, name):
        try:
            resolved = checks.resolve_targets({name: ratio}, SIZES)
        except ValueError as error:
            assert "All targets equal" in str(error)  # noqa: PT017 - a ratio near 1 rounds to the size that is there
            return
        step = {"hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_layers": 1}[name]
        assert resolved[name] % step == 0
        assert 1 <= resolved[name] <= SIZES[name]
        # Heads are rounded twice: to a whole number, then to whole groups.
        assert abs(resolved[name] - ratio * SIZES[name]) <= max(step, 1)

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ([0], r"\[0\] not among the model's layers; allowed: whole numbers from 1 to 12"),
            ([3, 13], r"\[13\] not among"),
            ([-1], r"\[-1\] not among"),
            ([0, 0, 999], r"\[0, 0, 999\] not among"),
            ([2.0], r"\[2\.0\] not among"),
            ([True], r"\[True\] not among"),
            (["1"], r"\['1'\] not among"),
            ([2, 2, 5], r"\[2\] listed more than once"),
            (list(range(1, 13)), r"removes all 12 layers; keep at least one"),
        ],
    )
    def test_drop_layers_refused(self, checks, layers, message):
        with pytest.raises(ValueError, match=message):
            checks.check_drop_layers(layers, 12)

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"tensor_model_parallel_size": 2}, "tensor parallelism must be 1; restore.*pipeline parallelism"),
            ({"context_parallel_size": 2}, "context parallelism must be 1"),
            ({"expert_model_parallel_size": 4}, "expert parallelism must be 1"),
            ({"sequence_parallel": True}, "sequence_parallel=True: importance pruning needs it off"),
            ({"virtual_pipeline_model_parallel_size": 2}, "without virtual pipeline stages"),
        ],
    )
    def test_layouts_refused(self, checks, setting, message):
        with pytest.raises(ValueError, match=message):
            checks.check_layout(SimpleNamespace(**setting), by_importance=True)

    def test_layers_are_dropped_at_any_tensor_parallel_size(self, checks):
        checks.check_layout(SimpleNamespace(tensor_model_parallel_size=8, sequence_parallel=True), by_importance=False)

    @pytest.mark.parametrize("limit", [0, 0.0])
    def test_no_batches_refused(self, checks, limit):
        data, trainer = SimpleNamespace(global_batch_size=8), SimpleNamespace(limit_val_batches=limit)
        with pytest.raises(ValueError, match=r"no batch would be measured.*at least the global batch size \(8\)"):
            checks.check_batches(data, trainer)


class TestOnAModel:
    """The same through the public function: nothing is run and the model stays as it is."""

    def test_messages(self, ranks):
        cases = [
            ({"target_hidden_size": 65}, "target_hidden_size=65 is above the model's 64; allowed: 1 to 64"),
            ({"target_num_attention_heads": 3}, "allowed: [2, 4]"),
            ({"target_num_attention_heads": 4, "target_num_query_groups": 1}, "allowed: [1, 2]"),
            ({"target_mamba_num_heads": 1}, "no such dimension"),
            ({"target_num_layers": 4}, "nothing to prune"),
            ({"drop_layers": [5]}, "allowed: whole numbers from 1 to 4"),
            ({"drop_layers": [1, 1]}, "listed more than once"),
            ({}, "is empty"),
        ]
        messages = ranks(1).run(jobs.refused_all, [request for request, _ in cases])[0]
        for (request, expected), message in zip(cases, messages, strict=True):
            assert expected in message, request

    def test_no_batches(self, ranks):
        message = ranks(1).run(jobs.refused, {"target_num_layers": 2}, batches=0)[0]
        assert "limit_val_batches=0" in message

    def test_a_modelopt_without_pruning_for_megatron(self, ranks, tmp_path):
        found = ranks(1).run(jobs.refused_without_plugin, str(tmp_path / "model"), {"drop_layers": [1]})[0]
        for message in found:
            assert "This model cannot be pruned here: " in message

    def test_too_few_samples(self, ranks):
        changed, error, same, _ = ranks(1).run(jobs.what_changes, {"target_ffn_hidden_size": 64}, train_samples=3)[0]
        assert "No batch reached the model" in error
        assert changed == []
        assert same

    def test_tensor_parallel_importance(self, ranks):
        for message in ranks(2).run(jobs.refused, {"target_num_layers": 2}, tp=2):
            assert "tensor_model_parallel_size=2" in message

    def test_before_the_weights_are_read(self, ranks, tmp_path):
        cases = [
            ({"target_hidden_size": 65}, 1, "above the model's 64"),
            ({"target_num_attention_heads": 3}, 1, "allowed: [2, 4]"),
            ({"target_num_moe_experts": 2}, 1, "no such dimension"),
            ({"target_num_layers": 2}, 2, "tp_size=2: importance is measured on whole layers"),
            ({"drop_layers": [9]}, 1, "allowed: whole numbers from 1 to 4"),
            ({"target_num_layers": 2}, 1, "accepted"),
        ]
        messages = ranks(1).run(jobs.refused_by_checkpoint, str(tmp_path / "model"), [case[:2] for case in cases])[0]
        for (request, _, expected), message in zip(cases, messages, strict=True):
            assert expected in message, request


class TestPureFunctions:
    def test_attention_that_modelopt_does_not_know_is_refused_by_name(self, cpu_backend):
        from megatron.core.transformer.attention import SelfAttention

        from nemo.collections.llm.modelopt.prune import _norms

        class Capped(torch.nn.Identity):
            pass

        class Rotated(SelfAttention):
            def forward(self, x):
                return x

        attention = Rotated.__new__(Rotated)
        torch.nn.Module.__init__(attention)
        attention.core_attention = Capped()
        layers = [SimpleNamespace(self_attention=attention), SimpleNamespace(self_attention=torch.nn.Identity())]
        with pytest.raises(
            ValueError, match=r"class \['Capped', 'Rotated'\] cannot be pruned by importance.*drop_layers"
        ):
            _norms.check_attention(SimpleNamespace(decoder=SimpleNamespace(layers=layers)))

    def test_norms_that_cannot_be_sliced_are_refused_by_name(self, cpu_backend):
        from nemo.collections.llm.modelopt.prune import _norms

        class OddNorm(torch.nn.Module):
            pass

        layer = SimpleNamespace(input_layernorm=OddNorm(), self_attention=1, pre_mlp_layernorm=None, mlp=1, norm=None)
        core = SimpleNamespace(decoder=SimpleNamespace(final_layernorm=None, layers=[layer]))
        with pytest.raises(ValueError, match=r"class \['OddNorm'\] cannot be pruned.*local spec"):
            _norms.check_norms(core)

    def test_data_is_told_apart_by_settings_and_files(self, cpu_backend, tmp_path):
        from nemo.collections.llm.modelopt.prune._scores import describe_data

        file, trainer = tmp_path / "text.jsonl", SimpleNamespace(limit_val_batches=4)
        file.write_text("one")
        data = SimpleNamespace(paths=[0.5, str(file)], seq_length=8, consumed_samples=3, tokenizer=object(), _x=1)
        found = describe_data(data, trainer)
        assert found["paths"] == [0.5, f"{file} (3 bytes)"]
        assert "consumed_samples" not in found and "tokenizer" not in found and "_x" not in found
        file.write_text("another")
        assert describe_data(data, trainer) != found
        assert describe_data(data, SimpleNamespace(limit_val_batches=5))["batches"] == 5

    @pytest.mark.parametrize(
        ("frequency", "layers", "kept", "expected"),
        [(1, 4, [1, 3], 1), (2, 4, [1, 2, 4], [1, 0, 0]), (2, 4, [1, 3], 2), ([0, 1, 1, 0], 4, [2, 4], [1, 0])],
    )
    def test_layers_with_experts_stay_what_they_are(self, cpu_backend, frequency, layers, kept, expected):
        from nemo.collections.llm.modelopt.prune._report import keep_moe_pattern

        assert keep_moe_pattern(frequency, layers, kept) == expected

    def test_saved_configuration_gets_pattern_and_forgets_stage_splits(self, cpu_backend):
        from nemo.collections.llm.modelopt.prune._state import write_sizes

        saved = SimpleNamespace(num_layers=4, num_layers_in_first_pipeline_stage=3)
        write_sizes(saved, SimpleNamespace(num_layers=3, kv_channels=16, hybrid_override_pattern="M*-"), ["num_layers"])
        assert vars(saved) == {
            "num_layers": 3,
            "kv_channels": 16,
            "hybrid_override_pattern": "M*-",
            "num_layers_in_first_pipeline_stage": None,
        }

    @settings(deadline=None)  # the machine may be busy
    @given(
        groups=st.integers(1, 4),
        per_group=st.integers(1, 4),
        channels=st.integers(1, 3),
        data=st.data(),
    )
    def test_heads_kept_are_the_best_of_the_best_groups(self, cpu_backend, groups, per_group, channels, data):
        from nemo.collections.llm.modelopt.prune._groups import rank_heads

        numbers = data.draw(st.permutations(range(1, groups * per_group * channels + 1)))
        squares = torch.tensor(numbers, dtype=torch.float64)
        keep_groups, keep = data.draw(st.integers(1, groups)), data.draw(st.integers(1, per_group))
        found = rank_heads(squares, groups, channels, keep_groups, keep)
        importance = squares.view(groups, per_group, channels).sum(-1)
        assert found.shape == (keep_groups, keep)
        chosen = found // per_group
        assert (chosen == chosen[:, :1]).all()
        others = [g for g in range(groups) if g not in chosen[:, 0].tolist()]
        if others:
            assert importance[chosen[:, 0]].sum(-1).min() >= importance[others].sum(-1).max()
        for row in found.tolist():
            group = importance[row[0] // per_group]
            assert sorted(group.tolist(), reverse=True)[:keep] == sorted(
                (float(group[head % per_group]) for head in row), reverse=True
            )


def test_a_block_of_multi_token_prediction_keeps_its_sizes(ranks, tmp_path):
    """Only whole layers of the decoder can be removed; anything else raises an error before a forward pass."""
    refused = {
        "ffn": {"target_ffn_hidden_size": 64},
        "hidden": {"target_hidden_size": 32, "target_num_layers": 3},
        "heads": {"target_num_attention_heads": 2, "target_num_query_groups": 1},
        "budget": {"target_params": 0.8},
    }
    allowed = {"depth": {"target_num_layers": 3}, "dropped": {"drop_layers": [2]}}
    (results,) = ranks(1).run(jobs.multi_token_prediction, str(tmp_path), refused | allowed)
    for label, request in refused.items():
        name = next(iter(request))
        assert f"(mtp_num_layers=1), which modelopt does not prune: {name}" in results[label], results[label]
    for label in allowed:
        assert len(results[label]) == 2 and all(0 < loss < 7 for loss in results[label]), results[label]

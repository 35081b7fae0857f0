"""What a configuration says of single layers, or twice, follows what is pruned; other requests raise an error."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo.collections.llm.modelopt.prune import _checks, _layer_kinds


def config(**fields) -> SimpleNamespace:
    """Return a stand-in for a ``TransformerConfig``."""
    return SimpleNamespace(**{"num_layers": 6, "hidden_size": 8, "ffn_hidden_size": 32, **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"num_moe_experts": 4}, True),
        ({"num_moe_experts": 4, "moe_layer_freq": 2}, False),
        ({"num_moe_experts": 4, "moe_layer_freq": [1, 1, 0]}, False),
        ({"num_moe_experts": 4, "moe_layer_freq": [1, 1]}, True),
    ],
)
def test_a_model_of_experts_only_has_no_dense_size(fields, expected):
    assert _layer_kinds.all_have_experts(config(**fields)) is expected
    core = SimpleNamespace(config=config(**fields), decoder=SimpleNamespace(layers=[]))
    assert ("ffn_hidden_size" not in _checks.model_sizes(core)) is expected


def test_the_size_of_experts_is_named_instead():
    core = SimpleNamespace(config=config(num_moe_experts=4, moe_ffn_hidden_size=32), decoder=SimpleNamespace(layers=[]))
    with pytest.raises(ModelOptConfigError, match=r"target_ffn_hidden_size.*no such dimension.*target_moe_ffn_hidden"):
        _checks.resolve_targets({"ffn_hidden_size": 16}, _checks.model_sizes(core))


def test_mixtral_keeps_one_size_in_both_fields():
    before = {"num_layers": 6, "moe_ffn_hidden_size": 32}
    pruned = config(num_moe_experts=4, moe_ffn_hidden_size=24)
    _layer_kinds.follow(pruned, range(1, 7), before)
    assert (pruned.ffn_hidden_size, pruned.moe_ffn_hidden_size) == (24, 24)


@pytest.mark.parametrize("fields", [{"moe_layer_freq": [0, 1, 1, 1, 1, 1]}, {"ffn_hidden_size": 64}])
def test_a_dense_size_of_its_own_is_kept(fields):
    before = {"num_layers": 6, "moe_ffn_hidden_size": 32}
    pruned = config(**{"num_moe_experts": 4, "moe_ffn_hidden_size": 24, **fields})
    _layer_kinds.follow(pruned, range(1, 7), before)
    assert pruned.ffn_hidden_size == fields.get("ffn_hidden_size", 32)


@pytest.mark.parametrize("frequency", [2, [1, 0, 1, 0, 1, 0]])
def test_windows_stay_with_their_layers(frequency):
    pruned, saved = config(num_layers=3, window_attn_skip_freq=frequency), SimpleNamespace()
    _layer_kinds.follow(pruned, [1, 3, 6], {"num_layers": 6})
    _layer_kinds.write(saved, pruned)
    assert saved.window_attn_skip_freq == [1, 1, 0]


def test_all_layers_kept_changes_nothing():
    same = config(window_attn_skip_freq=2)
    _layer_kinds.follow(same, range(1, 7), {"num_layers": 6})
    assert same.window_attn_skip_freq == 2


GEMMA2 = {"attn_logit_softcapping": 50.0, "window_size": (4095, 0)}
GEMMA3 = {"interleaved_attn_pattern": (2, 1)}


@pytest.mark.parametrize(
    ("fields", "dropped", "allowed"),
    [
        (GEMMA2, [5, 6], True),
        (GEMMA2, [2, 3], True),
        (GEMMA2, [2], False),
        (GEMMA3, [6], True),
        (GEMMA3, [1, 2, 3], True),
        (GEMMA3, [1], False),
        ({}, [1], True),
    ],
)
def test_layers_that_would_change_their_kind_are_not_dropped(fields, dropped, allowed):
    if allowed:
        _layer_kinds.check_drop(dropped, config(**fields))
        return
    with pytest.raises(ModelOptConfigError, match=r"drop_layers=.*attention and would become layer \d.*Drop the last"):
        _layer_kinds.check_drop(dropped, config(**fields))


@pytest.mark.parametrize("fields", [GEMMA2, GEMMA3])
@pytest.mark.parametrize(("resolved", "by_budget"), [({"num_layers": 3}, False), ({}, True)])
def test_importance_does_not_choose_layers_of_kinds(fields, resolved, by_budget):
    with pytest.raises(ModelOptConfigError, match=r"alternate by the number.*target_num_layers=6, or drop_layers"):
        _layer_kinds.check_targets(resolved, config(**fields), by_budget)
    _layer_kinds.check_targets({"num_layers": 6}, config(**fields), by_budget)
    _layer_kinds.check_targets({"hidden_size": 4}, config(**fields), False)


def test_chosen_groups_have_as_many_experts_as_a_token_is_sent_to():
    grouped = config(num_moe_experts=8, moe_router_topk=4, moe_router_num_groups=4, moe_router_group_topk=2)
    _checks.check_experts({"num_moe_experts": 8}, grouped)
    with pytest.raises(ModelOptConfigError, match=r"4 experts in 2 of 4 groups; allowed: \[8\]"):
        _checks.check_experts({"num_moe_experts": 4}, grouped)

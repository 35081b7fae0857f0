"""What of a request does not fit a model is said from its configuration alone, as the library itself says it later."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_modelopt_dropin.preflight import data_files, model_checks
from nemo_modelopt_dropin.preflight.model_sizes import Shape

MODEL = Shape("GPT", 4, 64, 128, 8, 2, 8, 256, gated=True)
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")


@pytest.mark.parametrize(
    ("targets", "problem"),
    [
        ({"hidden_size": 65}, "hidden_size 65 is above the model's 64"),
        ({"num_attention_heads": 3}, "3 is not possible with 2 query groups; allowed for .*: 2, 4, 6, 8"),
        ({"num_attention_heads": 2, "num_query_groups": 4}, "num_query_groups 4 is above the model's 2"),
        (
            {"num_attention_heads": 6, "num_query_groups": 1},
            "not possible with 1 query groups; allowed for .*: 1, 2, 3, 4",
        ),
        ({"num_layers": 4, "hidden_size": 64}, "all are the model's own sizes, there is nothing to prune"),
        ({"num_layers": 4, "hidden_size": 56}, None),
        ({"num_attention_heads": 0.4}, None),
        ({"num_moe_experts": 2, "num_layers": 4}, None),  # the library reports what the shape does not hold
    ],
)
def test_targets_that_do_not_fit(targets, problem):
    import re

    found = model_checks.target_problems(MODEL, {f"target_{name}": size for name, size in targets.items()})
    assert (re.search(problem, " ".join(found)) is not None) if problem else found == []


def test_what_keeps_its_size_is_right_beside_a_budget():
    assert model_checks.target_problems(MODEL, {"target_num_layers": 4})
    assert not model_checks.target_problems(MODEL, {"target_num_layers": 4}, budget_too=True)


@given(
    heads=st.integers(1, 12),
    groups=st.one_of(st.none(), st.integers(1, 4)),
    own=st.sampled_from([(8, 2), (6, 6), (12, 4)]),
)
def test_heads_are_judged_as_pruning_judges_them(cpu_backend, heads, groups, own):
    from nemo.collections.llm.modelopt import ModelOptConfigError
    from nemo.collections.llm.modelopt.prune import _checks

    sizes = {"num_attention_heads": own[0], "num_query_groups": own[1]}
    wanted = {"num_attention_heads": heads} | ({} if groups is None else {"num_query_groups": groups})
    try:
        _checks.check_targets(wanted)
        _checks.resolve_targets(wanted, sizes)
        refused = False
    except ModelOptConfigError:
        refused = True
    found = model_checks.target_problems(replace(MODEL, **sizes), {f"target_{k}": v for k, v in wanted.items()})
    assert bool(found) is refused


@pytest.mark.parametrize(
    ("dropped", "problem"),
    [
        ([1, 5], "there is no layer 5; the model has layers 1 to 4"),
        ([0], "there is no layer 0"),
        ([2, 2], "2 listed more than once"),
        ([1, 2, 3, 4], "these are all 4 layers; keep at least one"),
        ([1, 4], None),
        (None, None),
    ],
)
def test_layers_to_drop(dropped, problem):
    found = model_checks.drop_problems(4, dropped)
    assert (problem in " ".join(found)) if problem else found == []
    assert not model_checks.drop_problems(None, [1, 99])


def _counted(shape: Shape, sizes) -> int:
    return replace(shape, **{name: sizes[name] for name in SIZES}).parameters


@given(
    budget=st.floats(0.002, 0.99),
    layers=st.one_of(st.none(), st.integers(1, 4)),
    heads=st.sampled_from([(8, 2), (4, 4)]),
    width=st.sampled_from([64, 60, 1024]),
)
def test_budgets_are_judged_as_the_search_judges_them(cpu_backend, budget, layers, heads, width):
    from nemo.collections.llm.modelopt import ModelOptConfigError
    from nemo.collections.llm.modelopt.prune import _candidates

    shape = replace(MODEL, hidden_size=width, num_attention_heads=heads[0], num_query_groups=heads[1])
    sizes = {name: asdict(shape)[name] for name in SIZES}
    fixed = {} if layers is None else {"num_layers": layers}
    limit = int(budget * shape.parameters)
    counted = partial(_counted, shape)
    try:
        _candidates.choose(sizes, fixed, counted, counted, (limit, None), 4)
        refused = False
    except ModelOptConfigError:
        refused = True
    targets = {f"target_{name}": size for name, size in fixed.items()}
    assert bool(model_checks.budget_problems(shape, str(limit), targets)) is refused


def test_a_budget_says_how_small_the_model_gets():
    found = model_checks.budget_problems(MODEL, "1%", {})
    least = model_checks.smallest(MODEL, {}).parameters
    assert f"no sizes go below {least:,}, because" in found[0]
    assert not model_checks.budget_problems(MODEL, str(least), {})
    assert "not fewer than the model's" in model_checks.budget_problems(MODEL, "1B", {})[0]
    assert model_checks.budget_problems(None, "3%", {}) == []


@pytest.mark.parametrize(
    ("pair", "problem"),
    [
        ("[decoder.layers.4, decoder.layers.5]", "no layer 'decoder.layers.4': the student has 4 layers"),
        ("[decoder.layers.3, decoder.layers.6.mlp]", "no layer 'decoder.layers.6.mlp': the teacher has 6 layers"),
        ("[decoder.layers.3, decoder.layers.5, mse]", None),
        ("[decoder.final_layernorm, decoder.final_layernorm]", None),
        ("3", None),  # the configuration reports it
    ],
)
def test_layers_of_losses(tmp_path, pair, problem):
    file = tmp_path / "kd.yaml"
    file.write_text(f"intermediate_layer_pairs: [{pair}]\n")
    found = model_checks.pair_problems(str(file), {"student": 4, "teacher": 6})
    assert (problem in " ".join(found)) if problem else found == []
    assert model_checks.pair_problems(str(file), {"student": None, "teacher": None}) == []


@pytest.mark.parametrize(
    ("content", "column", "problem"),
    [
        ('{"text": "a"}', None, None),
        ('{"body": "a"}', "body", None),
        ('{"body": "a"}', None, "has no column \"text\"; its columns are ['body']"),
        ("{broken", None, "line 1 is not valid JSON"),
        ("", None, "a.jsonl is empty"),
    ],
)
def test_texts_are_looked_at_up_to_their_first_row(tmp_path, content, column, problem):
    (tmp_path / "a.jsonl").write_text(content)
    found = data_files.problem(str(tmp_path / "a.jsonl"), column)
    assert (problem in (found or "")) if problem else found is None


NEMO = "nemo.collections.llm.gpt.model"


@pytest.mark.parametrize(
    ("config", "targets", "budget", "expected"),
    [
        ({"multi_latent_attention": True}, {"target_hidden_size": 8, "target_ffn_hidden_size": 8}, False, "latent"),
        ({"_target_": f"{NEMO}.deepseek.DeepSeekV3Config"}, {}, True, "target_params cannot"),
        (
            {"_target_": f"{NEMO}.gemma2.Gemma2Config2B"},
            {"target_hidden_size": 8},
            False,
            "norms",
        ),
        ({"_target_": f"{NEMO}.gemma2.Gemma2Config2B"}, {"target_num_layers": 1}, False, None),
        ({"_target_": f"{NEMO}.gemma.GemmaConfig2B"}, {"target_hidden_size": 8}, False, None),
    ],
)
def test_limits_of_a_family_are_found_in_the_file(tmp_path, config, targets, budget, expected):
    import yaml

    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "model.yaml").write_text(yaml.safe_dump({"config": config}))
    found = model_checks.family_problems(tmp_path, {**targets, "target_num_query_groups": None}, budget)
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]


def test_a_size_of_the_dense_mlp_is_refused_if_all_layers_have_experts():
    experts = replace(MODEL, experts=4)
    (found,) = model_checks.target_problems(experts, {"target_ffn_hidden_size": 8})
    assert "set target_moe_ffn_hidden_size" in found
    pruned = experts.pruned({"target_moe_ffn_hidden_size": 32, "target_num_moe_experts": 2})
    assert (pruned.ffn_hidden_size, pruned.experts) == (32, 2)

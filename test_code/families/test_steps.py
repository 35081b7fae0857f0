"""Imported families are quantized, pruned and distilled: a few steps here, all in ``make test-families``."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_modelopt_dropin.preflight import families
from test_code.families import jobs, matrix, models, steps
from test_code.support import installed

# On a GPU, NeMo's own importers run, which the CPU backend corrects (docs/families.md).
pytestmark = pytest.mark.cpu

# Steps that failed because of something that only this family has.
OWN = {
    "mistral": ["pair"],  # no `seq_length`
    "mixtral": ["width", "width-hf", "fp8-hf", "logits"],  # one size for experts and MLP, weighted outputs of experts
    "gemma": ["width"],  # zero-centred norms, scaled embedding
    "gemma-2": ["width", "logits", "int4_awq-hf"],  # capped scores and logits
    "gemma-3": ["width"],  # two kinds of layers
    "nemotron": ["width", "int8-hf"],  # zero-centred norms with biases
    "phi-3": ["width", "width-hf"],  # no size of heads in its configuration
    "deepseek-2": ["int8-hf"],  # no configuration of NeMo's exporter
    "deepseek-3": ["width", "depth", "depth-hf", "logits", "int4_awq-hf"],  # latent attention, dense layer, biases
    "gpt-oss": ["depth", "depth-hf", "fp8-hf"],  # windows by layer, biases of experts, stacked experts
}


@pytest.mark.parametrize("name", OWN)
def test_steps_of_its_own(ranks, tmp_path, name):
    installed.need_family(name)
    if not installed.EXPERTS_PRUNE and name in ("mixtral", "deepseek-3", "gpt-oss"):
        pytest.skip("modelopt 0.37 prunes neither experts nor positions of this kind")
    (found,) = ranks(1).run(steps.take, name, str(tmp_path), OWN[name])
    assert {step: steps.outcome(name, step, result) for step, result in found.items()} == dict.fromkeys(OWN[name]), (
        found
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", models.FAMILIES)
def test_all_steps(ranks, tmp_path, name):
    shown = matrix.cells(ranks(1), ranks(2), name, tmp_path)
    assert {step: wrong for step, (_, wrong) in shown.items() if wrong} == {}


def test_logits_on_two_ranks(ranks, tmp_path):
    (checkpoint,) = ranks(1).run(jobs.import_only, "deepseek-3", str(tmp_path))
    for layout in matrix.LAYOUTS.values():
        for found in ranks(2).run(jobs.compare_layout, checkpoint, str(tmp_path), **layout):
            assert found < steps.SAME


def test_each_family_has_a_row():
    assert list(models.FAMILIES) == list(families.FAMILIES)
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    shown = page.partition("preflight.families -->\n")[2].partition("<!-- families: end")[0]
    assert shown == families.table() + "\n", "paste the output of python -m nemo_modelopt_dropin.preflight.families"


def test_the_page_has_a_result_of_each_step():
    rows = matrix.rows_of(matrix.PAGE.read_text(encoding="utf-8"))
    assert list(rows) == list(models.FAMILIES), "run make test-families WRITE=--write"
    for name, cells in rows.items():
        for column, cell in zip(matrix.COLUMNS, cells, strict=True):
            if column in matrix.LAYOUTS and not matrix.can_split(name, column):
                assert cell == ""
            elif steps.refusal(name, column):
                assert cell == "refused"
            else:
                assert float(cell) < 1


def test_rows_of_some_families_replace_only_theirs():
    rows = {name: [str(number)] * len(matrix.COLUMNS) for number, name in enumerate(("qwen3", "llama-2"))}
    page = matrix.with_rows(f"before\n{matrix.BEGIN}{matrix.END}\nafter\n", rows)
    assert list(matrix.rows_of(page)) == ["llama-2", "qwen3"]
    changed = matrix.with_rows(page, {"qwen3": ["7"] * len(matrix.COLUMNS)})
    assert matrix.rows_of(changed) == {"llama-2": rows["llama-2"], "qwen3": ["7"] * len(matrix.COLUMNS)}
    assert changed.startswith("before\n") and changed.endswith(f"{matrix.END}\nafter\n")


@pytest.mark.parametrize("name", [name for name, family in families.FAMILIES.items() if family.limit])
def test_what_cannot_be_pruned_is_said_before_the_weights_are_read(ranks, tmp_path, name):
    installed.need_family(name)
    limit = families.FAMILIES[name].limit
    requests = [{f"target_{size}": 2} for size in limit.targets if size != "num_query_groups"]
    for message in ranks(1).run(jobs.refused_requests, name, str(tmp_path), [*requests, {"target_params": "60%"}])[0]:
        assert message.startswith("target_")
        assert f"cannot be pruned in a model with {limit.name}" in message
        assert "; set target_ffn_hidden_size" in message

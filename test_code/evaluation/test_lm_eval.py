"""lm-eval itself scores a model of transformers; `make test-eval` and `make test` run this."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nemo_modelopt_cli.compress import corpus
from nemo_modelopt_cli.evaluation import check, scores, scoring
from nemo_modelopt_cli.evaluation.harness_settings import Harness
from nemo_modelopt_dropin.errors import ModelOptConfigError
from test_code.evaluation import local

pytestmark = pytest.mark.evaluation


@pytest.fixture(autouse=True)
def lm_eval(monkeypatch):
    assert local.PATH, "run these tests with make test-eval"
    monkeypatch.setenv("PYTHONPATH", local.PATH)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Write a small Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("hf")
    corpus.train_tokenizer(local.TEXTS, 300, folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, max_position_embeddings=256, initializer_range=0.3, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _scored(folder: Path, names: tuple[str, ...], **settings) -> list[dict]:
    harness = Harness(**{"model_args": "dtype=float32", **settings})
    answer = scoring.score(folder, names, harness, "model", cpu=True, devices=1)
    assert answer["packages"]["lm_eval"]
    return scores.of_answer(answer)


def test_the_scores_are_those_of_direct_forward_passes(model, tmp_path):
    found = {(one["task"], one["metric"]): one for one in _scored(model, (str(local.write(tmp_path)),))}
    expected = local.directly(model)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # fp32, in batches with padding: sums in another order, a few units in the last place of a hundred terms.
        assert found[key]["value"] == pytest.approx(value, rel=1e-5), key
        assert found[key]["rows"] == len(local.ROWS)
    share = expected["tiny_choice", "acc"]
    # The standard error of a mean of n zeros and ones.
    error = (share * (1 - share) / (len(local.ROWS) - 1)) ** 0.5
    assert found["tiny_choice", "acc"]["stderr"] == pytest.approx(error)
    assert found["tiny_text", "word_perplexity"]["stderr"] is None
    assert (
        found["tiny_choice", "acc"]["higher_is_better"] and not found["tiny_target", "perplexity"]["higher_is_better"]
    )


def test_the_log_probabilities_of_a_model_in_bf16_are_not_rounded(model, tmp_path):
    """In bf16 log probabilities near -5 have steps of 0.03, and models that differ by less get the same scores."""
    task = str(local.write(tmp_path) / "tiny_text.yaml")
    found = {
        one["metric"]: one["value"] for one in _scored(model, (task,), model_args="dtype=bfloat16", batch_size="1")
    }
    expected = local.directly(model, "bfloat16")
    for metric, value in found.items():
        # The passes are the same but for their length, which may change how a matrix product is summed.
        assert value == pytest.approx(expected["tiny_text", metric], rel=1e-4), metric


def test_a_limit_uses_the_first_rows_of_a_task(model, tmp_path):
    task = str(local.write(tmp_path) / "tiny_choice.yaml")
    (found,) = _scored(model, (task,), limit=2, batch_size="1")
    assert found["rows"] == 2


def test_the_task_of_the_documentation_is_one(model, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    text = page.partition('```yaml title="my_task.yaml"\n')[2].partition("```")[0]
    (tmp_path / "my_task.yaml").write_text(text)
    (tmp_path / "my_questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in local.ROWS))
    monkeypatch.chdir(tmp_path)
    (found,) = _scored(model, ("my_task.yaml",))
    assert (found["task"], found["metric"], found["rows"]) == ("my_task", "acc", len(local.ROWS))


def test_a_group_of_local_tasks_is_scored_with_its_members(model, tmp_path):
    tasks = local.write(tmp_path)
    (tasks / "tiny.yaml").write_text(
        "group: tiny\ntask: [tiny_choice]\n"
        "aggregate_metric_list:\n  - {metric: acc, aggregation: mean, weight_by_size: true}\n"
    )
    found = {one["task"]: one for one in _scored(model, (str(tasks / "tiny.yaml"),)) if one["metric"] == "acc"}
    assert found["tiny"]["value"] == found["tiny_choice"]["value"]
    assert found["tiny_choice"]["part_of"] == "tiny" and found["tiny"]["part_of"] is None


def test_unknown_tasks_and_missing_data_are_reported_together(tmp_path):
    broken = local.write(tmp_path) / "tiny_choice.yaml"
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(ModelOptConfigError) as caught:
        check.check(("arc_easyy", "arc_easy", str(broken)), Harness())
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "arc_easyy: lm-eval" in lines[0] and "Did you mean 'arc_easy'?" in lines[0]
    assert "tasks arc_easy: lm-eval cannot load the task or its data" in lines[1] and "HF_HUB_OFFLINE=0" in lines[1]
    assert f"tasks {broken}: lm-eval cannot load" in lines[2]


def test_a_model_that_cannot_be_loaded_names_lm_evals_error(model, tmp_path):
    task = str(local.write(tmp_path) / "tiny_choice.yaml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(scoring.ScoringError, match="lm-eval failed on student .*empty"):
        scoring.score(tmp_path / "empty", (task,), Harness(), "student", cpu=True, devices=1)


def test_other_packages_than_lm_eval_are_looked_for_too():
    with pytest.raises(ModelOptConfigError, match=f"needs vllm, which {sys.executable} does not have"):
        check.check(("arc_easy",), Harness(backend="vllm"))

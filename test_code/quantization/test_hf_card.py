"""Exports bring what goes with the weights: model card, tokenizer with its chat template, generation configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from test_code.support import jobs_quant as jobs
from test_code.support.ranks import RankError

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def work(ranks_factory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    ranks_factory(1).run(jobs.make_checkpoint, str(folder / "llama"), True)
    (tokenizer,) = {path.parent for path in (folder / "llama" / "context").rglob("tokenizer_config.json")}
    (tokenizer / "chat_template.jinja").write_text(TEMPLATE)
    jobs.corpus(folder / "text.jsonl")
    return folder


def _export(ranks, work, name, algorithm, **export):
    data = {"calibration_dataset": str(work / "text.jsonl"), "calibration_dataset_size": 16}
    ranks(1).run(jobs.ptq, str(work / "llama"), str(work / name), algorithm, "hf", quant=data, export=export)
    return work / name


def test_a_quantized_export_has_a_card_the_chat_template_and_a_generation_config(ranks, work):
    from transformers import AutoTokenizer

    folder = _export(ranks, work, "fp8", "fp8")
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: Model Optimizer\npipeline_tag: text-generation\n")
    assert "# llama, FP8" in text and "- Layout: modelopt" in text and "vllm serve FOLDER" in text
    assert "- Algorithm: `fp8`, weights FP8 E4M3, activations FP8" in text
    assert "16 rows of `text.jsonl`" in text
    assert "| KL to the original (nats) |" in text and "of rows that did not calibrate" in text
    assert "base_model" not in text, "the checkpoint was not imported"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<user>Hi"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id


def test_a_plain_export_has_a_card(ranks, work):
    folder = _export(ranks, work, "plain", None)
    text = (folder / "README.md").read_text()
    assert "# llama\n" in text and "not quantized" in text and "## Calibration" not in text


def test_a_readme_of_the_user_stays(ranks, work):
    folder = work / "theirs"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    with pytest.raises(RankError, match=r"ModelOptConfigError: path: .*theirs.*README.md"):
        _export(ranks, work, "theirs", None)
    assert (folder / "README.md").read_text() == "mine"
    assert [path.name for path in Path(folder).iterdir()] == ["README.md"]


def test_auto_writes_the_layout_that_most_servers_read_in_files_of_the_requested_size(ranks, work):
    folder = _export(ranks, work, "int8", "int8", hf_layout="auto", max_shard_size="200kB")
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (section["quant_method"], section["format"]) == ("compressed-tensors", "int-quantized")
    assert not (folder / "hf_quant_config.json").exists()
    text = (folder / "README.md").read_text()
    assert "library_name: transformers" in text and "- Layout: compressed-tensors" in text
    assert "vllm serve" in text and "AutoModelForCausalLM" in text and "trtllm-serve" not in text
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1 and all(path.stat().st_size < 220_000 for path in shards)
    assert (folder / "model.safetensors.index.json").is_file()


def test_a_layout_that_cannot_hold_the_algorithm_raises_an_error_before_the_calibration(ranks, work):
    with pytest.raises(RankError, match=r"algorithm='w4a8_awq' cannot be exported with hf_layout='compressed-tensors'"):
        _export(ranks, work, "never", "w4a8_awq", hf_layout="compressed-tensors")
    assert not (work / "never").exists()

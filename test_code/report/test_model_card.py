"""The model card of Hugging Face files: header, format, readers, added sections."""

from __future__ import annotations

import json

import pytest
import yaml

from nemo_modelopt_dropin.preflight import readers
from nemo_modelopt_dropin.report import model_card

REPORT = {
    "calibration_rows": 16,
    "held_out": True,
    "evaluation_tokens": 120,
    "loss_before": 2.5,
    "loss_after": 2.625,
    "perplexity_before": 12.18,
    "perplexity_after": 13.8,
    "kl_to_original": 0.0123,
}
SETTINGS = {"algorithm": "int8_sq", "calibration_dataset": "data/texts.jsonl", "calibration_seq_len": 32}


def _folder(path, **section):
    content = {"quantization_config": section} if section else {}
    (path / "config.json").write_text(json.dumps(content))
    return path


def _card(folder):
    """Return the header and the text of a card."""
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), text


def test_card_of_a_quantized_model(tmp_path):
    kept = ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    folder = _folder(tmp_path, ignore=kept, kv_cache_scheme={"num_bits": 8}, quant_algo="FP8")
    model_card.write(folder, "my_llama", {"FP8"}, readers.MODELOPT, "org/llama")
    header, text = _card(folder)
    assert header == {
        "base_model": "org/llama",
        "base_model_relation": "quantized",
        "library_name": "Model Optimizer",
        "pipeline_tag": "text-generation",
        "tags": ["modelopt", "fp8"],
    }
    assert "# my_llama, FP8\n" in text and "imported from `org/llama`" in text
    assert "- KV cache: FP8\n- Linear layers in 16 bits: `lm_head`, `model.layers.*.mlp.gate`\n" in text
    assert "vLLM 0.32 (run):\n\n```bash\nvllm serve FOLDER\n```" in text
    assert "SGLang 0.5.23 (accepted by its rules)" in text and "trtllm-serve FOLDER" in text
    assert "AutoModelForCausalLM" not in text, "transformers computes nonsense with this layout"
    assert "nvidia-modelopt 0." in text and "nemo-modelopt-dropin" in text


def test_card_of_the_layout_that_transformers_reads(tmp_path):
    model_card.write(_folder(tmp_path, ignore=[]), "m", {"W8A8_SQ_PER_CHANNEL"}, readers.COMPRESSED_TENSORS)
    header, text = _card(tmp_path)
    assert header["library_name"] == "transformers" and "base_model" not in header
    assert "AutoModelForCausalLM" in text and "trtllm-serve" not in text
    assert "- KV cache: in 16 bits\n- Linear layers in 16 bits: none\n" in text


def test_a_card_says_that_no_server_reads_the_layout(tmp_path):
    model_card.write(_folder(tmp_path, quant_algo="x"), "m", {"W8A8_SQ_PER_CHANNEL"}, readers.MODELOPT)
    assert "No server that is known reads this format in this layout." in _card(tmp_path)[1]


def test_a_mixture_is_read_by_what_reads_all_its_formats(tmp_path):
    model_card.write(_folder(tmp_path, quant_algo="MIXED_PRECISION"), "m", {"FP8", "W4A16_AWQ"}, readers.MODELOPT)
    text = _card(tmp_path)[1]
    assert "# m, FP8 and W4A16_AWQ" in text
    assert "trtllm-serve" in text and "vllm serve" not in text


def test_card_of_a_plain_model(tmp_path):
    model_card.write(_folder(tmp_path), "student")
    header, text = _card(tmp_path)
    assert header == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert "not quantized" in text and "## Format" not in text
    assert text.count("as any model that is not quantized") == len(readers.READERS)


def test_sections_are_added_before_the_versions(tmp_path):
    model_card.write(_folder(tmp_path, quant_algo="x"), "m", {"W8A8_SQ_PER_CHANNEL"}, readers.MODELOPT)
    model_card.add(tmp_path, "Calibration", model_card.calibration(SETTINGS, REPORT))
    model_card.add(tmp_path, "Measured quality", model_card.quality(REPORT))
    model_card.add(tmp_path, "Nothing", [])
    model_card.retitle(tmp_path, "Another title")
    text = _card(tmp_path)[1]
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles == ["# Another title", "## Format", "## Use", "## Calibration", "## Measured quality", "## Versions"]
    assert "- Algorithm: `int8_sq`, weights INT8 by channel, activations INT8 (SmoothQuant, `sq_alpha`)" in text
    assert "- Calibration data: 16 rows of `texts.jsonl`, at most 32 tokens each (512 in all)" in text
    assert "| loss (nats per token) | 2.5000 | 2.6250 |" in text and "| 1.23e-02 |" in text
    assert "Measured on 120 tokens of rows that did not calibrate." in text


def test_what_was_not_measured_is_not_in_the_card(tmp_path):
    assert model_card.quality({"calibration_rows": 3}) == []
    settings = {**SETTINGS, "algorithm": "/some/place/my_quant.json"}
    assert model_card.calibration(settings, {}) == ["- Algorithm: `my_quant.json`, a quant_cfg of modelopt"]
    model_card.add(tmp_path, "Calibration", ["text"])
    model_card.retitle(tmp_path, "title")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("candidates", "found"),
    [
        (["hf://org/name"], "org/name"),
        ([None, "org/name"], "org/name"),
        (["/models/llama", "a/b/c", "name", ""], ""),
        (["../up"], ""),
    ],
)
def test_names_on_the_hub(candidates, found):
    assert model_card.hub_id(*candidates) == found


def test_a_path_that_exists_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert model_card.hub_id("org/name") == ""

"""Models that were not imported: each is written as Hugging Face files, or an error says why before the calibration."""

from __future__ import annotations

import pytest

from test_code.families import exports, steps

REASONS = {
    "gpt": "NeMo has no Hugging Face exporter for GPTModel",
    "baichuan": "transformers has no class for this family",
    "chatglm": "transformers has no class for this family",
    "nemotron-plain-norms": "adds one to the weights of norms",
}


def build(kind: str):
    """Return a small model of NeMo with a tokenizer and an optimizer."""
    from nemo.collections import llm
    from test_code.support import tiny

    # What `tiny.config` sets without the architecture of a Llama.
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length", "bf16")
    names += ("params_dtype", "pipeline_dtype", "transformer_layer_spec", "make_vocab_size_divisible_by")
    settings = {name: getattr(tiny.config(), name) for name in names} | {"hidden_dropout": 0.0}
    common = {"optim": tiny.optim(), "tokenizer": tiny.tokenizer()}
    if kind == "gpt":
        return tiny.model()
    if kind == "baichuan":
        return llm.Baichuan2Model(llm.Baichuan2Config7B(**settings, num_query_groups=4), **common)
    if kind == "chatglm":
        return llm.ChatGLMModel(llm.ChatGLM3Config6B(**settings, num_query_groups=2), **common)
    norms = {"layernorm_zero_centered_gamma": kind == "nemotron"}
    config = llm.Nemotron3Config4B(**settings, **norms, num_query_groups=2, kv_channels=16)
    return llm.NemotronModel(config, **common)


def train_and_export(kind: str, folder: str) -> list:
    """Train a model and write it plain and in FP8; return what each found, or its error."""
    from nemo.collections.llm.modelopt import ModelOptConfigError
    from test_code.support import ranks, tiny

    tiny.fit(build(kind), save_to=f"{folder}/nemo", max_steps=1, bf16_weights=True)
    found = []
    for algorithm in (None, "fp8"):
        ranks.reset()
        try:
            found.append(exports.export(f"{folder}/nemo", f"{folder}/{algorithm}", algorithm))
        except ModelOptConfigError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("kind", REASONS)
def test_what_cannot_be_written_is_an_error(ranks, tmp_path, kind):
    for message in ranks(1).run(train_and_export, kind, str(tmp_path))[0]:
        assert REASONS[kind] in message
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_a_nemotron_is_written(ranks, tmp_path):
    """Its context holds an optimizer that NeMo cannot read back, and its exporter reads the whole context."""
    for step, found in zip(
        ("plain-hf", "fp8-hf"), ranks(1).run(train_and_export, "nemotron", str(tmp_path))[0], strict=True
    ):
        assert isinstance(found, dict), found
        assert steps.problem(step, found) is None, found

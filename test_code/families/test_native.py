"""Models that were not imported: each is written as Hugging Face files, or an error says why before the calibration."""

from __future__ import annotations

from pathlib import Path

import pytest

from test_code.families import exports, steps

# On a GPU, NeMo's own importers run, which the CPU backend corrects (docs/families.md).
pytestmark = pytest.mark.cpu

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


def other_kind(kind: str):
    """Return a small model of NeMo that is not a decoder of attention layers alone."""
    from nemo.collections import llm
    from test_code.support import tiny

    common = {"optim": tiny.optim(), "tokenizer": tiny.tokenizer()}
    sizes = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4}
    if kind == "t5":
        return llm.T5Model(llm.T5Config(**sizes, encoder_num_layers=2), **common)
    if kind == "mamba":
        return llm.MambaModel(llm.BaseMambaConfig130M(num_layers=2, hidden_size=64), **common)
    return llm.MambaModel(llm.NemotronHConfig4B(**sizes, num_query_groups=2, hybrid_override_pattern="M-*-"), **common)


def try_all(kind: str, folder: str) -> dict[str, str]:
    """Quantize and prune a checkpoint without weights, and distill a T5; return the error of each."""
    from nemo.lightning.io.pl import TrainerContext

    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.llm.modelopt import ExportConfig, PruningConfig, QuantizationConfig
    from test_code.support import jobs_quant, ranks, tiny

    checkpoint = Path(folder) / "nemo"
    (checkpoint / "context").mkdir(parents=True)
    context = TrainerContext(model=other_kind(kind), trainer=tiny.trainer(max_steps=1), extra={})
    context.io_dump(checkpoint / "context", yaml_attrs=["model"])
    data = jobs_quant.corpus(Path(folder) / "text.jsonl")
    quantization = QuantizationConfig(algorithm="fp8", calibration_dataset=data, calibration_dataset_size=8)
    log = nl.NeMoLogger(log_dir=f"{folder}/logs", use_datetime_version=False, ckpt=None)
    steps_ = {
        "ptq": lambda: llm.ptq(
            str(checkpoint),
            ExportConfig(path=f"{folder}/quantized", export_format="nemo"),
            devices=1,
            quantization_config=quantization,
        ),
        "prune": lambda: llm.prune(
            str(checkpoint),
            f"{folder}/pruned",
            PruningConfig(target_ffn_hidden_size=64),
            data=tiny.data(global_batch_size=2, micro_batch_size=2),
        ),
        "distill": lambda: llm.distill(
            checkpoint, checkpoint, tiny.data(), tiny.trainer(max_steps=1), log=log, optim=tiny.optim()
        ),
    }
    found = {}
    for name in OTHERS[kind]:
        ranks.reset()
        try:
            steps_[name]()
            found[name] = "done"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


PACKAGES = "ModelOptConfigError: A Mamba model needs the packages transformer_engine, mamba_ssm and causal_conv1d"
ENCODERS = "ModelOptConfigError: No modelopt layer spec supported for config type"
OTHERS = {
    "t5": {"ptq": ENCODERS, "prune": ENCODERS, "distill": "AssertionError: Only models based on `llm.GPTModel`"},
    "mamba": {"ptq": PACKAGES, "prune": PACKAGES},
    "nemotron-h": {"ptq": PACKAGES, "prune": PACKAGES},
}


@pytest.fixture(scope="module")
def new_rank(tmp_path_factory):
    """Return a rank of its own: NeMo copies the whole context, which functions that other tests replaced prevent."""
    from test_code.support.ranks import RankPool

    pool = RankPool(1, tmp_path_factory.mktemp("new-rank-"), env={})
    yield pool
    pool.close()


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_errors_before_weights_are_read(new_rank, tmp_path, kind):
    """The checkpoint has none. The packages for Mamba need a GPU."""
    (found,) = new_rank.run(try_all, kind, str(tmp_path))
    assert {step: OTHERS[kind][step] in error for step, error in found.items()} == dict.fromkeys(OTHERS[kind], True), (
        found
    )

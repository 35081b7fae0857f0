"""What ranks execute for the tests of Hugging Face exports of models that came from Hugging Face."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from test_code.support import jobs_quant, ranks, tiny
from test_code.support.other_sums import assert_equal_but_for_sums

ALGORITHMS = ("fp8", "int8", "int4", "int4_awq", "w4a8_awq")


def assert_same_logits(theirs, ours) -> None:
    """Compare the logits of a file with those of the model in memory; the weights are numbers of bf16 in both."""
    assert_equal_but_for_sums(theirs.exact, ours.exact)
    # Another order of sums moves inputs across the edge between two codes, on each processor others. Were all roundings
    # independent, the difference would be sqrt(2) times what rounding changes.
    changed = (ours.rounded - ours.exact).norm()
    assert (theirs.rounded - ours.rounded).norm() <= 1.5 * changed + 1e-5 * ours.exact.norm()


def hf_model(family: str, seed: int, **sizes):
    """Return a small random model of ``transformers`` with weights in bf16, norms and biases included.

    Args:
        family: One of `FAMILIES`.
        seed: Of the weights.
        **sizes: Entries of the configuration that differ.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2Config, Qwen3Config

    classes = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mixtral": MixtralConfig}
    settings = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": tiny.VOCABULARY,
        "max_position_embeddings": 64,
        "initializer_range": 0.05,
        "tie_word_embeddings": family.endswith("-tied"),
    }
    # NeMo's Qwen3 has heads of this size.
    settings |= {"head_dim": 128} if family.startswith("qwen3") else {}
    settings |= {"num_local_experts": 4, "sliding_window": None} if family == "mixtral" else {}
    config = classes[family.partition("-")[0]](**settings | sizes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
    return model


def import_hf(model, folder) -> str:
    """Write a model of ``transformers`` and import it into a NeMo checkpoint; return the checkpoint's path."""
    from nemo.collections import llm

    hf, nemo = Path(folder) / "original", Path(folder) / "nemo"
    model.save_pretrained(hf)
    tiny.tokenizer().tokenizer.save_pretrained(hf)
    kinds = {
        "LlamaForCausalLM": (llm.LlamaModel, llm.Llama32Config1B),
        "Qwen2ForCausalLM": (llm.Qwen2Model, llm.Qwen2Config500M),
        "Qwen3ForCausalLM": (llm.Qwen3Model, llm.Qwen3Config600M),
        "MixtralForCausalLM": (llm.MixtralModel, llm.MixtralConfig8x7B),
    }
    # Sizes come from the files, whatever the configuration says.
    model_class, config_class = kinds[type(model).__name__]
    llm.import_ckpt(model_class(config_class()), f"hf://{hf}", output_path=str(nemo), overwrite=True)
    return str(nemo)


def export_random(
    family: str, seeds: list[int], folder, algorithms=ALGORITHMS, edit=lambda model: None
) -> dict[tuple[int, str], float | str]:
    """Export random models of a family with each algorithm; return the relative error of the logits, or the refusal.

    Args:
        family: One of `FAMILIES`.
        seeds: Of the weights.
        folder: For the checkpoints.
        algorithms: To quantize with.
        edit: Changes each model of ``transformers`` first.
    """
    from nemo.collections.llm.modelopt import _staging
    from nemo.collections.llm.modelopt.quantization.export import hf_verify

    found: dict[tuple[int, str], float | str] = {}
    errors: list[float] = []
    compare = hf_verify.compare
    hf_verify.compare = lambda *args: errors.append(compare(*args))
    data = jobs_quant.corpus(Path(folder) / "text.jsonl")
    quant = {"calibration_dataset": data, "calibration_dataset_size": 8, "enable_kv_cache": False}
    try:
        for seed in seeds:
            own = Path(folder) / f"{family}-{seed}"
            model = hf_model(family, seed)
            with torch.no_grad():
                edit(model)
            checkpoint = import_hf(model, own)
            ranks.reset()
            for algorithm in algorithms:
                try:
                    jobs_quant.ptq(checkpoint, own / algorithm, algorithm, "hf", quant=quant)
                    found[seed, algorithm] = errors.pop()
                except _staging.ExportError as error:
                    found[seed, algorithm] = str(error)
                ranks.reset()
            shutil.rmtree(own)
    finally:
        hf_verify.compare = compare
    return found

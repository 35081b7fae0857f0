"""Families that NeMo exports are written as Hugging Face checkpoints, plain and quantized, in any layout of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from test_code.families import exports, jobs, models, steps
from test_code.support import installed, jobs_quant
from test_code.support.hf_folders import tensors_of

# On a GPU, NeMo's own importers run, which the CPU backend corrects (docs/families.md).
pytestmark = pytest.mark.cpu

EXPERTS = ("mixtral", "qwen3-moe")
# Families whose names, norms, fused layers or biases are written by rules that no other family needs.
RULES_OF_THEIR_OWN = ("llama-3.2", "qwen2.5", "mixtral", "gemma-3", "phi-3", "nemotron", "starcoder", "deepseek-3")
# Norms as layers of Transformer Engine save them, which a GPU loads.
SAVED_NORMS = {
    "llama-2": {"self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"},
    "mixtral": {"self_attention.linear_qkv.layer_norm_weight", "pre_mlp_layernorm.weight"},
    "gemma-2": {"self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc2.post_layernorm.weight"},
    "deepseek-3": {
        "input_layernorm.weight",
        "self_attention.linear_q_up_proj.layer_norm_weight",
        "self_attention.linear_kv_up_proj.layer_norm_weight",
        "mlp.linear_fc1.layer_norm_weight",
        "pre_mlp_layernorm.weight",
    },
}
# Entries of `config.json` that are not those of released models or of classes of NeMo, set where a family has them.
UNUSUAL: dict[str, Any] = {
    **dict.fromkeys(("rms_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon"), 3e-6),
    "rope_theta": 12345.0,
    "rope_local_base_freq": 6789.0,
    "max_position_embeddings": 96,
    "n_positions": 96,
    "query_pre_attn_scalar": 144,
    "routed_scaling_factor": 2.0,
}
# Importers that do not read `generation_config.json`: the tokens are those of the tokenizer.
TOKENS_OF_TOKENIZER = ("phi-3", "nemotron", "starcoder", "starcoder-2")
OWN_UNUSUAL: dict[str, dict[str, Any]] = {
    "llama-3.2": {"rope_scaling": {**models.ROPE_SCALING, "factor": 32.0}},
    "qwen2.5": {"use_sliding_window": True, "sliding_window": models.WINDOW, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": models.WINDOW, "max_window_layers": 0},
    "qwen3-moe": {"norm_topk_prob": False},
    "gemma-2": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
    "gemma-3": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    # Latent norms in transformers have this epsilon, whatever the configuration contains.
    **dict.fromkeys(("deepseek-2", "deepseek-3"), {"rms_norm_eps": 1e-6}),
}
# Entries that only the export has: NeMo's exporters write them, and they follow from other entries.
ADDED = ("head_dim", "seq_length", "intermediate_size", "norm_eps", "partial_rotary_factor", "max_window_layers")
# Entries that differ, with the reason.
EXPLAINED: dict[str, dict[str, str]] = {
    **dict.fromkeys(("qwen2.5-tied", "starcoder"), {"tie_word_embeddings": "NeMo's importers untie the output layer"}),
    **dict.fromkeys(
        ("deepseek-2", "deepseek-3", "gpt-oss"),
        {
            "initializer_range": "NeMo's importer does not read it; only new weights depend on it",
            "aux_loss_alpha": "the class of V3 has none",
            "scoring_func": "the classes have one for each version",
        },
    ),
}


def settings(folder: Path) -> dict:
    data = {"calibration_dataset": str(folder / "text.jsonl"), "calibration_dataset_size": 8}
    return {**data, "enable_kv_cache": False}


def unusual(name: str) -> dict[str, Any]:
    """Return entries of a family's configuration that a constant of NeMo does not have by chance."""
    names = models.hf_config(name).to_dict()
    tokens = {} if name in TOKENS_OF_TOKENIZER else {"bos_token_id": 3, "eos_token_id": 4}
    return {key: value for key, value in UNUSUAL.items() if key in names} | tokens | OWN_UNUSUAL.get(name, {})


def import_and_export(name: str, folder: str, algorithms: list[str | None]) -> dict[str, Any]:
    """Import the random model of a family, and export it with each algorithm into a folder of its name.

    Returns:
        See `jobs.import_and_compare`.
    """
    from test_code.support import ranks

    found = jobs.import_and_compare(name, folder, unusual(name))
    checkpoint = Path(folder) / "nemo"
    jobs_quant.corpus(Path(folder) / "text.jsonl")
    for algorithm in algorithms:
        ranks.reset()
        quant = settings(Path(folder))
        jobs_quant.ptq(str(checkpoint), str(Path(folder) / str(algorithm)), algorithm, "hf", quant=quant)
    return found


def calibrate(name: str, folder: str, algorithms: list[str]) -> None:
    """Import the random model of a family, calibrate it once with each algorithm and export it to NeMo and HF."""
    from test_code.support import ranks

    checkpoint = jobs.import_hf(name, folder)
    jobs_quant.corpus(Path(folder) / "text.jsonl")
    for algorithm in algorithms:
        ranks.reset()
        nemo, hf = (str(Path(folder) / f"{algorithm}-{fmt}") for fmt in ("nemo", "hf"))
        jobs_quant.ptq_twice(str(checkpoint), nemo, hf, algorithm, settings(Path(folder)))


def export_loaded(checkpoint: str, target: str, max_shard_size: str = "5GB", **sizes: int) -> None:
    """Restore a quantized NeMo checkpoint in a layout of ranks and write it as a Hugging Face checkpoint."""
    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec
    from nemo.collections.llm.modelopt.quantization.quantizer import export_hf_checkpoint

    model, _ = setup_trainer_and_restore_model_with_modelopt_spec(checkpoint, devices=2, **sizes)
    settings = {"max_shard_size": max_shard_size, "hf_layout": "modelopt"}
    assert export_hf_checkpoint(checkpoint, target, model=model, **settings) == Path(target)


def entries_of(folder: Path) -> dict[str, Any]:
    """Return the entries that `transformers` reads, defaults included."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder).to_dict()


def different(name: str, one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the entries of two configurations of a family that differ without a reason."""
    reasons = {"_name_or_path": "the folders", **EXPLAINED.get(name, {})}
    pairs = {key: (one.get(key), other.get(key)) for key in one.keys() | other.keys() if key not in reasons}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and not (key in ADDED and pair[0] is None)}


def imported(name: str) -> Any:
    """Return the parameters of a family's test; those without a rule of their own are quantized in the slow half."""
    algorithms = [None, "fp8"] if steps.refusal(name, "fp8-hf") is None else [None]
    if name in RULES_OF_THEIR_OWN or len(algorithms) == 1:
        return [pytest.param(name, algorithms, id=name)]
    return [
        pytest.param(name, [None], id=f"{name}-plain"),
        pytest.param(name, algorithms, id=name, marks=pytest.mark.slow),
    ]


@pytest.mark.parametrize(("name", "algorithms"), [one for name in models.FAMILIES for one in imported(name)])
def test_an_imported_model_is_exported_as_it_was(ranks, tmp_path, name, algorithms):
    """The export also compares codes, scales and logits with the model in memory."""
    installed.need_family(name, unusual(name))
    (found,) = ranks(1).run(import_and_export, name, str(tmp_path), algorithms)
    assert found.get("traceback") is None
    assert found["difference"] < steps.SAME
    assert found["names"] >= SAVED_NORMS.get(name, set())
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "None")
    # Some importers of NeMo untie the output layer.
    untied = {"lm_head.weight"} if name in ("qwen2.5-tied", "starcoder") else set()
    assert set(before) ^ set(after) == untied
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    imported, plain = (entries_of(tmp_path / folder) for folder in ("hf", "None"))
    assert different(name, imported, plain) == {}
    if "fp8" not in algorithms:
        return
    with_codes, quantized = entries_of(tmp_path / "fp8"), tensors_of(tmp_path / "fp8")
    assert with_codes.pop("quantization_config")["quant_method"]
    assert different(name, plain, with_codes) == {}
    assert set(after) <= set(quantized)
    codes = {key for key, value in quantized.items() if value.dtype == torch.float8_e4m3fn}
    assert codes and {f"{key}_scale" for key in codes} <= set(quantized)
    excluded = json.loads((tmp_path / "fp8" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert not {key.removesuffix(".weight") for key in codes} & set(excluded)
    assert [key for key in after if key not in codes and not torch.equal(after[key], quantized[key])] == []


def pruned_and_exported(folder: str) -> str:
    """Prune the hidden size of a Starcoder, which has no entry for sizes of heads; return the error of its export."""
    from nemo.collections.llm.modelopt import ModelOptConfigError
    from test_code.support import ranks

    checkpoint = jobs.import_hf("starcoder", folder)
    ranks.reset()
    jobs.prune(checkpoint, f"{folder}/pruned", {"target_hidden_size": 96})
    ranks.reset()
    try:
        exports.export(f"{folder}/pruned", f"{folder}/out", None)
    except ModelOptConfigError as error:
        return str(error)
    return "written"


@pytest.mark.skipif(not installed.LEARNED_POSITIONS_PRUNE, reason="modelopt 0.37 prunes no learned positions")
def test_sizes_without_an_entry_raise_an_error_before_writing(ranks, tmp_path):
    (message,) = ranks(1).run(pruned_and_exported, str(tmp_path))
    assert "GPTBigCodeConfig cannot describe these sizes: transformer.h.0.attn.c_attn.weight has shape" in message
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def calibrated(ranks_factory, tmp_path_factory):
    """Return a function that returns the folder of a family that is calibrated with an algorithm."""
    done: dict[tuple[str, str], Path] = {}

    def make(name: str, algorithm: str) -> Path:
        if (name, algorithm) not in done:
            folder = done[name, algorithm] = tmp_path_factory.mktemp(name)
            ranks_factory(1).run(calibrate, name, str(folder), [algorithm])
        return done[name, algorithm]

    return make


LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
    "dp2": {},
}


# One of each layout, format and family in the fast half.
GATHERED = [
    ("mixtral", "tp2", "fp8"),
    ("mixtral", "ep2", "int8"),
    ("mixtral", "dp2", "fp8"),
    ("qwen3-moe", "pp2", "fp8"),
    ("qwen3-moe", "ep2", "fp8"),
]
ALL = [(name, layout, algorithm) for name in EXPERTS for layout in LAYOUTS for algorithm in ("fp8", "int8")]


@pytest.mark.parametrize(
    ("name", "layout", "algorithm"),
    [pytest.param(*one, marks=() if one in GATHERED else pytest.mark.slow) for one in ALL],
)
def test_experts_are_gathered_from_every_layout(ranks, calibrated, tmp_path, name, layout, algorithm):
    folder = calibrated(name, algorithm)
    ranks(2).run(export_loaded, str(folder / f"{algorithm}-nemo"), str(tmp_path / "hf"), **LAYOUTS[layout])
    one, two = folder / f"{algorithm}-hf", tmp_path / "hf"
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    for file in ("config.json", "hf_quant_config.json"):
        assert (one / file).read_text() == (two / file).read_text()
    gates = json.loads((two / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert [name.rpartition(".")[2] for name in gates] == ["lm_head", "gate", "gate"]


def test_files_have_the_requested_size(ranks, calibrated, tmp_path):
    folder = calibrated("mixtral", "fp8")
    ranks(2).run(export_loaded, str(folder / "fp8-nemo"), str(tmp_path / "hf"), "100KB", pipeline_model_parallel_size=2)
    one, many = tensors_of(folder / "fp8-hf"), tensors_of(tmp_path / "hf")
    assert set(one) == set(many)
    assert [key for key in one if not torch.equal(one[key].float(), many[key].float())] == []
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(many) and set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(value.numel() * value.element_size() for value in many.values())
    # The header of a file is not counted.
    assert max(file.stat().st_size for file in files) < 100_000 + 10_000
    assert len(files) < 2 * index["metadata"]["total_size"] / 100_000 + 2

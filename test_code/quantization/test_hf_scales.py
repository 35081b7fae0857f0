"""Hugging Face checkpoints store input scales where readers expect them, and list the layers in 16 bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from test_code.support import installed, jobs_prune_after, jobs_quant
from test_code.support import jobs_scales as jobs
from test_code.support.hf_folders import configurations, tensors_of

FAMILIES = ("llama", "llama-tied", "qwen2", "qwen3")


class ZeroCentredNorm(torch.nn.LayerNorm):
    """Nemotron's norm, which multiplies by one plus its weight, as in Transformer Engine on GPUs."""

    zero_centered_gamma = True

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps)

    def forward(self, value):
        """Return the normalized value."""
        return torch.nn.functional.layer_norm(value, self.normalized_shape, self.weight + 1, self.bias, self.eps)


def nemotron_spec(config, **_):
    """Return Megatron's local layers with Nemotron's norm."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    layer = get_gpt_layer_local_spec(normalization="LayerNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = ZeroCentredNorm
    return TransformerBlockSubmodules([layer] * config.num_layers, ZeroCentredNorm)


def make_nemotron(path: str) -> str:
    """Write a NeMo checkpoint of a tiny Nemotron with zero-centred layer norms, biases, and an MLP without a gate."""
    from nemo.collections.llm.fn.activation import squared_relu

    return jobs.make(
        path,
        "Nemotron",
        normalization="LayerNorm",
        layernorm_zero_centered_gamma=True,
        gated_linear_unit=False,
        activation_func=squared_relu,
        rotary_percent=0.5,
        transformer_layer_spec=nemotron_spec,
        kv_channels=16,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        cross_entropy_loss_fusion=False,
        apply_rope_fusion=False,
    )


def make_tied_qwen2(path: str) -> str:
    """Write a NeMo checkpoint of a tiny Qwen2 whose output layer shares the embedding's weight."""
    return jobs.make(path, "Qwen2", share_embeddings_and_output_weights=True, add_qkv_bias=True)


def fp32_export_and_logits(nemo: str, target: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Export a quantized checkpoint in fp32; return its logits, and those of the model in memory."""
    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec
    from nemo.collections.llm.modelopt.quantization.export import hf_verify
    from nemo.collections.llm.modelopt.quantization.quantizer import export_hf_checkpoint
    from test_code.support import devices, tiny

    model, _ = setup_trainer_and_restore_model_with_modelopt_spec(nemo)
    export_hf_checkpoint(nemo, target, model=model, dtype=torch.float32, hf_layout="modelopt")
    tokens = torch.arange(3, 35).unsqueeze(0)
    with torch.no_grad():
        ours = devices.on_host(tiny.run(tiny.core(model).eval(), tokens))
        return hf_verify.load(Path(target))(tokens).logits, ours


def restore_error(checkpoint: str, tp: int) -> str:
    """Restore a checkpoint at a tensor-parallel size that it cannot be restored at; return the error."""
    from nemo.collections.llm.modelopt import ModelOptConfigError

    try:
        jobs_quant.restored_amax(checkpoint, tp)
    except ModelOptConfigError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def work(ranks_factory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scales")
    ranks_factory(1).run(jobs.import_all, str(folder), FAMILIES)
    jobs_quant.corpus(folder / "text.jsonl")
    return folder


def settings(work, **more):
    data = {"calibration_dataset": str(work / "text.jsonl"), "calibration_dataset_size": 16}
    return {**data, "awq_block_size": 16, "enable_kv_cache": False, **more}


@pytest.fixture(scope="module")
def exported(ranks_factory, work):
    """Return a function that returns the Hugging Face folder of a family and an algorithm, and the state in memory."""
    done = {}

    def make(family, algorithm):
        if (family, algorithm) not in done:
            target = work / f"{family}-{algorithm}"
            chosen = jobs.plain_int4(str(work / "int4.json")) if algorithm == "int4" else algorithm
            arguments = (str(work / family), str(target), chosen, settings(work))
            done[family, algorithm] = target, ranks_factory(1).run(jobs.export_both, *arguments)[0]
        return done[family, algorithm]

    return make


# --- layers in 16 bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["fp8", "int4_awq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_layer_is_listed_stored_or_not(exported, family, algorithm):
    folder, _ = exported(family, algorithm)
    stored, section = configurations(folder)
    assert stored["exclude_modules"] == section["ignore"] == ["lm_head"]
    assert ("lm_head.weight" in tensors_of(folder)) is (family in ("llama", "qwen2"))


def test_the_configuration_says_whether_the_output_layer_is_tied(ranks, work):
    """NeMo's exporter of Qwen2 writes that it is not tied, and readers would expect a weight that is not stored."""
    ranks(1).run(make_tied_qwen2, str(work / "qwen2-tied"))
    ranks(1).run(jobs_quant.ptq, str(work / "qwen2-tied"), str(work / "tied"), "fp8", "hf", 1, 1, settings(work))
    assert json.loads((work / "tied" / "config.json").read_text())["tie_word_embeddings"] is True
    assert configurations(work / "tied")[0]["exclude_modules"] == ["lm_head"]


def test_every_linear_layer_without_a_scale_is_listed(exported, tmp_path):
    """All linear layers of the transformers model are listed, even if they are stored under another name."""
    import shutil

    from safetensors.torch import load_file, save_file

    from nemo.collections.llm.modelopt.quantization.export import hf_describe

    folder = tmp_path / "hf"
    shutil.copytree(exported("llama", "fp8")[0], folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for leaf in ("weight", "weight_scale", "input_scale"):
        tensors[f"model.layers.1.mlp.gate_up.{leaf}"] = tensors.pop(f"model.layers.1.mlp.gate_proj.{leaf}")
    del tensors["model.layers.1.self_attn.o_proj.weight_scale"]
    save_file(tensors, file, metadata={"format": "pt"})
    found = hf_describe.unquantized(folder, "lm_head")
    assert found == ["lm_head", "model.layers.1.mlp.gate_proj", "model.layers.1.self_attn.o_proj"]


# --- scales of inputs -------------------------------------------------------------------------------------------------


SCALED = [
    ("llama", "int4_awq"),
    ("llama", "int8_sq"),
    ("llama", "w4a8_awq"),
    ("qwen2", "int4_awq"),
    ("qwen3", "int4_awq"),
]


@pytest.mark.parametrize(("family", "algorithm"), SCALED)
def test_scales_of_fused_layers_are_in_the_norms(exported, family, algorithm):
    folder, memory = exported(family, algorithm)
    stored = tensors_of(folder)
    scales = {name for name in stored if name.endswith("pre_quant_scale")}
    parts = [f"model.layers.{n}.{layer}" for n in range(2) for layer in ("self_attn.o_proj", "mlp.down_proj")]
    assert scales == {f"{part}.pre_quant_scale" for part in parts}
    assert {stored[name].dtype for name in scales} == {torch.bfloat16}
    for number in range(2):
        own, theirs = f"decoder.layers.{number}.", f"model.layers.{number}."
        for norm, linear, name in [
            ("input_layernorm", "self_attention.linear_qkv", "input_layernorm"),
            ("pre_mlp_layernorm", "mlp.linear_fc1", "post_attention_layernorm"),
        ]:
            scale = memory[f"{own}{linear}.input_quantizer._pre_quant_scale"].flatten()
            folded = (memory[f"{own}{norm}.weight"].float() * scale.float()).bfloat16()
            assert torch.equal(stored[f"{theirs}{name}.weight"], folded)
            assert float((scale - 1).abs().max()) > 0.01, "nothing was scaled"
        for linear, name in [
            ("self_attention.linear_proj", parts[2 * number]),
            ("mlp.linear_fc2", parts[2 * number + 1]),
        ]:
            scale = memory[f"{own}{linear}.input_quantizer._pre_quant_scale"].flatten()
            assert torch.equal(stored[f"{name}.pre_quant_scale"], scale.bfloat16())
    if "awq" in algorithm:
        assert all(content["pre_quant_scale"] is True for content in configurations(folder))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_folding_does_not_change_the_function(ranks, exported, tmp_path, family):
    folder, _ = exported(family, "int4_awq")
    theirs, ours = ranks(1).run(fp32_export_and_logits, f"{folder}-nemo", str(tmp_path / "fp32"))[0]
    # Both sides compute in fp32 without rounded inputs, so only the order of sums differs.
    assert float((theirs - ours).norm() / ours.norm()) < 1e-5


def test_plain_int4_has_scales_of_ones_where_readers_expect_scales(exported):
    folder, _ = exported("llama", "int4")
    stored = tensors_of(folder)
    scales = {name.split(".", 3)[3]: value for name, value in stored.items() if name.endswith("pre_quant_scale")}
    assert set(scales) == {"self_attn.o_proj.pre_quant_scale", "mlp.down_proj.pre_quant_scale"}
    assert all(
        torch.equal(value, torch.ones_like(value)) and value.dtype == torch.bfloat16 for value in scales.values()
    )
    assert [len(scales[f"{name}.pre_quant_scale"]) for name in ("self_attn.o_proj", "mlp.down_proj")] == [64, 128]
    assert all(content["pre_quant_scale"] is True for content in configurations(folder))


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)], ids=["tp2", "pp2"])
@pytest.mark.parametrize(("family", "algorithm"), [("qwen2", "int4_awq"), ("llama", "int4")])
def test_files_are_the_same_in_every_layout(ranks, exported, tmp_path, family, algorithm, tp, pp):
    one, _ = exported(family, algorithm)
    ranks(2).run(jobs_quant.export_loaded, f"{one}-nemo", str(tmp_path / "hf"), tp, pp)
    first, second = tensors_of(one), tensors_of(tmp_path / "hf")
    assert set(first) == set(second)
    assert [name for name in first if not torch.equal(first[name].float(), second[name].float())] == []
    assert configurations(one) == configurations(tmp_path / "hf")


def test_nemotron_has_scales_in_zero_centred_norms_with_biases(ranks, work):
    """Its MLP has no gate, so readers do not fuse the up projection, which has a scale."""
    target = work / "nemotron-hf"
    ranks(1).run(make_nemotron, str(work / "nemotron"))
    more = settings(work, enable_kv_cache=installed.KV_CACHE)
    memory = ranks(1).run(jobs.export_both, str(work / "nemotron"), str(target), "int4_awq", more)[0]
    assert json.loads((target / "config.json").read_text())["architectures"] == ["NemotronForCausalLM"]
    stored = tensors_of(target)
    scaled = {name.split(".", 3)[3] for name in stored if name.endswith("pre_quant_scale")}
    assert scaled == {f"{name}.pre_quant_scale" for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")}
    cache = {"k_proj.k_scale", "v_proj.v_scale"} if installed.KV_CACHE else set()
    assert {name.rpartition("self_attn.")[2] for name in stored if name.endswith(("k_scale", "v_scale"))} == cache
    for number in range(2):
        own, theirs = f"decoder.layers.{number}.", f"model.layers.{number}."
        scale = memory[f"{own}self_attention.linear_qkv.input_quantizer._pre_quant_scale"].flatten()
        weight, bias = (memory[f"{own}input_layernorm.{leaf}"] for leaf in ("weight", "bias"))
        assert torch.equal(stored[f"{theirs}input_layernorm.weight"], ((weight + 1) * scale - 1).bfloat16())
        assert torch.equal(stored[f"{theirs}input_layernorm.bias"], (bias * scale).bfloat16())
        assert torch.equal(
            stored[f"{theirs}post_attention_layernorm.weight"], memory[f"{own}pre_mlp_layernorm.weight"].bfloat16()
        )


def test_experts_keep_their_scales_and_the_router_its_input(ranks, work):
    target = work / "moe-hf"
    ranks(1).run(jobs.make_moe, str(work / "moe"))
    memory = ranks(1).run(jobs.export_both, str(work / "moe"), str(target), "int4_awq", settings(work))[0]
    assert json.loads((target / "config.json").read_text())["architectures"] == ["Qwen3MoeForCausalLM"]
    stored = tensors_of(target)
    scaled = {name.split(".", 3)[3] for name in stored if name.endswith("pre_quant_scale")}
    parts = [f"mlp.experts.{n}.{leaf}_proj" for n in range(4) for leaf in ("gate", "up", "down")]
    assert scaled == {f"{name}.pre_quant_scale" for name in ("self_attn.o_proj", *parts)}
    norm = memory["decoder.layers.1.pre_mlp_layernorm.weight"].bfloat16()
    assert torch.equal(stored["model.layers.1.post_attention_layernorm.weight"], norm)
    excluded = ["lm_head", *(f"model.layers.{n}.mlp.gate" for n in range(2))]
    assert configurations(target)[0]["exclude_modules"] == excluded


def test_a_pruned_model_has_its_scales_in_its_norms(ranks, work):
    ranks(1).run(jobs_prune_after.make, str(work), {"target_hidden_size": 48, "target_ffn_hidden_size": 64})
    more = settings(work, enable_kv_cache=installed.KV_CACHE)
    memory = ranks(1).run(jobs.export_both, str(work / "pruned"), str(work / "pruned-hf"), "int4_awq", more)[0]
    stored = tensors_of(work / "pruned-hf")
    scale = memory["decoder.layers.0.mlp.linear_fc1.input_quantizer._pre_quant_scale"].flatten()
    norm = memory["decoder.layers.0.pre_mlp_layernorm.weight"]
    assert norm.shape == (48,)
    assert torch.equal(stored["model.layers.0.post_attention_layernorm.weight"], (norm * scale).bfloat16())
    assert len([name for name in stored if name.endswith("k_scale")]) == (4 if installed.KV_CACHE else 0)


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["nemo", "trtllm", "hf"])
def test_blocks_that_ranks_would_split_raise_an_error_before_calibrating(ranks, work, fmt):
    more = settings(work, awq_block_size=64)
    answers = ranks(2).run(
        jobs_quant.ptq_error, str(work / "llama"), str(work / f"cut-{fmt}"), "int4_awq", fmt, 2, 1, more
    )
    assert all(kind == "ModelOptConfigError" and not left for kind, _, left in answers)
    assert all("blocks of 64 do not divide the 32 inputs of" in text and fmt in text for _, text, _ in answers)
    assert all("Calibration" not in text for _, text, _ in answers)


def test_blocks_are_restored_only_at_a_size_with_the_same_blocks(ranks, work):
    """On two ranks, one block of 64 would span both halves of a row."""
    target = work / "one-block"
    more = settings(work, awq_block_size=64)
    ranks(1).run(jobs_quant.ptq, str(work / "llama"), str(target), "int4_awq", "nemo", 1, 1, more)
    ranks(1).run(jobs_quant.restored_amax, str(target))
    ranks(2).run(jobs_quant.restored_amax, str(target), 1, 2)
    message = ranks(2).run(restore_error, str(target), 2)[0]
    assert (
        "quantized in blocks of 64 inputs at tensor parallel size 1. At size 2 ranks would cut the 64 inputs of"
        in message
    )
    assert "restore it at size 1" in message

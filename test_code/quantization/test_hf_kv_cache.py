"""A quantized KV cache is stored in a Hugging Face checkpoint and its configurations, and is compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from test_code.support import installed, jobs_quant
from test_code.support import jobs_scales as jobs
from test_code.support.hf_folders import configurations, tensors_of

pytestmark = pytest.mark.skipif(not installed.KV_CACHE, reason="modelopt 0.37 keeps no quantizers of the KV cache")
FAMILIES = ("llama", "qwen2", "qwen3")
KV = ("k_proj.k_scale", "v_proj.v_scale")


def compare_with_wrong_cache(nemo: str, folder: str) -> str:
    """Compare a model with its checkpoint, and then with a copy whose scales of the cache are far too large.

    Returns:
        The error of the second comparison.
    """
    import shutil

    from safetensors.torch import load_file, save_file

    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec
    from nemo.collections.llm.modelopt._staging import ExportError
    from nemo.collections.llm.modelopt.quantization.export import hf_verify
    from test_code.support import tiny

    model, _ = setup_trainer_and_restore_model_with_modelopt_spec(nemo)
    core = tiny.core(model)
    hf_verify.check_logits(core, Path(folder), torch.bfloat16)
    wrong = Path(f"{folder}-wrong")
    shutil.copytree(folder, wrong)
    for file in wrong.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith((".k_scale", ".v_scale"))]:
            # So large that all keys and values round to zero.
            tensors[name] = tensors[name] * 2.0**14
        save_file(tensors, file, metadata={"format": "pt"})
    try:
        hf_verify.check_logits(core, wrong, torch.bfloat16)
    except ExportError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def work(ranks_factory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kv")
    ranks_factory(1).run(jobs.import_all, str(folder), FAMILIES)
    # Keys are larger than 448, the largest number of FP8, so their scale is greater than one.
    ranks_factory(1).run(jobs.import_family, str(folder), "llama-large")
    jobs_quant.corpus(folder / "text.jsonl")
    return folder


def settings(work, **more):
    data = {"calibration_dataset": str(work / "text.jsonl"), "calibration_dataset_size": 16}
    return {**data, "awq_block_size": 16, "enable_kv_cache": True, **more}


@pytest.fixture(scope="module")
def exported(ranks_factory, work):
    """Return a function that returns the Hugging Face folder of a family and an algorithm, and the state in memory."""
    done = {}

    def make(family, algorithm="fp8"):
        if (family, algorithm) not in done:
            target = work / f"{family}-{algorithm}"
            arguments = (str(work / family), str(target), algorithm, settings(work))
            done[family, algorithm] = target, ranks_factory(1).run(jobs.export_both, *arguments)[0]
        return done[family, algorithm]

    return make


CASES = [*((family, "fp8") for family in FAMILIES), ("qwen2", "int4_awq"), ("llama-large", "int4_awq")]


@pytest.mark.parametrize(("family", "algorithm"), CASES)
def test_scales_of_the_cache_are_in_files_and_configurations(exported, family, algorithm):
    folder, memory = exported(family, algorithm)
    stored = tensors_of(folder)
    wanted = {f"model.layers.{n}.self_attn.{leaf}" for n in range(2) for leaf in KV}
    assert {name for name in stored if name.endswith((".k_scale", ".v_scale"))} == wanted
    for number in range(2):
        for leaf, quantizer in zip(KV, ("k_bmm_quantizer", "v_bmm_quantizer"), strict=True):
            amax = memory[f"decoder.layers.{number}.self_attention.core_attention.{quantizer}._amax"]
            scale = stored[f"model.layers.{number}.self_attn.{leaf}"]
            assert scale.dtype == torch.float32 and scale.dim() == 0
            assert torch.equal(scale, (amax.reshape(()) / 448).clamp(min=1.0))
    assert any(float(stored[name]) > 1 for name in wanted) is (family == "llama-large")
    file, section = configurations(folder)
    assert file["kv_cache_quant_algo"] == "FP8"
    assert section["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}


def test_names_of_the_scales_in_compressed_tensors(ranks, work):
    """The library registers them below attention, where transformers looks for them."""
    target = work / "compressed"
    export = {"hf_layout": "compressed-tensors"}
    ranks(1).run(jobs_quant.ptq, str(work / "llama"), str(target), "fp8", "hf", 1, 1, settings(work), export)
    stored = {name: value for name, value in tensors_of(target).items() if name.endswith((".k_scale", ".v_scale"))}
    assert set(stored) == {f"model.layers.{n}.self_attn.{leaf}_scale" for n in range(2) for leaf in "kv"}
    assert {(value.dtype, tuple(value.shape)) for value in stored.values()} == {(torch.float32, (1,))}
    section = json.loads((target / "config.json").read_text())["quantization_config"]
    assert section["kv_cache_scheme"]["num_bits"] == 8 and section["kv_cache_scheme"]["type"] == "float"


def test_a_cache_that_compressed_tensors_cannot_describe_raises_an_error_before_the_calibration(ranks, work):
    arguments = (str(work / "llama"), str(work / "never"), "int4_awq", "hf", 1, 1)
    quant, export = settings(work, kv_cache_qformat="nvfp4"), {"hf_layout": "auto"}
    name, text, left = ranks(1).run(jobs_quant.ptq_error, *arguments, quant, export)[0]
    assert name == "ModelOptConfigError" and not left
    assert "int4_awq is written, has no KV cache in NVFP4" in text and 'kv_cache_qformat="fp8"' in text


def test_without_a_quantized_cache_no_file_mentions_one(ranks, work):
    target = work / "without"
    ranks(1).run(
        jobs_quant.ptq, str(work / "qwen3"), str(target), "fp8", "hf", 1, 1, settings(work, enable_kv_cache=False)
    )
    assert not [name for name in tensors_of(target) if name.endswith(("k_scale", "v_scale"))]
    file, section = configurations(target)
    assert "kv_cache_quant_algo" not in file and "kv_cache_scheme" not in section


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_files_are_the_same_in_every_layout(ranks, exported, tmp_path, tp, pp):
    one, _ = exported("qwen2")
    ranks(2).run(jobs_quant.export_loaded, f"{one}-nemo", str(tmp_path / "hf"), tp, pp)
    first, second = tensors_of(one), tensors_of(tmp_path / "hf")
    assert set(first) == set(second)
    assert [name for name in first if not torch.equal(first[name].float(), second[name].float())] == []
    assert configurations(one) == configurations(tmp_path / "hf")


def test_the_comparison_quantizes_the_cache(exported, tmp_path):
    """The model that is loaded for the comparison quantizes keys and values as a reader with these scales does."""
    from nemo.collections.llm.modelopt.quantization.export import hf_verify

    folder = tmp_path / "hf"
    shutil.copytree(exported("llama-large", "int4_awq")[0], folder)
    tokens = hf_verify.tokens(256)
    with torch.no_grad():
        quantized = hf_verify.load(folder)(tokens).logits
        forget_the_cache(folder)
        plain = hf_verify.load(folder)(tokens).logits
    assert 1e-3 < float((quantized - plain).norm() / plain.norm()) < 0.5


def forget_the_cache(folder) -> None:
    content = json.loads((folder / "hf_quant_config.json").read_text())
    del content["quantization"]["kv_cache_quant_algo"]
    (folder / "hf_quant_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("family", "algorithm"), [("qwen3", "fp8"), ("llama-large", "int4_awq")])
def test_a_wrong_scale_of_the_cache_is_found(ranks, exported, family, algorithm):
    folder, _ = exported(family, algorithm)
    message = ranks(1).run(compare_with_wrong_cache, f"{folder}-nemo", str(folder))[0]
    assert "logits differ from those of the model in memory" in message


@pytest.mark.parametrize("missing", ["scale", "configuration"])
def test_files_and_configuration_must_agree(exported, tmp_path, missing):
    from safetensors.torch import load_file, save_file

    from nemo.collections.llm.modelopt import _staging
    from nemo.collections.llm.modelopt.quantization.export import hf_files

    folder = tmp_path / "hf"
    shutil.copytree(exported("qwen2")[0], folder)
    hf_files.verify(folder)
    if missing == "configuration":
        forget_the_cache(folder)
        message = "k_scale is stored, but the configuration has no kv_cache_quant_algo"
    else:
        name = "model.layers.1.self_attn.v_proj.v_scale"
        file = folder / "model.safetensors"
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})
        message = f"{name} is missing for a KV cache in FP8"
    with pytest.raises(_staging.ExportError, match=message):
        hf_files.verify(folder)


FP8, INT8 = {"num_bits": [4, 3]}, {"num_bits": 8}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            {"*q_bmm_quantizer": FP8, "*[kv]_bmm_quantizer": FP8},
            "attention must quantize keys and values",
        ),
        ({"*k_bmm_quantizer": FP8}, r"both and nothing else, not \['k_bmm_quantizer'\]"),
        ({"*[kv]_bmm_quantizer": INT8}, "must both be FP8 or both NVFP4.*num_bits=8"),
        ({"*[kv]_bmm_quantizer": {**FP8, "bias": {"-2": None, "type": "static"}}}, "without a bias"),
        ({"*layers.0.*[kv]_bmm_quantizer": FP8}, r"the same format in all layers, not \['FP8', 'None'\]"),
    ],
)
def test_caches_that_no_checkpoint_can_describe_raise_an_error_before_calibrating(cpu_backend, patterns, message):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.export import hf_kv_cache

    core = attentions(2)
    quant_cfg = {"quant_cfg": {**patterns, "default": {"enable": False}}}
    hf_kv_cache.check_or_disable("nemo", quant_cfg, core, None)
    for enable in (None, True):
        with pytest.raises(ModelOptConfigError, match=message):
            hf_kv_cache.check_or_disable("hf", quant_cfg, core, enable)
    hf_kv_cache.check_or_disable("hf", {"quant_cfg": {"*[kv]_bmm_quantizer": FP8}}, core, True)


def test_latent_attention_has_no_cache_of_keys_and_values(cpu_backend):
    """If the user enables it, it raises an error; by default it is disabled."""
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.export import hf_kv_cache

    core = attentions(1, latent=True)
    quant_cfg = {"quant_cfg": {"*[kv]_bmm_quantizer": FP8, "default": {"enable": False}}}
    with pytest.raises(ModelOptConfigError, match="one latent vector for multi-latent attention.*enable_kv_cache"):
        hf_kv_cache.check_or_disable("hf", quant_cfg, core, True)
    hf_kv_cache.check_or_disable("hf", quant_cfg, core, None)
    assert list(quant_cfg["quant_cfg"]) == ["default"]


def attentions(count: int, latent: bool = False):
    """Return a module with layers of real classes, each with an attention module."""
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention
    from megatron.core.transformer.transformer_layer import TransformerLayer

    core = torch.nn.Module()
    core.layers = torch.nn.ModuleList()
    for number in range(count):
        layer = object.__new__(TransformerLayer)
        attention = object.__new__(MLASelfAttention) if latent else torch.nn.Module()
        for module in (layer, attention):
            torch.nn.Module.__init__(module)
        attention.core_attention = torch.nn.Identity()
        layer.self_attention, layer.layer_number = attention, number + 1
        core.layers.append(layer)
    return core

"""What the layout of compressed-tensors stores is what the library and transformers read."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from test_code.quantization.layouts import modules

cases = settings(max_examples=20, deadline=None)
seeds, kinds = st.integers(0, 2**31), st.sampled_from(["bf16 numbers", "bf16", "fp32"])
FACTS = {"NVFP4": {"group_size": 16}, "W4A16_NVFP4": {"group_size": 16}, "MXFP8": {"group_size": 32}}
FACTS["W4A16_AWQ"] = {"group_size": 32}
# What vLLM 0.32 looks for: names, dtypes and shapes of a layer `[o, i]` = `[6, 64]` (`[256, 128]` for FP8_PB_WO).
INPUT = {"input_scale": ("float32", [1])}
FP4 = {"weight_packed": ("uint8", [6, 32]), "weight_scale": ("float8_e4m3fn", [6, 4])}
FP4 |= {"weight_global_scale": ("float32", [1])}
STORED = {
    "FP8": {"weight": ("float8_e4m3fn", [6, 64]), "weight_scale": ("float32", [1]), **INPUT},
    "FP8_PER_CHANNEL_PER_TOKEN": {"weight": ("float8_e4m3fn", [6, 64]), "weight_scale": ("float32", [6, 1])},
    "FP8_WO": {"weight": ("float8_e4m3fn", [6, 64]), "weight_scale": ("float32", [6, 1])},
    "FP8_PB_WO": {"weight": ("float8_e4m3fn", [256, 128]), "weight_scale": ("float32", [2, 1])},
    "W8A8_SQ_PER_CHANNEL": {"weight": ("int8", [6, 64]), "weight_scale": ("float32", [6, 1]), **INPUT},
    "W8A8_PER_CHANNEL_PER_TOKEN": {"weight": ("int8", [6, 64]), "weight_scale": ("float32", [6, 1])},
    "W8A16": {
        "weight_packed": ("int32", [6, 16]),
        "weight_scale": ("bfloat16", [6, 1]),
        "weight_shape": ("int64", [2]),
    },
    "W4A16_AWQ": {
        "weight_packed": ("int32", [6, 8]),
        "weight_scale": ("bfloat16", [6, 2]),
        "weight_shape": ("int64", [2]),
    },
    "NVFP4": {**FP4, "input_global_scale": ("float32", [1])},
    "W4A16_NVFP4": FP4,
    "MXFP8": {"weight": ("float8_e4m3fn", [6, 64]), "weight_scale": ("uint8", [6, 2])},
}


def layer_of(module):
    """Return the layer of a module with its codes."""
    from nemo.collections.llm.modelopt.quantization.export.layouts import layer

    found = layer.read(module)
    found.codes = layer.codes_of(module, found)
    return found


def in_memory(module) -> torch.Tensor:
    """Return the fp32 weight that the model in memory computes with."""
    from nemo.collections.llm.modelopt.quantization.export.layouts import layer

    return layer.values_of(layer_of(module))


@pytest.mark.parametrize("algorithm", modules.SETTINGS)
def test_names_shapes_and_dtypes(algorithm):
    from nemo.collections.llm.modelopt.quantization.export.layouts import compressed_tensors

    module = modules.linear(algorithm, modules.weights(algorithm, 0))
    stored = compressed_tensors.tensors(layer_of(module), torch.bfloat16)
    found = {name: (str(value.dtype).removeprefix("torch."), list(value.shape)) for name, value in stored.items()}
    assert found == STORED[algorithm]
    assert set(stored) <= set(compressed_tensors.LEAVES)


@pytest.mark.parametrize("algorithm", modules.SETTINGS)
@cases
@given(seed=seeds, kind=kinds, exponent=st.integers(-12, 12), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_the_library_decodes_the_weight_in_memory(algorithm, seed, kind, exponent, dtype):
    from nemo.collections.llm.modelopt.quantization.export.layouts import compressed_tensors

    module = modules.linear(algorithm, modules.weights(algorithm, seed, kind, exponent))
    with compressed_tensors.scales_as_stored(module, dtype):
        found, expected = layer_of(module), in_memory(module)
    stored = compressed_tensors.tensors(found, dtype)
    decoded = compressed_tensors.decode(algorithm, stored)
    # The reciprocal of NVFP4's scale of the tensor is rounded; all else is exact.
    torch.testing.assert_close(decoded, expected, rtol=3e-7 if "NVFP4" in algorithm else 0, atol=0)


@pytest.mark.parametrize("algorithm", modules.SETTINGS)
def test_layers_are_read_back(algorithm):
    from nemo.collections.llm.modelopt.quantization.export.layouts import compressed_tensors

    module = modules.linear(algorithm, modules.weights(algorithm, 1))
    with compressed_tensors.scales_as_stored(module, torch.bfloat16):
        found = layer_of(module)
    back = compressed_tensors.layer_of(algorithm, found.facts, compressed_tensors.tensors(found, torch.bfloat16))
    assert torch.equal(back.codes.view(torch.uint8), found.codes.view(torch.uint8))
    assert torch.equal(back.scale.float(), found.scale.float()) and back.scale.shape == found.scale.shape
    for name in ("scale_2", "input_scale"):
        one, other = getattr(found, name), getattr(back, name)
        assert (one is None) == (other is None)
        assert one is None or float(one) == pytest.approx(float(other), rel=3e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ["W4A16_AWQ", "W8A16"])
def test_scales_are_rounded_only_inside_the_context(algorithm, dtype):
    from nemo.collections.llm.modelopt.quantization.export.layouts import compressed_tensors

    weight = modules.weights(algorithm, 3) * 1e-2
    weight[1] = 0.0
    weight[2] = 1e-9
    module = modules.linear(algorithm, weight)
    before = module.weight_quantizer.amax.clone()
    with compressed_tensors.scales_as_stored(module, dtype):
        found = layer_of(module)
        inside = module.weight_quantizer(weight).detach()
    assert torch.equal(module.weight_quantizer.amax, before)
    assert torch.equal(found.scale, found.scale.to(dtype).float()) and bool((found.scale > 0).all())
    stored = compressed_tensors.tensors(found, dtype)
    assert torch.equal(stored["weight_scale"].float(), found.scale)
    # The model in memory computes with the stored weights; the quantizer multiplies by the reciprocal of its scale.
    torch.testing.assert_close(compressed_tensors.decode(algorithm, stored), inside, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("what", ["input scales", "no codes", "W4A8"])
def test_what_the_layout_cannot_hold_raises_an_error(what):
    from nemo.collections.llm.modelopt.quantization.export.layouts import compressed_tensors

    found = layer_of(modules.linear("W4A16_AWQ", modules.weights("W4A16_AWQ", 0)))
    if what == "input scales":
        found.pre_quant_scale = torch.ones(64)
    elif what == "no codes":
        found.codes = None
    else:
        found.algorithm = "W4A8_AWQ"
    with pytest.raises(RuntimeError, match="cannot hold a layer in W4A"):
        compressed_tensors.tensors(found, torch.bfloat16)


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", modules.SETTINGS)
def test_one_format_is_described_for_all_linear_layers(algorithm):
    from compressed_tensors.quantization import QuantizationConfig

    from nemo.collections.llm.modelopt.quantization.export.layouts import compressed_tensors

    facts = FACTS.get(algorithm, {})
    section = compressed_tensors.section({"a.b": (algorithm, facts), "c": (algorithm, facts)}, ["lm_head"], None)
    assert compressed_tensors.formats_of(section) == {None: (algorithm, facts)}
    assert section["config_groups"]["group_0"]["targets"] == ["Linear"] and section["ignore"] == ["lm_head"]
    assert section["quant_method"] == "compressed-tensors" and section["quantization_status"] == "compressed"
    assert json.loads(json.dumps(section)) == section
    parsed = QuantizationConfig.model_validate({k: v for k, v in section.items() if k != "version"})
    assert parsed.format == section["format"]


def test_several_formats_are_described_by_the_names_of_layers():
    from nemo.collections.llm.modelopt.quantization.export.layouts import compressed_tensors

    names = [name for name in modules.SETTINGS if name != "W4A16_AWQ"]
    formats = {f"layers.{n}.{leaf}": (name, FACTS.get(name, {})) for n, name in enumerate(names) for leaf in "ba"}
    formats["x"], formats["y"] = ("W4A16_AWQ", {"group_size": 32}), ("W4A16_AWQ", {"group_size": 128})
    section = compressed_tensors.section(formats, ["lm_head", "gate"], "FP8")
    assert section["format"] == "mixed-precision" and len(section["config_groups"]) == len(names) + 2
    assert section["config_groups"]["group_0"]["targets"] == ["layers.0.a", "layers.0.b"]
    assert section["kv_cache_scheme"]["num_bits"] == 8 and section["kv_cache_scheme"]["type"] == "float"
    assert compressed_tensors.formats_of(section) == formats


# --- transformers -----------------------------------------------------------------------------------------------------


def tiny_llama(folder, entries: dict[str, str], dtype=torch.float32) -> torch.nn.Module:
    """Write a Llama whose layers are quantized, in the library's layout; return it with the dequantized weights.

    Args:
        folder: Where to write it.
        entries: Format of the layers by a part of their names.
        dtype: The dtype of scales and of weights that are not quantized.
    """
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemo.collections.llm.modelopt.quantization.export.layouts import compressed_tensors

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        vocab_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    tensors, formats = {}, {}
    for name, module in model.named_modules():
        algorithm = next((found for part, found in entries.items() if part in name), None)
        if not isinstance(module, torch.nn.Linear) or algorithm is None or name == "lm_head":
            continue
        converted = modules.linear(algorithm, module.weight.detach().clone())
        with compressed_tensors.scales_as_stored(converted, dtype):
            found, weight = layer_of(converted), in_memory(converted)
        formats[name] = found.format
        stored = compressed_tensors.tensors(found, dtype)
        tensors |= {f"{name}.{leaf}": value for leaf, value in stored.items()}
        module.weight.data = weight
    quantized = {f"{name}.weight" for name in formats}
    for name, value in model.state_dict().items():
        if name not in quantized:
            tensors[name] = value.contiguous()
    folder.mkdir()
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    content = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", "dtype": "float32"}
    content["quantization_config"] = compressed_tensors.section(formats, ["lm_head"], None)
    (folder / "config.json").write_text(json.dumps(content))
    return model


MIXES = {name: {"": name} for name in modules.SETTINGS}
MIXES["several"] = {"layers.0.self_attn": "FP8", "layers.0.mlp": "W4A16_AWQ", "layers.1": "W8A8_SQ_PER_CHANNEL"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*:UserWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("case", MIXES)
def test_transformers_loads_the_weights_in_memory(case, tmp_path):
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    expected = tiny_llama(tmp_path / "hf", MIXES[case])
    config = CompressedTensorsConfig(run_compressed=False)
    # The library compiles how it rounds to FP4, which takes half a minute.
    with torch.compiler.set_stance("force_eager"):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, quantization_config=config)
    weights = {name: value for name, value in found.state_dict().items() if name.endswith(".weight")}
    for name, value in expected.state_dict().items():
        # The library decodes E8M0 and NVFP4 in bf16.
        rtol = 2e-2 if "NVFP4" in case or case == "MXFP8" else 1e-6
        torch.testing.assert_close(weights[name].float(), value, rtol=rtol, atol=1e-7, msg=name)
    ids = torch.arange(16)[None]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert bool(torch.isfinite(found(ids).logits).all())

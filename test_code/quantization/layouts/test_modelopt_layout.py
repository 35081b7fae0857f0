"""What modelopt's layout stores for a layer is what modelopt's own exporter of Hugging Face models stores."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from test_code.quantization.layouts import modules
from test_code.support import installed

BLOCKS = ("NVFP4", "W4A16_NVFP4", "MXFP8")
MXFP8 = pytest.param("MXFP8", marks=installed.since_0_43)
ALGORITHMS = [name for name in modules.SETTINGS if name not in ("FP8_WO", "W8A8_PER_CHANNEL_PER_TOKEN")]
cases = settings(max_examples=30, deadline=None)
seeds, kinds = st.integers(0, 2**31), st.sampled_from(["bf16 numbers", "bf16", "fp32"])


def stored(module, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """Return what our layout stores for a layer."""
    from nemo.collections.llm.modelopt.quantization.export.layouts import layer, modelopt

    found = layer.read(module)
    found.codes = layer.codes_of(module, found)
    return modelopt.tensors(found, dtype)


def stored_by_modelopt(module, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Return what modelopt's exporter stores for a layer."""
    from modelopt.torch.export import unified_export_hf

    module = copy.deepcopy(module)
    if module.weight_quantizer.amax is not None and module.weight_quantizer.amax.dim() == 0:
        # Otherwise it copies a tensor with torch.tensor, which warns.
        module.weight_quantizer._amax = module.weight_quantizer._amax.reshape(1)
    # It asks for the GPU's capability.
    with (
        patch("modelopt.torch.quantization.qtensor.nvfp4_tensor.fp4_compatible", return_value=False),
        torch.no_grad(),
    ):
        unified_export_hf._export_quantized_weight(module, dtype)
    return {name: value for name, value in module.state_dict().items() if "quantizer" not in name}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.element_size() == 1 else tensor


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert torch.equal(bits(found[name]), bits(value)), name


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4", MXFP8])
@cases
@given(seed=seeds, kind=kinds, exponent=st.integers(-60, 60))
def test_blocks_are_packed_as_by_modelopt_bit_for_bit(algorithm, seed, kind, exponent):
    """The exporter rounds weights to its dtype first, so the dtype is that of the weight."""
    weight = modules.weights(algorithm, seed, kind, exponent)
    module = modules.linear(algorithm, weight)
    assert_equal(stored(module), stored_by_modelopt(module, weight.dtype))


@pytest.mark.parametrize("algorithm", ["NVFP4", MXFP8])
def test_ties_are_packed_as_by_modelopt_bit_for_bit(algorithm):
    values = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.0, -0.0, 1e-9, -1e-9, 4.0, -0.25, 0.2, 1.0])
    weight = torch.stack((torch.cat((values, -values)), torch.cat((values.flip(0), values * 3))))
    module = modules.linear(algorithm, weight)
    assert_equal(stored(module), stored_by_modelopt(module))


@pytest.mark.parametrize("algorithm", ["NVFP4", MXFP8])
def test_blocks_of_zeros_are_packed_as_by_modelopt(algorithm):
    weight = modules.weights(algorithm, 0)
    weight[2, :32] = 0.0
    module = modules.linear(algorithm, weight)
    assert_equal(stored(module), stored_by_modelopt(module))


@pytest.mark.parametrize("what", ["matrix", "tiny block"])
def test_scales_of_nvfp4_are_positive_where_modelopts_are_zero(what):
    weight = modules.weights("NVFP4", 0)
    part = (slice(None),) if what == "matrix" else (slice(1, 2), slice(16, 32))
    weight[part] *= 0.0 if what == "matrix" else 1e-7
    found = stored(modules.linear("NVFP4", weight))
    assert all(bool((value.float() > 0).all()) for name, value in found.items() if "scale" in name)
    from nemo.collections.llm.modelopt.quantization.export.layouts import modelopt

    decoded = modelopt.decode("NVFP4", found)
    assert bool((decoded[part] == 0).all()) and (what == "matrix" or bool(decoded.any()))


def test_a_block_above_the_calibrated_amax_is_clipped_to_it():
    from nemo.collections.llm.modelopt.quantization.export.layouts import modelopt

    weight = modules.weights("NVFP4", 0)
    module = modules.linear("NVFP4", weight)
    module.weight_quantizer.amax = weight.abs().amax() / 2
    decoded = modelopt.decode("NVFP4", stored(module))
    assert float(decoded.abs().amax()) == pytest.approx(float(weight.abs().amax() / 2), rel=1e-6)


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name not in ("NVFP4", "W4A16_NVFP4", "MXFP8")])
@cases
@given(seed=seeds, kind=kinds, exponent=st.integers(-16, 12))
def test_names_shapes_dtypes_and_scales_are_those_of_modelopt(algorithm, seed, kind, exponent):
    from nemo.collections.llm.modelopt.quantization.export.layouts import modelopt

    weight = modules.weights(algorithm, seed, kind, exponent)
    module = modules.linear(algorithm, weight)
    found, expected = stored(module), stored_by_modelopt(module)
    assert {n: (v.dtype, v.shape) for n, v in found.items()} == {n: (v.dtype, v.shape) for n, v in expected.items()}
    for name in set(found) - {"weight"}:
        torch.testing.assert_close(found[name], expected[name], rtol=3e-7, atol=0)
    # modelopt's exporter divides, its quantizer multiplies by the reciprocal: ties may be rounded either way.
    one, other = (modelopt.unpack(algorithm, tensors["weight"]) for tensors in (found, expected))
    differ = bits(one) != bits(other)
    steps = bits(one).view(torch.int8).int() - bits(other).view(torch.int8).int()
    assert int(steps.abs().max()) <= 1 and float(differ.float().mean()) <= 0.15


@pytest.mark.parametrize(
    "algorithm", [pytest.param(name, marks=installed.since_0_43) if name in BLOCKS else name for name in ALGORITHMS]
)
@cases
@given(seed=seeds, kind=kinds, exponent=st.integers(-16, 12))
def test_stored_tensors_are_decoded_to_the_weight_in_memory(algorithm, seed, kind, exponent):
    from nemo.collections.llm.modelopt.quantization.export.layouts import modelopt

    weight = modules.weights(algorithm, seed, kind, exponent)
    module = modules.linear(algorithm, weight)
    tensors = stored(module)
    decoded = modelopt.decode(algorithm, tensors)
    if algorithm in ("NVFP4", "W4A16_NVFP4", "MXFP8"):
        # The quantizer needs CUDA; modelopt's own decoding takes its place.
        expected = decoded_by_modelopt(algorithm, tensors, weight.shape)
    else:
        with torch.no_grad():
            expected = module.weight_quantizer(weight.float())
    torch.testing.assert_close(decoded, expected, rtol=1e-6, atol=0)


def decoded_by_modelopt(algorithm: str, tensors: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """Return the fp32 weight to which modelopt's classes for packed tensors decode a layer in NVFP4 or MXFP8."""
    from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor

    if algorithm == "MXFP8":
        return MXFP8QTensor(shape, torch.float32, tensors["weight"]).dequantize(scale=tensors["weight_scale"])
    return NVFP4QTensor(shape, torch.float32, tensors["weight"]).dequantize(
        scale=tensors["weight_scale"], double_scale=tensors["weight_scale_2"], block_sizes={-1: 16}
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_layers_are_read_back(algorithm):
    from nemo.collections.llm.modelopt.quantization.export.layouts import layer, modelopt

    module = modules.linear(algorithm, modules.weights(algorithm, 1))
    found = layer.read(module)
    found.codes = layer.codes_of(module, found)
    back = modelopt.layer_of(found.algorithm, found.facts, modelopt.tensors(found, torch.float32))
    assert back.algorithm == found.algorithm == algorithm
    for name in ("codes", "scale", "scale_2", "input_scale"):
        one, other = getattr(found, name), getattr(back, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(bits(one), bits(other)), name


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rows_of_a_layer_are_decoded_to_the_rows_of_its_weight(algorithm):
    from nemo.collections.llm.modelopt.quantization.export.layouts import layer

    module = modules.linear(algorithm, modules.weights(algorithm, 2))
    found = layer.read(module)
    found.codes = layer.codes_of(module, found)
    index = torch.arange(128, 256) if algorithm == "FP8_PB_WO" else torch.tensor([4, 1, 5, 0])
    part = found.rows(index)
    assert torch.equal(layer.values_of(part), layer.values_of(found)[index])
    assert found.codes.shape[0] == (256 if algorithm == "FP8_PB_WO" else 6)


@pytest.mark.parametrize(
    "index", [torch.arange(64), torch.arange(64, 192), torch.arange(127, -1, -1), torch.arange(255)]
)
def test_rows_that_cut_a_block_raise_an_error(index):
    from nemo.collections.llm.modelopt._staging import ExportError
    from nemo.collections.llm.modelopt.quantization.export.layouts import layer

    found = layer.read(modules.linear("FP8_PB_WO", modules.weights("FP8_PB_WO", 0)))
    with pytest.raises(ExportError, match="not whole blocks of 128 rows"):
        found.rows(index)


def test_a_weight_that_is_not_whole_blocks_raises_an_error():
    from nemo.collections.llm.modelopt._staging import ExportError
    from nemo.collections.llm.modelopt.quantization.export.layouts import layer

    module = modules.linear("FP8_PB_WO", torch.randn(256, 128))
    module.weight = torch.nn.Parameter(torch.randn(192, 128))
    with pytest.raises(ExportError, match=r"\[192, 128\] does not consist of whole blocks of 128 x 128"):
        layer.read(module)


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", modules.SETTINGS)
def test_formats_are_recognized(algorithm, cpu_backend):
    from nemo.collections.llm.modelopt.quantization.export.layouts import layer

    module = modules.linear(algorithm, modules.weights(algorithm, 0))
    assert layer.algorithm_of(*layer.settings_of(module)) == algorithm
    # The first forward pass changes the settings of a quantizer by token.
    module.input_quantizer(torch.randn(2, 3, module.in_features))
    assert layer.algorithm_of(*layer.settings_of(module)) == algorithm
    # Before calibration only the settings of the weight are known.
    planned = {"W8A8_PER_CHANNEL_PER_TOKEN": "W8A8_SQ_PER_CHANNEL"}.get(algorithm, algorithm)
    assert layer.algorithm_of(*layer.settings_of(module)[:3]) == planned


@pytest.mark.parametrize(
    ("algorithm", "inputs"),
    [
        ("FP8_PER_CHANNEL_PER_TOKEN", {"num_bits": modules.E4M3}),
        ("FP8", modules.BY_TOKEN),
        ("FP8", {"num_bits": 8}),
        ("NVFP4", {"num_bits": modules.E4M3}),
        ("MXFP8", {"num_bits": modules.E4M3}),
        ("W8A8_SQ_PER_CHANNEL", {"num_bits": modules.E4M3}),
        ("W8A8_SQ_PER_CHANNEL", modules.BY_TOKEN),
    ],
)
def test_a_layer_with_another_kind_of_input_has_no_format(algorithm, inputs):
    from nemo.collections.llm.modelopt.quantization.export.layouts import layer

    module = modules.linear(algorithm, modules.weights(algorithm, 0))
    module.input_quantizer = modules.quantizer(inputs, None if "type" in inputs else torch.tensor(1.0))
    assert layer.algorithm_of(*layer.settings_of(module)) is None
    assert layer.read(module) is None


def test_nvfp4_with_awq_is_plain_nvfp4_once_its_factors_are_stored_elsewhere():
    from nemo.collections.llm.modelopt.quantization.export.layouts import layer

    module = modules.linear("NVFP4", modules.weights("NVFP4", 0))
    module.input_quantizer.pre_quant_scale = torch.full((64,), 0.5)
    found = layer.read(module)
    facts = {"group_size": 16, "has_zero_point": False, "pre_quant_scale": True}
    assert found.format == ("NVFP4_AWQ", facts)
    found.pre_quant_scale = None
    assert found.format == ("NVFP4", {"group_size": 16})


def test_layers_with_and_without_factors_of_inputs_have_one_name():
    """No reader takes a mixture that contains NVFP4_AWQ."""
    from nemo.collections.llm.modelopt.quantization.export.layouts import modelopt

    scaled = {"group_size": 16, "has_zero_point": False, "pre_quant_scale": True}
    formats = {"q": ("NVFP4", {"group_size": 16}), "o": ("NVFP4_AWQ", scaled)}
    assert modelopt.section(formats, [], None)["quant_algo"] == "NVFP4_AWQ"
    assert modelopt.section({"q": formats["q"]}, [], None)["quant_algo"] == "NVFP4"
    mixed = modelopt.section({**formats, "down": ("FP8", {})}, [], None)
    assert mixed["quant_algo"] == "MIXED_PRECISION"


# --- configuration ----------------------------------------------------------------------------------------------------

FACTS = {"NVFP4": {"group_size": 16}, "W4A16_NVFP4": {"group_size": 16}, "MXFP8": {"group_size": 32}}
FACTS["W4A16_AWQ"] = {"group_size": 32, "has_zero_point": False, "pre_quant_scale": True}


@installed.since_0_43
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_format_is_described_as_by_modelopt(algorithm):
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.quant_utils import get_quant_config

    from nemo.collections.llm.modelopt.quantization.export.layouts import modelopt

    module = modules.linear(algorithm, modules.weights(algorithm, 0))
    facts = FACTS.get(algorithm, {})
    content = modelopt.quant_config({"a": (algorithm, facts)}, ["lm_head"], None)
    if algorithm != "W4A16_NVFP4":  # modelopt 0.43 calls it NVFP4, and readers would wait for the scale of the input.
        expected = get_quant_config(torch.nn.Sequential(module))["quantization"]
        assert content["quantization"]["quant_algo"] == expected["quant_algo"]
        assert {key: expected[key] for key in facts} == facts
    section = modelopt.section({"a": (algorithm, facts)}, ["lm_head"], None)
    assert section["quant_algo"] == content["quantization"]["quant_algo"] and section["ignore"] == ["lm_head"]
    assert modelopt.formats_of(section) == {None: (algorithm, facts)}
    if algorithm in ("FP8", "NVFP4"):
        assert section == convert_hf_quant_config_format(content)


@installed.since_0_43
def test_several_formats_are_described_as_by_modelopt():
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    from nemo.collections.llm.modelopt.quantization.export.layouts import modelopt

    names = ["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "MXFP8", "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ"]
    formats = {f"layers.{n}.{leaf}": (name, FACTS.get(name, {})) for n, name in enumerate(names) for leaf in "ba"}
    content = modelopt.quant_config(formats, ["lm_head", "gate"], "FP8")
    assert content["quantization"]["quant_algo"] == "MIXED_PRECISION"
    assert content["quantization"]["quantized_layers"]["layers.2.a"] == {"quant_algo": "NVFP4", "group_size": 16}
    section = modelopt.section(formats, ["lm_head", "gate"], "FP8")
    assert section == convert_hf_quant_config_format(content)
    assert modelopt.formats_of(section) == formats


def test_only_the_cache_may_be_quantized():
    from nemo.collections.llm.modelopt.quantization.export.layouts import modelopt

    section = modelopt.section({}, ["a", "lm_head"], "FP8")
    assert section["quant_algo"] is None and section["ignore"] == ["a", "lm_head"] and "config_groups" not in section
    assert section["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}

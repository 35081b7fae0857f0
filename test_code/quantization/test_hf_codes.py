"""Codes in a Hugging Face checkpoint are those of the fake quantizer in memory, and no scale is zero."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from test_code.support import allocations, installed, jobs_hf

E4M3 = (4, 3)


def zeros(model) -> None:
    """Set a matrix, a row and a block of a Llama's weights to zero, so that the input of one layer is zero."""
    first, second = model.model.layers
    first.self_attn.o_proj.weight.zero_()
    first.self_attn.q_proj.weight[3].zero_()
    first.mlp.down_proj.weight[5, :128].zero_()
    # The input of `down_proj` is a product with this one's output.
    second.mlp.up_proj.weight.zero_()


def export_with_zeros(folder, algorithm: str) -> float | str:
    """Export a random Llama with zeros; return the relative error of the logits, or the error message."""
    return jobs_hf.export_random("llama", [0], folder, (algorithm,), zeros)[0, algorithm]


def quantizer(num_bits, amax=None, **attributes):
    """Return modelopt's quantizer with an amax."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    return TensorQuantizer(QuantizerAttributeConfig(num_bits=num_bits, **attributes), amax=amax)


def layer(algorithm: str, weight: torch.Tensor, amax_factor: float = 1.0) -> torch.nn.Linear:
    """Return a layer as modelopt converts it; its amax is that of the weight times a factor."""
    from modelopt.torch.quantization.nn import SequentialQuantizer

    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = torch.nn.Parameter(weight)
    magnitude = weight.detach().abs()
    inputs = {"FP8": quantizer(E4M3, torch.tensor(3.0)), "W8A8_SQ_PER_CHANNEL": quantizer(8, torch.tensor(3.0))}
    if algorithm == "FP8":
        module.weight_quantizer = quantizer(E4M3, magnitude.amax() * amax_factor)
    elif algorithm.startswith("W8"):
        module.weight_quantizer = quantizer(8, magnitude.amax(1, keepdim=True) * amax_factor, axis=0)
    else:
        blocks = magnitude.view(-1, 8).amax(1, keepdim=True) * amax_factor
        first = quantizer(4, blocks, block_sizes={-1: 8, "type": "static"})
        second = quantizer(E4M3, first(weight.detach()).abs().amax())
        module.weight_quantizer = SequentialQuantizer(first, second) if algorithm == "W4A8_AWQ" else first
        if algorithm == "W4A8_AWQ":
            inputs[algorithm] = quantizer(E4M3, torch.tensor(3.0))
    if algorithm in inputs:
        module.input_quantizer = inputs[algorithm]
    return module


def stored(module, dtype=torch.bfloat16) -> tuple[str, dict[str, torch.Tensor]]:
    """Return what the writer stores for a layer."""
    from nemo.collections.llm.modelopt.quantization.export.layouts import layer as layers
    from nemo.collections.llm.modelopt.quantization.export.layouts import modelopt as layout

    found = layers.read(module)
    found.codes = layers.codes_of(module, found)
    return found.algorithm, layout.tensors(found, dtype)


ALGORITHMS = ["FP8", "W8A16", "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ", "W4A8_AWQ"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["bf16 numbers", "bf16", "fp32"]),
    exponent=st.integers(-20, 12),
    factor=st.sampled_from([1.0, 1.0, 0.75, 0.5, 1.5]),
)
def test_codes_are_those_of_the_quantizer_bit_for_bit(algorithm, seed, kind, exponent, factor):
    from nemo.collections.llm.modelopt.quantization.export.layouts import modelopt

    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    if kind != "fp32":
        weight = weight.bfloat16()
    if kind == "bf16 numbers":
        weight = weight.float()
    module = layer(algorithm, weight, factor)
    found, tensors = stored(module)
    assert found == algorithm
    # The second step of W4A8 is not part of the codes.
    first = module.weight_quantizer[0] if algorithm == "W4A8_AWQ" else module.weight_quantizer
    with torch.no_grad():
        in_memory = first(weight.float())
    from_file = modelopt.decode(algorithm, tensors, second_step=False)
    # A neighbouring code differs by at least 1/16 of the value, a scale and its reciprocal by one bit in 24.
    torch.testing.assert_close(from_file, in_memory, rtol=1e-6, atol=0)
    # For a weight in bf16, the quantizer computes in fp32 and rounds the result.
    assert weight.dtype != torch.bfloat16 or torch.equal(first(weight.detach()).detach(), in_memory.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(9000, 1024), (1, 3_000_001)], ids=["rows", "a long row"])
def test_a_large_weight_is_encoded_in_parts(shape, dtype):
    from nemo.collections.llm.modelopt.quantization.export.layouts import layer as layers

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    module = layer("FP8", weight)
    found = layers.read(module)
    whole = layers.nearest_codes("FP8", module.weight_quantizer(weight.float()) / found.scale)
    with torch.inference_mode(), allocations.Allocated() as allocated:
        codes = layers.codes_of(module, found)
    assert torch.equal(codes.view(torch.uint8), whole.view(torch.uint8))
    if shape[0] > 1:
        # The codes, and parts in fp32: what the quantizer computes on the way, and its result.
        assert allocated.peak < codes.nbytes + 4 * 4 * layers._PART < 4 * weight.numel()


@pytest.mark.parametrize(("value", "amax"), [(0.076171875, 0.40625), (-0.076171875, 0.40625)])
def test_a_tie_of_bf16_numbers_falls_as_in_memory(value, amax):
    """`w / (amax / 448)` results in code 80, and `w * (448 / amax)` in code 88."""
    weight = torch.tensor([[value, amax]])
    module = layer("FP8", weight)
    _, tensors = stored(module)
    assert float(tensors["weight"][0, 0].abs()) == 88.0
    assert torch.equal(tensors["weight"].float() * (amax / 448.0), module.weight_quantizer(weight).detach())


@pytest.mark.parametrize(
    ("algorithm", "what"),
    [
        pytest.param(algorithm, what, marks=[installed.fp8_zeros] if algorithm == "FP8" and is_zero else [])
        for algorithm in ALGORITHMS
        for what, is_zero in [("matrix", True), ("row", False), ("block", False), ("almost zero", True)]
    ],
)
def test_zeros_have_positive_scales_and_codes_of_zero(algorithm, what):
    from nemo.collections.llm.modelopt.quantization.export.layouts import modelopt

    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    part = {"row": (slice(2, 3),), "block": (slice(2, 3), slice(8, 16))}.get(what, (slice(None),))
    # modelopt treats an amax below 2^-24 as zero.
    weight[part] *= 1e-12 if what == "almost zero" else 0.0
    module = layer(algorithm, weight)
    _, tensors = stored(module)
    for name in ("weight_scale", "weight_scale_2", "input_scale"):
        if name in tensors:
            assert bool(torch.isfinite(tensors[name]).all() and (tensors[name] > 0).all()), name
    codes = modelopt.unpack(algorithm, tensors["weight"]).float()
    assert bool((codes[part] == 0).all()) and (what in ("matrix", "almost zero") or bool(codes.any()))
    assert bool(torch.isfinite(modelopt.decode(algorithm, tensors)).all())


@pytest.mark.parametrize("num_bits", [pytest.param(E4M3, marks=installed.fp8_zeros), 8])
def test_an_input_that_was_always_zero_is_quantized_as_in_memory(num_bits):
    from nemo.collections.llm.modelopt.quantization.export.layouts import inputs

    algorithm = "FP8" if num_bits == E4M3 else "W8A8_SQ_PER_CHANNEL"
    module = layer(algorithm, torch.randn(6, 32))
    module.input_quantizer = quantizer(num_bits, torch.tensor(0.0))
    _, tensors = stored(module)
    scale = tensors["input_scale"]
    assert scale.dim() == 0 and 0 < float(scale) < 1
    value = torch.randn(4, 32)
    torch.testing.assert_close(inputs.static_quantizer(algorithm, scale)(value), module.input_quantizer(value))


# --- what modelopt's own writer encodes ------------------------------------------------------------------------------


def nvfp4(weight: torch.Tensor) -> torch.nn.Linear:
    """Return a layer that modelopt converted to NVFP4 and calibrated."""
    import modelopt.torch.quantization as mtq

    from nemo.collections.llm.modelopt.quantization import quant_cfg_entries

    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=True)
    module.weight = torch.nn.Parameter(weight)
    model = torch.nn.Sequential(module)
    config = {
        "quant_cfg": {
            "*weight_quantizer": {
                "num_bits": (2, 1),
                "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": E4M3},
                "enable": True,
            },
            "default": {"enable": False},
        },
        "algorithm": "max",
    }
    # The kernel needs CUDA, calibration does not.
    mtq.quantize(model, quant_cfg_entries.native(config, "nvfp4"), None)
    model[0].weight_quantizer.amax = weight.abs().amax()
    return model[0]


def stored_nvfp4(module, dtype) -> dict[str, torch.Tensor]:
    """Return what is stored for a layer."""
    from nemo.collections.llm.modelopt.quantization.export.layouts import layer as layers
    from nemo.collections.llm.modelopt.quantization.export.layouts import modelopt

    found = layers.read(module)
    assert found is not None and found.algorithm == "W4A16_NVFP4"  # its inputs are not quantized
    return modelopt.tensors(dataclasses.replace(found, codes=layers.codes_of(module, found)), dtype)


def nvfp4_in_memory(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as modelopt's kernel for NVFP4 rounds it: to the nearest code, ties to even."""
    second = weight.abs().amax() / (6.0 * 448.0)
    blocks = weight.view(-1, 16)
    scale = (blocks.abs().amax(1, keepdim=True) / (6.0 * second)).to(torch.float8_e4m3fn).float() * second
    # The kernel does not quantize blocks whose scale is zero; all their values round to zero.
    scaled = blocks.abs() / torch.where(scale > 0, scale, 1.0)
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    distance = (scaled[..., None] - values).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    even = torch.arange(8) % 2 == 0
    choice = torch.where((nearest & even).any(-1), (nearest & even).int().argmax(-1), nearest.int().argmax(-1))
    return (values[choice] * scale * blocks.sign()).view(weight.shape)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), rounded=st.booleans(), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_nvfp4_codes_are_those_of_the_quantizer(seed, rounded, dtype):
    from nemo.collections.llm.modelopt.quantization.export.layouts import modelopt

    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
    weight = weight.bfloat16().float() if rounded else weight
    tensors = stored_nvfp4(nvfp4(weight), dtype)
    torch.testing.assert_close(modelopt.decode("NVFP4", tensors), nvfp4_in_memory(weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize("what", ["matrix", "block", "almost zero block"])
def test_nvfp4_of_zeros_has_positive_scales(what):
    from nemo.collections.llm.modelopt.quantization.export.layouts import modelopt

    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    part = (slice(None),) if what == "matrix" else (slice(1, 2), slice(16, 32))
    # The scale of a block is FP8; next to large blocks, that of a block of tiny values rounds to zero.
    weight[part] *= 1e-7 if what == "almost zero block" else 0.0
    module = nvfp4(weight)
    before = module.weight_quantizer.amax.clone()
    tensors = stored_nvfp4(module, torch.bfloat16)
    for name in ("weight_scale", "weight_scale_2"):
        value = tensors[name].float()
        assert bool(torch.isfinite(value).all() and (value > 0).all()), name
    decoded = modelopt.decode("NVFP4", tensors)
    assert bool((decoded[part] == 0).all()) and (what == "matrix" or bool(decoded.any()))
    assert torch.equal(module.weight_quantizer.amax, before)


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param(name, marks=[installed.fp8_zeros] if name in ("fp8", "w4a8_awq") else [])
        for name in jobs_hf.ALGORITHMS
    ],
)
def test_a_model_with_zeros_is_exported_and_verified(ranks, tmp_path, algorithm):
    """With a matrix, a row and a block of zeros, the check of codes, scales and logits accepts the files."""
    (found,) = ranks(1).run(export_with_zeros, str(tmp_path), algorithm)
    assert isinstance(found, float) and found < 1e-5, found

"""Simulated block formats: the values of modelopt's packers bit for bit, modelopt's gradient, and whole models."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_modelopt_dropin.cpu_backend import block_formats
from test_code.support import installed, jobs_quant, jobs_scales

pytestmark = pytest.mark.cpu

NVFP4, MXFP8, MXFP4 = ((2, 1), (4, 3)), ((4, 3), (8, 0)), ((2, 1), (8, 0))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Every tie between two neighbouring FP4 numbers, and the numbers themselves.
FP4 = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 0.0, 5.999]
ALGORITHMS = ("nvfp4", "nvfp4_awq", "w4a16_nvfp4", "mxfp8")


def packed_nvfp4(values: torch.Tensor, block: int, amax: torch.Tensor) -> torch.Tensor:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    second = amax.float() / (6.0 * 448.0)
    codes, scale, second = NVFP4QTensor.quantize(values.clone(), block, weights_scaling_factor_2=second)
    return codes.dequantize(scale=scale, double_scale=second, block_sizes={-1: block})


def packed_mxfp8(values: torch.Tensor, block: int, amax: torch.Tensor) -> torch.Tensor:
    # modelopt 0.37 has no packer for it.
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor.mxfp8_tensor")
    codes, scale = qtensor.MXFP8QTensor.quantize(values)
    return codes.dequantize(scale=scale)


def packed_mxfp4(values: torch.Tensor, block: int, amax: torch.Tensor) -> torch.Tensor:
    from modelopt.torch.quantization.qtensor import MXFP4QTensor

    codes, scale = MXFP4QTensor.quantize(values, block)
    return codes.dequantize(scale=scale, block_sizes={-1: block})


PACKERS = {NVFP4: (16, packed_nvfp4), MXFP8: (32, packed_mxfp8), MXFP4: (32, packed_mxfp4)}


def assert_as_packed(values: torch.Tensor, kind) -> None:
    block, packer = PACKERS[kind]
    amax = values.abs().amax()
    found = block_formats.quantized(values, block, amax, *kind)
    assert found.dtype == values.dtype
    expected = packer(values, block, amax)
    if kind == NVFP4:
        # A block whose scale is rounded to zero is zero, as on a GPU and in our files; 0.47's packer keeps a part.
        largest = values.float().unflatten(-1, (-1, block)).abs().amax(dim=-1, keepdim=True)
        share = (largest / amax.float() * 448).nan_to_num().to(torch.float8_e4m3fn).float()
        lost = ((share == 0) & (largest > 0)).expand(-1, -1, block).flatten(-2)
        assert not found[lost].any()
        expected = expected.masked_fill(lost, 0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", PACKERS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES), spread=st.sampled_from([0.0, 1.0, 3.0]))
def test_random_values_are_those_of_modelopts_packers(cpu_backend, kind, seed, dtype, spread):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(6, 64, generator=generator) * 10 ** (spread * torch.randn(6, 4, generator=generator)).repeat(
        1, 16
    )
    if dtype == torch.float16:
        values = values.clamp(-6e4, 6e4)
    assert_as_packed(values.to(dtype), kind)


@pytest.mark.parametrize("kind", PACKERS)
@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.sampled_from([*FP4, *(-x for x in FP4)]), min_size=64, max_size=64),
    power=st.integers(-8, 8),
    dtype=st.sampled_from(DTYPES),
)
def test_ties_are_those_of_modelopts_packers(cpu_backend, kind, numbers, power, dtype):
    values = torch.tensor(numbers).reshape(2, 32)
    # The largest value of each block makes its scale a power of two, so the ties stay ties.
    values[:, ::16] = 6.0
    values = torch.cat([values, torch.full((1, 32), 6.0 * 448.0)])
    assert_as_packed((values * 2.0**power if dtype != torch.float16 else values).to(dtype), kind)


@pytest.mark.parametrize("kind", PACKERS)
def test_zeros_and_tiny_blocks_are_those_of_modelopts_packers(cpu_backend, kind):
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    values[0], values[1, :32], values[2, 32:] = 0.0, 0.0, values[2, 32:] * 1e-6
    assert_as_packed(values, kind)


def test_fp4_ties_go_to_the_even_code_and_in_mxfp4_towards_zero():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    ties = torch.cat([ties, -ties])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    lower = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    # With this amax the scale of the block is one.
    amax = torch.tensor(6.0)
    assert torch.equal(block_formats.quantized(ties, 16, amax, *NVFP4), torch.cat([even, -even]))
    assert torch.equal(block_formats.quantized(ties, 16, None, *MXFP4), torch.cat([lower, -lower]))


def test_what_the_packers_turn_into_nan():
    values = torch.full((1, 16), 100.0)
    # The calibration has seen at most 1, the largest number of the format with that amax.
    assert torch.equal(block_formats.quantized(values, 16, torch.tensor(1.0), *NVFP4), torch.ones(1, 16))
    for amax in (0.0, 1.0):
        assert not block_formats.quantized(torch.zeros(2, 32), 16, torch.tensor(amax), *NVFP4).any()
    tiny = block_formats.quantized(values, 16, torch.tensor(0.0), *NVFP4)
    assert bool(torch.isfinite(tiny).all()) and float(tiny.abs().max()) < 1e-30
    assert math.isnan(block_formats.quantized(torch.tensor([float("nan")] * 32), 32, None, *MXFP8)[0])


@pytest.mark.parametrize("kind", PACKERS)
def test_a_shorter_last_block_is_filled_with_zeros(kind):
    block, _ = PACKERS[kind]
    values = torch.randn(3, block + 5, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.functional.pad(values, (0, block - 5))
    amax = values.abs().amax()
    found = block_formats.quantized(values, block, amax, *kind)
    assert torch.equal(found, block_formats.quantized(whole, block, amax, *kind)[:, : block + 5])


def test_other_formats_are_not_simulated():
    assert block_formats.is_simulated([4, 3], [8, 0])
    for bits, scale in [(8, (8, 0)), ((3, 2), (8, 0)), ((4, 3), None), (4, (4, 3))]:
        assert not block_formats.is_simulated(bits, scale)
    with pytest.raises(ValueError, match=r"num_bits=8 with scale_bits=\(8, 0\) is not one of"):
        block_formats.quantized(torch.ones(1, 32), 32, None, 8, (8, 0))


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("straight", [True, False])
def test_modelopts_function_runs_on_the_cpu_with_its_gradient(cpu_backend, kind, straight):
    from modelopt.torch.quantization import tensor_quant

    block, _ = PACKERS[kind]
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    # MX formats have no amax.
    amax = torch.tensor(1.0) if kind == NVFP4 else None
    found = tensor_quant.dynamic_block_quant(values, block, amax, None, *kind, None, None, straight)
    assert torch.equal(found, block_formats.quantized(values.detach(), block, amax, *kind))
    upstream = torch.arange(256.0).reshape(4, 64)
    found.backward(upstream)
    clipped = kind == NVFP4 and not straight
    assert torch.equal(values.grad, torch.where(values.abs() <= 1.0, upstream, 0.0) if clipped else upstream)


@installed.since_0_43
def test_formats_that_are_not_simulated_go_to_modelopt(cpu_backend):
    from modelopt.torch.quantization import tensor_quant

    with pytest.raises(Exception, match="(?i)cuda"):
        tensor_quant.dynamic_block_quant(torch.ones(1, 32), 32, None, None, 8, (8, 0))


@pytest.fixture(scope="module")
def source(ranks_factory, tmp_path_factory):
    """Make the checkpoint of a tiny Llama with bf16 weights and grouped queries, and calibration texts."""
    folder = tmp_path_factory.mktemp("blocks")
    data = jobs_quant.corpus(folder / "text.jsonl")
    return ranks_factory(1).run(jobs_scales.import_family, str(folder), "llama")[0], data


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_models_are_quantized_and_compared_on_the_cpu(ranks, source, tmp_path, algorithm):
    checkpoint, data = source
    quant = {"calibration_dataset": data, "calibration_dataset_size": 8, "enable_kv_cache": False}
    export = {"report_path": str(tmp_path / "report")}
    seen = ranks(1).run(jobs_quant.ptq, checkpoint, str(tmp_path / "out"), algorithm, quant=quant, export=export)[0]
    report = seen["report"]
    # 2 layers of 4 linear layers of Megatron.
    expected = {"weight": 8} if algorithm == "w4a16_nvfp4" else {"weight": 8, "input": 8}
    assert {kind: report["quantizers"].get(kind) for kind in expected} == expected
    # What the formats leave of normally distributed weights.
    low, high = (30.5, 32.5) if algorithm == "mxfp8" else (19.5, 21.5)
    assert all(low < layer["weight_sqnr_db"] < high for layer in report["layers"]), report["layers"]
    # The model is random, so small differences of its inputs grow.
    assert 0.01 < report["relative_output_error"] < (0.2 if algorithm == "mxfp8" else 0.6)
    assert report["loss_after"] == pytest.approx(report["loss_before"], abs=0.2)
    assert (tmp_path / "report" / "report.html").is_file()

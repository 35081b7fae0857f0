"""Bytes, memory and time by formula: units, limits and laws that hold for every shape and format."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_modelopt_dropin.errors import ModelOptConfigError
from nemo_modelopt_dropin.fit import devices, files, formats, latency, limits, serving
from nemo_modelopt_dropin.fit.formats import Format
from nemo_modelopt_dropin.fit.serving import Load
from nemo_modelopt_dropin.preflight import algorithms
from test_code.fit.shapes import NAMES, any_format, any_shape, shape

BYTES = {"600MB": 600e6, "22GiB": 22 * 2**30, "1.5 GB": 1.5e9, "10kib": 10240, "7B": 7}


@pytest.mark.parametrize(("text", "amount"), BYTES.items())
def test_bytes_are_read(text, amount):
    found = limits.parse(limits.DISK, text)
    assert (found.value, found.relative) == (amount, False)
    assert found.resolved(original=1.0) == amount


@given(st.floats(0.001, 0.999))
def test_a_share_is_of_the_original(share):
    for kind in limits.KINDS:
        found = limits.parse(kind, f"{share:.6f}x")
        assert found.relative and found.resolved(200.0) == pytest.approx(200 * round(share, 6))


@pytest.mark.parametrize(("text", "seconds"), [("15ms", 0.015), ("200us", 2e-4), ("1.5s", 1.5)])
def test_times_are_read(text, seconds):
    assert limits.parse(limits.LATENCY, text).value == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("disk", "600", "number of bytes; use a number and a unit"),
        ("disk", "15ms", "number of bytes"),
        ("memory", "0GB", "number of bytes"),
        ("latency", "600MB", "time per token; use a number"),
        ("latency", "0ms", "time per token"),
        ("latency", "1.5x", "between 0x and 1x"),
        ("disk", "0x", "between 0x and 1x"),
    ],
)
def test_other_texts_raise_an_error(kind, text, message):
    with pytest.raises(ModelOptConfigError, match=message):
        limits.parse(kind, text)
    assert len(limits.problems({kind: text, "latency" if kind != "latency" else "disk": None})) == 1


@given(any_shape())
def test_a_model_in_16_bits_takes_two_bytes_a_parameter(any_shape):
    assert files.weight_bytes(any_shape, Format()) == 2 * any_shape.parameters


@given(any_shape(), any_format())
def test_scales_are_a_small_part_of_the_weights(any_shape, found):
    bits = {group: algorithms.weight_bits(found.algorithm(group)) for group in formats.GROUPS}
    linear = {group: files.layer_bytes(any_shape, Format(), group) / 2 for group in formats.GROUPS}
    expected = any_shape.num_layers * sum(linear[group] * bits[group] / 8 for group in formats.GROUPS)
    stored = files.weight_bytes(any_shape, found) - 2 * (any_shape.parameters - any_shape.linear_parameters)
    # Codes and 16-bit scales of blocks are in the table's bits; fp32 scales, factors of inputs and shapes come on top.
    assert expected * 0.99 <= stored <= expected * 1.1 + any_shape.num_layers * 5e4


@given(any_shape(), any_format(), any_format())
def test_disk_is_memory_and_a_header(any_shape, one, other):
    weights, disk = files.weight_bytes(any_shape, one), files.disk_bytes(any_shape, one, tokenizer=1000)
    text = disk - 1000 - files.header_bytes(any_shape, one) - weights
    assert 3000 < text < 5000 or one.is_mixed and text > 5000 / any_shape.num_layers
    same = files.weight_bytes(any_shape, one) < files.weight_bytes(any_shape, other)
    if same and any_shape.parameters > 10**8 and files.weight_bytes(any_shape, other) / weights > 1.1:
        assert disk < files.disk_bytes(any_shape, other, tokenizer=1000)


@given(any_shape(), any_format(), st.integers(1, 10**5), st.integers(1, 64))
def test_memory_grows_with_context_and_batch(any_shape, found, context, batch):
    one = serving.memory(any_shape, found, Load(context, batch)).parts
    more = serving.memory(any_shape, found, Load(2 * context, batch)).parts
    assert more["KV cache"] == 2 * one["KV cache"] and more["weights"] == one["weights"]
    assert one["activations"] <= more["activations"] <= 2 * one["activations"]
    assert serving.cache_bytes(any_shape, Load(context, batch), True) * 2 == serving.cache_bytes(
        any_shape, Load(context, batch)
    )


def test_the_cache_of_llama_3_8b_at_8192_tokens_is_1_gib():
    llama = shape(num_layers=32, num_query_groups=8, kv_channels=128)
    assert serving.cache_bytes(llama, Load(8192, 1)) == 2**30


@given(any_shape(), any_format(), st.integers(1, 512))
def test_a_larger_batch_takes_longer_but_less_for_each_sequence(any_shape, found, batch):
    device = devices.find("h100")
    one = latency.step_seconds(any_shape, found, Load(1024, batch), device)
    two = latency.step_seconds(any_shape, found, Load(1024, 2 * batch), device)
    assert one <= two <= 2 * one * (1 + 1e-9)


def test_a_single_sequence_is_bound_by_the_bytes_of_the_weights():
    found, device = shape(), devices.find("h100")
    expected = (files.weight_bytes(found, Format()) - 2 * found.vocab_size * found.hidden_size) / device.bandwidth
    # Norms are left out; the embedding is not read.
    assert latency.step_seconds(found, Format(), Load(1, 1), device) == pytest.approx(expected, rel=1e-3)


def test_a_large_batch_is_bound_by_arithmetic():
    found, device = shape(), devices.find("a100-80gb")
    load = Load(1, 10**5)
    in_fp8, plain = (latency.step_seconds(found, Format(name, name), load, device) for name in ("fp8", "no_quant"))
    assert in_fp8 == plain  # it has no FP8 units
    in_int8 = latency.step_seconds(found, Format("int8", "int8"), load, device)
    matrices = found.linear_parameters * 2 * load.batch / 312e12
    assert plain - in_int8 == pytest.approx(matrices / 2)


def test_experts_that_no_token_uses_are_not_read():
    moe, device = shape(experts=8), devices.find("h100")
    few, all_of_them = (
        latency.step_seconds(moe, Format(), Load(1, batch, experts_per_token=2), device) for batch in (1, 8)
    )
    assert few < 0.5 * all_of_them


@pytest.mark.parametrize("name", devices.DEVICES)
def test_devices_of_the_table_have_a_source_and_plausible_numbers(name):
    device = devices.find(name.upper())
    assert device.source and 1e11 < device.bandwidth < 1e13
    assert device.rate(devices.BF16) <= device.rate(devices.INT8)
    # The batch at which weights in 16 bits stop being the limit.
    assert 50 < device.rate(devices.BF16) / device.bandwidth < 500


def test_own_numbers_of_a_device_are_read():
    found = devices.find("bandwidth=2e11, bf16=3e12, int8=6e12, overhead=1e-5")
    assert (found.bandwidth, found.rate(devices.BF16), found.rate(devices.INT8)) == (2e11, 3e12, 6e12)
    assert found.rate(devices.FP8) == 3e12 and found.overhead == 1e-5


@pytest.mark.parametrize("text", ["h1000", "bandwidth=2e11", "bandwidth=0,bf16=1", "speed=1"])
def test_other_devices_raise_an_error(text):
    with pytest.raises(ModelOptConfigError, match=r"is not in the table.*use one of b200.*your own numbers"):
        devices.find(text)


def test_mixtures_are_what_one_quantization_can_produce():
    pairs = {(one.attention, one.mlp) for one in formats.mixtures(("no_quant", "fp8", "int4", "int4_awq"))}
    assert ("fp8", "int4") in pairs and ("no_quant", "int4_awq") in pairs
    assert ("fp8", "int4_awq") not in pairs  # AWQ scales the inputs of all layers
    assert "AWQ" in (formats.mixture_problem("nvfp4", "w4a8_awq") or "").upper()
    assert not any(one.fp8_cache for one in formats.mixtures(("no_quant",)))
    assert not any(one.fp8_cache for one in formats.mixtures(NAMES, cache=False))


def test_mixtures_keep_to_the_layout():
    assert formats.mixture_problem("fp8_wo", "fp8", "compressed-tensors") is None
    assert "modelopt" in (formats.mixture_problem("fp8_wo", "fp8", "modelopt") or "")

"""Compute the time per token by a roofline: each part of a layer takes the longer of moving its bytes and computing.

Source of the model: Williams, Waterman and Patterson, "Roofline", CACM 52 (2009). A step generates one token of each
sequence of the batch. It reads all weights once and the keys and values of all sequences.
"""

from __future__ import annotations

from dataclasses import replace

from nemo_modelopt_dropin.fit import devices, files, serving
from nemo_modelopt_dropin.fit.devices import Device
from nemo_modelopt_dropin.fit.formats import ATTENTION, MLP, Format
from nemo_modelopt_dropin.fit.serving import Load
from nemo_modelopt_dropin.preflight import algorithms
from nemo_modelopt_dropin.preflight.model_sizes import Shape

_ARITHMETIC = {"FP8": devices.FP8, "MXFP8": devices.FP8, "INT8": devices.INT8, "NVFP4": devices.FP4}


def arithmetic(algorithm: str) -> str:
    """Return the format in which the matrix products of an algorithm are computed."""
    entry = algorithms.TABLE.get(algorithm)
    return devices.BF16 if entry is None else _ARITHMETIC.get(entry.activations.split()[0], devices.BF16)


def step_seconds(
    shape: Shape,
    found: Format,
    load: Load,
    device: Device,
    layout: str = algorithms.AUTO,
    width: float = 1.0,
) -> float:
    """Return the seconds of one decoding step of the whole batch, with full contexts.

    Args:
        shape: The sizes of the model.
        found: Its format.
        load: Context and batch.
        device: The device.
        layout: Layout of the Hugging Face files.
        width: Factor of the bytes of weights and cache, such as 2 for a model in fp32.
    """
    parts = [_matrices(shape, found, group, load, device, layout, width) for group in (ATTENTION, MLP)]
    parts.append(_attention(shape, found, load, device, width))
    head = shape.hidden_size * shape.vocab_size
    output = max(2 * width * head / device.bandwidth, 2 * load.batch * head / device.rate(devices.BF16))
    return shape.num_layers * (sum(parts) + device.overhead) + output


def _matrices(shape: Shape, found: Format, group: str, load: Load, device: Device, layout: str, width: float) -> float:
    """Return the seconds of the matrices of one group in one layer."""
    moved = width * files.layer_bytes(_read_by(shape, load), found, group, layout)
    used = replace(shape, experts=max(1, load.experts_per_token)) if shape.experts else shape
    numbers = sum(m.count * m.outputs * m.inputs for m in files.matrices(used) if m.group == group)
    return max(moved / device.bandwidth, 2 * load.batch * numbers / device.rate(arithmetic(found.algorithm(group))))


def _read_by(shape: Shape, load: Load) -> Shape:
    """Return the shape with the experts that a batch reads at most."""
    if not shape.experts:
        return shape
    return replace(shape, experts=min(shape.experts, load.batch * max(1, load.experts_per_token)))


def _attention(shape: Shape, found: Format, load: Load, device: Device, width: float) -> float:
    """Return the seconds of the products with keys and values in one layer."""
    one = replace(shape, num_layers=1)
    moved = width * serving.cache_bytes(one, load, found.fp8_cache) / device.bandwidth
    products = 4 * load.batch * load.context * shape.num_attention_heads * shape.kv_channels
    return max(moved, products / device.rate(devices.BF16))

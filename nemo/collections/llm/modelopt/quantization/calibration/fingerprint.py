"""Fingerprints of what a calibrated state depends on: settings, data, parallel layout and weights."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

import modelopt
from nemo_modelopt_dropin.preflight import data_files

from . import sources

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20
_VALUE_WIDTH = 80
# Named first among differences: others follow from it.
_VERSION = "nvidia-modelopt"


def settings_of(config: Any, quant_cfg: dict[str, Any], formats: dict[str, Any], own_loop: bool) -> dict[str, Any]:
    """Return the part of the fingerprint that depends on the settings.

    Args:
        config: The QuantizationConfig.
        quant_cfg: The quant_cfg for this model; it is copied.
        formats: The formats that mixed precision chooses from, else empty.
        own_loop: Whether a forward loop of the caller calibrates.
    """
    found: dict[str, Any] = {"algorithm": config.algorithm, "quant_cfg": copy.deepcopy(quant_cfg)}
    if formats:
        found["auto_quantize_bits"] = config.auto_quantize_bits
        found["auto_quantize_formats"] = copy.deepcopy(formats)
    if own_loop:
        return {**found, "calibration": "a forward_loop of the caller"}
    names = ("dataset_size", "batch_size", "seq_len", "column", "shuffle_seed")
    data = {f"calibration_{name}": getattr(config, f"calibration_{name}") for name in names}
    data |= {name: getattr(config, name) for name in ("packed", "comparison_size")}
    source = config.calibration_dataset
    return {**found, "calibration_dataset": sources.label(source), "calibration_content": _content(source), **data}


def _content(source: Any) -> Any:
    """Return what identifies the content of calibration data; None for a stream, which can be read only once.

    For local files this is the size and the checksum of the beginning of each file.
    """
    if isinstance(source, (list, tuple)):
        checked = 0
        for row in source:
            checked = zlib.crc32(repr(row).encode(), checked)
        return f"{len(source)} rows, checksum {checked:08x}"
    if not isinstance(source, (str, Path)):
        # A datasets.Dataset has a fingerprint of its own.
        return getattr(source, "_fingerprint", None)
    if str(source) in sources.HUB_DATASETS:
        return None
    try:
        files = data_files.expand(str(source))
    except data_files.DataFileError:
        return None
    found = {}
    for file in files:
        with open(file, "rb") as opened:
            found[str(file)] = f"{file.stat().st_size} bytes, checksum {zlib.crc32(opened.read(_CHUNK)):08x}"
    return found


def layout() -> dict[str, Any]:
    """Return the versions and parallel sizes that a state depends on; data-parallel ranks share a state."""
    return {
        _VERSION: modelopt.__version__,
        "tensor parallel size": size("tensor"),
        "pipeline parallel size": size("pipeline"),
        "expert parallel size": size("expert"),
    }


def size(kind: str) -> int:
    """Return a parallel size, "tensor", "pipeline" or "expert"."""
    if not parallel_state.model_parallel_is_initialized():
        return 1
    return getattr(parallel_state, f"get_{kind}_model_parallel_world_size")()


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> int:
    """Return a number that depends on every bit and its position, and not on the device.

    The bits are weighted by odd numbers and added in 64-bit integers, which wrap around: unlike with floats, the order
    of the additions does not matter.
    """
    bits = tensor.detach().reshape(-1)
    bits = bits.view(_INTEGERS[bits.element_size()])
    total = 0
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start, start + part.numel(), device=part.device).mul_(2).add_(1)
        total += int((part * places).sum())
    return total % (1 << 64)


def describe_model(core: torch.nn.Module) -> dict[str, str]:
    """Return the shape, dtype and checksum of each parameter of this rank, by name."""
    return {
        name: f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} checksum {checksum(value):016x}"
        for name, value in core.named_parameters()
    }


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return one line with both values for each entry in which two fingerprints differ."""
    first, second = dict(_flat(saved)), dict(_flat(now))
    absent = "absent"
    return [
        f"{name} was {_clipped(first.get(name, absent))}, now {_clipped(second.get(name, absent))}"
        for name in sorted(dict.fromkeys([*first, *second]), key=lambda name: name != _VERSION)
        if first.get(name, absent) != second.get(name, absent)
    ]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        if value and all(isinstance(entry, dict) and "quantizer_name" in entry for entry in value):
            yield from _flat(_by_quantizer(value), name)
        else:
            yield name, list(value)
    else:
        yield name, value


def _by_quantizer(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the entries of a quant_cfg (modelopt from 0.44) by the quantizers that they are for."""
    found: dict[str, Any] = {}
    for entry in entries:
        others = {field: value for field, value in entry.items() if field not in ("quantizer_name", "parent_class")}
        parent = entry.get("parent_class")
        label = entry["quantizer_name"] if parent is None else f"{parent}: {entry['quantizer_name']}"
        earlier = sum(known.partition(" (entry ")[0] == label for known in found)
        found[f"{label} (entry {earlier + 1})" if earlier else label] = others
    return found


def _clipped(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _VALUE_WIDTH else text[: _VALUE_WIDTH - 3] + "..."

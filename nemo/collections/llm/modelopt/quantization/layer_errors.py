"""Measure the quantization error of each layer, and what each group of layers costs the model.

The signal-to-quantization-noise ratio is ``10 log10(sum(x^2) / sum((x - Q(x))^2))`` decibels: 6 dB correspond to a bit.
Weights are compared as the quantizer receives them, after AWQ and SmoothQuant scaled them and, inversely, the inputs.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state

from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from nemo_modelopt_dropin.console import screen

from .. import _parallel
from . import quant_cfg_choices as choices

# The calls of each quantizer that are measured, one per micro-batch: all inputs of a layer are similar.
COMPARED_CALLS = 4
# The ratio of a quantizer that changes nothing.
_EXACT_DB = 200.0
_GROUP = re.compile(r"^(.*?layers\.\d+\.[^.]+)\.")

Sums = dict[str, torch.Tensor]


def _parts(quantizer: Any) -> list[Any]:
    return list(quantizer) if isinstance(quantizer, SequentialQuantizer) else [quantizer]


def enabled_quantizers(core: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and the quantizer of all enabled quantizers; a sequence counts as one."""
    for name, module in core.named_modules():
        inner = name.rpartition(".")[2].isdigit()
        is_quantizer = isinstance(module, (TensorQuantizer, SequentialQuantizer)) and not inner
        if is_quantizer and any(part.is_enabled for part in _parts(module)):
            yield name, module


def _sums(value: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """Return the sums of squares [2] of a value and of its error."""
    signal, noise = value.float(), value.float() - quantized.float()
    return torch.stack([torch.linalg.vector_norm(part).double().square() for part in (signal, noise)])


@contextlib.contextmanager
def recorded(core: torch.nn.Module, enabled: bool = True, calls: int = COMPARED_CALLS) -> Iterator[Sums]:
    """Return a dictionary that receives, within the context, the sums `[2]` of the activations' quantizers.

    Args:
        core: This rank's quantized Megatron-Core model.
        enabled: False records nothing.
        calls: The number of calls of each quantizer to record.
    """
    recorded_sums: Sums = {}
    left: dict[str, int] = {}
    hooks = []

    def watch(name: str) -> Callable:
        def hook(quantizer, arguments, output):
            parts = _parts(quantizer)
            if left[name] <= 0 or not any(part.is_enabled for part in parts) or not arguments[0].numel():
                return
            left[name] -= 1
            value, scale = arguments[0], getattr(parts[0], "pre_quant_scale", None)
            sums = _sums(value if scale is None else value * scale, output)
            recorded_sums[name] = recorded_sums[name] + sums if name in recorded_sums else sums

        return hook

    if enabled:
        for name, quantizer in enabled_quantizers(core):
            if not name.endswith("weight_quantizer"):
                left[name] = calls
                hooks.append(quantizer.register_forward_hook(watch(name)))
    try:
        yield recorded_sums
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def of_weights(core: torch.nn.Module) -> Sums:
    """Return the sums `[2]` of every weight quantizer, by its name."""
    found = {}
    quantizers = [found for found in enabled_quantizers(core) if found[0].endswith(".weight_quantizer")]
    for name, quantizer in screen.bar(quantizers, desc="Errors of the weights", unit="layer", delay=5.0):
        weight = getattr(core.get_submodule(name.rpartition(".")[0]), "weight", None)
        if isinstance(weight, torch.Tensor):
            found[name] = _sums(weight, quantizer(weight))
    return found


def format_of(quantizer: Any) -> str:
    """Return the number formats of a quantizer, such as "int4/128 + fp8" (INT4 in blocks of 128, then FP8)."""
    names = []
    for part in _parts(quantizer):
        bits, blocks = part.num_bits, (part.block_sizes or {}).get(-1)
        kind = "fp" if isinstance(bits, (tuple, list)) else "int"
        names.append(f"{kind}{choices.bits_of(bits)}" + (f"/{blocks}" if blocks else ""))
    return " + ".join(names)


def decibels(signal: float, noise: float) -> float | None:
    """Return the ratio in dB; None if there was no signal."""
    if signal <= 0:
        return None
    return _EXACT_DB if noise <= 0 else round(min(_EXACT_DB, 10 * math.log10(signal / noise)), 2)


def table(core: torch.nn.Module, activations: Sums) -> list[dict[str, Any]]:
    """Return a row for each quantized layer of all pipeline stages, worst first; all ranks must call it.

    Args:
        core: This rank's quantized Megatron-Core model.
        activations: What `recorded` returned; empty if nothing ran.
    """
    sums = {**of_weights(core), **activations}
    names = sorted(name for name, _ in enabled_quantizers(core))
    device = _parallel.device_of(core)
    nothing = torch.zeros(2, dtype=torch.float64, device=device)
    stacked = torch.stack([sums.get(name, nothing).to(device) for name in names] or [nothing])
    if parallel_state.model_parallel_is_initialized():
        # For inputs that are whole on each rank, signal and noise grow by the same factor.
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(stacked, group=group)
    entries = []
    for name, (signal, noise) in zip(names, stacked.tolist(), strict=False):
        layer, _, leaf = _parallel.global_name(core, name).rpartition(".")
        entries.append((layer, leaf, format_of(core.get_submodule(name)), signal, noise))
    if parallel_state.model_parallel_is_initialized():
        stages = _parallel.gather_objects(entries, parallel_state.get_pipeline_model_parallel_group())
        entries = [entry for stage in stages for entry in stage]
    return _rows(entries)


def _rows(entries: list[tuple]) -> list[dict[str, Any]]:
    """Return the rows of the layers in entries (layer, quantizer, format, signal, noise)."""
    rows: dict[str, dict[str, Any]] = {}
    totals: dict[tuple[str, str], list[float]] = {}
    for layer, leaf, fmt, signal, noise in entries:
        kind = "weight" if leaf == "weight_quantizer" else "activation"
        row = rows.setdefault(layer, {"layer": layer})
        row.setdefault(f"{kind}_format", fmt)
        total = totals.setdefault((layer, kind), [0.0, 0.0])
        total[0] += signal
        total[1] += noise
    for (layer, kind), (signal, noise) in totals.items():
        ratio = decibels(signal, noise)
        if ratio is not None:
            rows[layer][f"{kind}_sqnr_db"] = ratio
    return sorted(rows.values(), key=_worst)


def _worst(row: dict[str, Any]) -> tuple[float, str]:
    return min((row[key] for key in ("weight_sqnr_db", "activation_sqnr_db") if key in row), default=math.inf), row[
        "layer"
    ]


def group_of(name: str) -> str:
    """Return the group of a quantizer: the attention or MLP of its layer, or the module it belongs to."""
    match = _GROUP.match(name)
    return match.group(1) if match else name.rpartition(".")[0]


def sensitivity(core: torch.nn.Module, measure: Callable[[str], dict[str, float]]) -> list[dict[str, Any]]:
    """Return what each group of layers costs if only it is quantized, worst first; all ranks must call it.

    The scales that calibration applies to inputs are kept, because the weights have the inverse scales.

    Args:
        core: This rank's quantized Megatron-Core model.
        measure: Runs the model and returns figures; it is called with the name of the group. The first figure decides
            the order.
    """
    own: dict[str, list[Any]] = {}
    for name, quantizer in enabled_quantizers(core):
        parts = [part for part in _parts(quantizer) if part.is_enabled]
        own.setdefault(group_of(_parallel.global_name(core, name)), []).extend(parts)
    groups = set(own)
    if torch.distributed.is_initialized():
        groups = set().union(*_parallel.gather_objects(groups))
    everything = [part for parts in own.values() for part in parts]
    rows = []
    try:
        for group in sorted(groups, key=_natural):
            for part in everything:
                part.disable_quant()
            for part in own.get(group, []):
                part.enable_quant()
            rows.append({"group": group, **measure(group)})
    finally:
        for part in everything:
            part.enable_quant()
    ranked = [key for key in (rows[0] if rows else {}) if key != "group"][:1]
    return sorted(rows, key=lambda row: [-row[key] for key in ranked])


def with_only(core: torch.nn.Module, wanted: Callable[[str], bool], measure: Callable[[], float]) -> float:
    """Return what a function measures while only some of the enabled quantizers quantize; see `sensitivity`.

    Args:
        core: This rank's quantized Megatron-Core model.
        wanted: Whether a quantizer quantizes, by its name.
        measure: Runs the model.
    """
    off = [
        part
        for name, quantizer in enabled_quantizers(core)
        if not wanted(name)
        for part in _parts(quantizer)
        if part.is_enabled
    ]
    for part in off:
        part.disable_quant()
    try:
        return measure()
    finally:
        for part in off:
            part.enable_quant()


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

"""Map short names of algorithms to modelopt's quant_cfg, and apply our options to it.

Every function returns or changes a copy: modelopt's presets are shared by the whole process and are never changed.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterator
from typing import Any

import modelopt.torch.quantization as mtq
from nemo_modelopt_dropin.cpu_backend import block_formats
from nemo_modelopt_dropin.preflight import algorithms

from . import _quant_cfg_own, quant_cfg_entries

QuantCfg = dict[str, Any]

# Bits of exponent and mantissa: FP8 E4M3 is the one float format that modelopt itself emulates without a CUDA kernel.
_E4M3 = (4, 3)


def get_quant_cfg_choices() -> dict[str, QuantCfg]:
    """Return a copy of the quant_cfg of each short name that the installed modelopt supports."""
    own = _quant_cfg_own.quant_cfgs(mtq)
    found = {
        short: getattr(mtq, entry.preset, None) if entry.preset else own.get(short)
        for short, entry in algorithms.TABLE.items()
    }
    return {short: copy.deepcopy(config) for short, config in found.items() if config}


def get_modelopt_presets() -> dict[str, QuantCfg]:
    """Return a copy of modelopt's presets by name, except those for the KV cache only."""
    names = getattr(mtq.config, "choices", ())
    found = {name: getattr(mtq, name, None) for name in sorted(names) if "_KV_" not in name}
    return {name: copy.deepcopy(config) for name, config in found.items() if isinstance(config, dict)}


def calibration_methods(quant_cfg: QuantCfg) -> tuple[str, ...]:
    """Return the names of a quant_cfg's calibration methods ("max", "smoothquant", "awq_lite" ...)."""
    algorithm = quant_cfg.get("algorithm")
    steps = algorithm if isinstance(algorithm, (list, tuple)) else [algorithm]
    names = (step.get("method") if isinstance(step, dict) else step for step in steps)
    return tuple(name for name in names if name)


def quantizer_settings(quant_cfg: QuantCfg) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (pattern, attributes) of every enabled quantizer setting, including those in lists.

    Of several settings with one pattern, the last counts.
    """
    listed = quant_cfg_entries.entries(quant_cfg)
    last = {(entry.wildcard, entry.module_class): entry for entry in listed}
    for entry in listed:
        if last[entry.wildcard, entry.module_class] is not entry:
            continue
        for attributes in entry.steps:
            if not entry.disables and "num_bits" in attributes and attributes.get("enable", True):
                yield entry.wildcard, attributes


def enabled_quantizers(quant_cfg: QuantCfg, module: str, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return the quantizers of a module that a quant_cfg will enable, with their attributes (of the first step).

    Args:
        quant_cfg: The quant_cfg; later patterns override earlier ones.
        module: The name of the module in the model.
        names: The names of the quantizers to check.
    """
    found: dict[str, dict[str, Any]] = {}
    known: dict[str, dict[str, Any]] = {}
    for entry in quant_cfg_entries.entries(quant_cfg):
        for name in names:
            # Entries for one class only are in presets to exclude classes that Megatron's models do not have.
            if entry.module_class is not None or not fnmatch.fnmatch(f"{module}.{name}", entry.wildcard):
                continue
            first = entry.steps[0] if entry.steps else known.get(name, {})
            known[name] = first
            if entry.disables or not first.get("enable", True):
                found.pop(name, None)
            elif "num_bits" in first:
                found[name] = first
    return found


def is_awq(quant_cfg: QuantCfg) -> bool:
    """Return whether an AWQ search is among the calibration methods (arXiv 2306.00978)."""
    return any(name.startswith("awq") for name in calibration_methods(quant_cfg))


def is_gptq(quant_cfg: QuantCfg) -> bool:
    """Return whether GPTQ is among the calibration methods (arXiv 2210.17323)."""
    return "gptq" in calibration_methods(quant_cfg)


def is_smoothquant(quant_cfg: QuantCfg) -> bool:
    """Return whether SmoothQuant is among the calibration methods (arXiv 2211.10438)."""
    return "smoothquant" in calibration_methods(quant_cfg)


def statistics_merge_over_ranks(quant_cfg: QuantCfg) -> bool:
    """Return whether data-parallel ranks may calibrate on different samples.

    The maximum over ranks, which modelopt computes, is the maximum over all data. Searches (AWQ, MSE, Hessian) minimize
    an error that each rank measures on its own: with different data the ranks would disagree.
    """
    return set(calibration_methods(quant_cfg)) <= {"max", "smoothquant"}


def needs_cuda(quant_cfg: QuantCfg) -> bool:
    """Return whether running the quantized model needs CUDA kernels.

    modelopt has CUDA kernels only for FP4, FP6 and blocks whose scales come from the data (``"type": "dynamic"``). The
    CPU backend simulates some of them, see `block_formats.is_simulated`; without CUDA it is always enabled.
    """
    for _, attributes in quantizer_settings(quant_cfg):
        bits = attributes["num_bits"]
        blocks = attributes.get("block_sizes") or {}
        is_dynamic = blocks.get("type") == "dynamic"
        if is_dynamic and block_formats.is_simulated(bits, blocks.get("scale_bits")):
            continue
        if is_dynamic or (isinstance(bits, (tuple, list)) and tuple(bits) != _E4M3):
            return True
    return False


def bits_of(num_bits: int | tuple[int, int]) -> int:
    """Return the width of a format: the bits of an integer, or sign, exponent and mantissa of a float."""
    return 1 + sum(num_bits) if isinstance(num_bits, (tuple, list)) else int(num_bits)


def weight_bits(quant_cfg: QuantCfg) -> float:
    """Return the bits of a weight as modelopt's search counts them: the fewest of all quantizers.

    They include the bits of the scales if the quant_cfg has ``effective_bits``, as presets of modelopt 0.47 have.
    """
    found = [
        attributes.get("effective_bits") or bits_of(attributes["num_bits"])
        for _, attributes in quantizer_settings(quant_cfg)
    ]
    return quant_cfg.get("effective_bits") or min(found, default=16)


def set_awq_block_size(quant_cfg: QuantCfg, block_size: int) -> None:
    """Set the block size of 4-bit integer weight quantizers, in place."""
    for pattern, attributes in quantizer_settings(quant_cfg):
        blocks = attributes.get("block_sizes")
        if "weight_quantizer" in pattern and attributes["num_bits"] == 4 and blocks and -1 in blocks:
            blocks[-1] = block_size


def set_smoothquant_alpha(quant_cfg: QuantCfg, alpha: float) -> None:
    """Set SmoothQuant's migration strength, in place, if the quant_cfg does not set it."""
    if quant_cfg.get("algorithm") == "smoothquant":
        quant_cfg["algorithm"] = {"method": "smoothquant", "alpha": alpha}


def enable_kv_cache(quant_cfg: QuantCfg, kv_cfg: QuantCfg) -> None:
    """Add the quantizers of the KV cache, in place; without other quantizers only the KV cache is quantized."""
    if "quant_cfg" not in quant_cfg:
        quant_cfg.update(quant_cfg_entries.disabled())
    quant_cfg_entries.extend(quant_cfg, kv_cfg)
    if not quant_cfg.get("algorithm"):
        quant_cfg["algorithm"] = "max"


def disable_kv_cache(quant_cfg: QuantCfg) -> None:
    """Remove the quantizers of the KV cache, in place."""
    quant_cfg_entries.keep(quant_cfg, lambda wildcard: "bmm_quantizer" not in wildcard)


def has_kv_cache(quant_cfg: QuantCfg) -> bool:
    """Return whether a quant_cfg quantizes the KV cache."""
    return any("bmm_quantizer" in pattern for pattern, _ in quantizer_settings(quant_cfg))

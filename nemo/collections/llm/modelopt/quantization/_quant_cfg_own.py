"""Build the quant_cfg of algorithms for which modelopt has no preset, from presets that it has."""

from __future__ import annotations

import copy
from typing import Any

from . import quant_cfg_entries

# Name of the algorithm to the preset whose weights it has.
_WEIGHT_ONLY = {"fp8_wo": "FP8_PER_CHANNEL_PER_TOKEN_CFG", "w4a16_nvfp4": "NVFP4_DEFAULT_CFG"}
_GPTQ = "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"


def quant_cfgs(mtq: Any) -> dict[str, dict[str, Any]]:
    """Return a new quant_cfg for each short name in the table of algorithms that has no preset.

    Args:
        mtq: ``modelopt.torch.quantization``; names whose base preset it lacks are left out.
    """
    bases = {name: getattr(mtq, preset, None) for name, preset in _WEIGHT_ONLY.items()}
    found = {name: _weight_only(base) for name, base in bases.items() if base is not None}
    if hasattr(getattr(mtq, "config", None), "GPTQCalibConfig"):
        found["gptq"] = {**copy.deepcopy(getattr(mtq, _GPTQ)), "algorithm": {"method": "gptq"}}
    return found


def _weight_only(preset: dict[str, Any]) -> dict[str, Any]:
    """Return a preset without the quantizers of inputs."""
    quant_cfg = copy.deepcopy(preset)
    quant_cfg_entries.add(quant_cfg, "*input_quantizer", {"enable": False})
    return {**quant_cfg, "algorithm": "max"}

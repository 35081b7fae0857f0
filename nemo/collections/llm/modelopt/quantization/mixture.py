"""Combine two algorithms in one quant_cfg: one for the attention, one for everything else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
from nemo_modelopt_dropin import files
from nemo_modelopt_dropin.fit import formats
from nemo_modelopt_dropin.preflight.algorithms import NO_QUANT

from ..errors import ModelOptConfigError
from . import _quant_cfg, quant_cfg_entries
from . import quant_cfg_choices as choices

_ATTENTION = "*self_attention*"
_OTHERS = "*mlp*"
_QUANTIZERS = ("weight_quantizer", "input_quantizer")


def quant_cfg(attention: str, mlp: str, awq_block_size: int = _quant_cfg.DEFAULT_AWQ_BLOCK_SIZE) -> dict[str, Any]:
    """Return a quant_cfg in which the linear layers of attention have another format than those of the MLPs.

    Args:
        attention: Algorithm of the attention, or "no_quant".
        mlp: Algorithm of the MLPs and experts, or "no_quant".
        awq_block_size: Weights that share an INT4 scale, for algorithms with this setting.

    Raises:
        ModelOptConfigError: If one quantization cannot produce this mixture.
    """
    problem = formats.mixture_problem(attention, mlp)
    if problem or attention == mlp:
        raise ModelOptConfigError(f"attention_algorithm={attention!r}, algorithm={mlp!r}: {problem or 'no mixture'}.")
    if mlp == NO_QUANT:
        found, part, other = _base(attention, awq_block_size), _OTHERS, NO_QUANT
    else:
        found, part, other = _base(mlp, awq_block_size), _ATTENTION, attention
    settings = _quantizers(_base(other, awq_block_size)) if other != NO_QUANT else {}
    for name in _QUANTIZERS:
        quant_cfg_entries.add(found, f"{part}{name}", settings.get(name, {"enable": False}))
    return found


def _base(algorithm: str, awq_block_size: int) -> dict[str, Any]:
    """Return the quant_cfg of an algorithm without the KV cache."""
    found, _ = _quant_cfg.base_quant_cfg(algorithm, choices.get_quant_cfg_choices(), lambda path: {})
    _quant_cfg.apply_method_options(found, algorithm, False, None, awq_block_size, None)
    choices.disable_kv_cache(found)
    return found


def _quantizers(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of the weights and inputs of any layer, by the name of the quantizer."""
    chosen = choices.enabled_quantizers(found, "decoder.layers.0.self_attention.linear_proj", _QUANTIZERS)
    return {name: {"enable": True, **copy.deepcopy(attributes)} for name, attributes in chosen.items()}


def write(path: Path, attention: str, mlp: str, awq_block_size: int, kv_cache: bool = False) -> Path:
    """Write the `quant_cfg` of a mixture as a file that `QuantizationConfig.algorithm` takes, and return its path.

    Args:
        path: The file.
        attention: See `quant_cfg`.
        mlp: See `quant_cfg`.
        awq_block_size: See `quant_cfg`.
        kv_cache: Whether the KV cache is in FP8.
    """
    found = quant_cfg(attention, mlp, awq_block_size)
    if kv_cache:
        choices.enable_kv_cache(found, mtq.FP8_KV_CFG)
    found["quant_cfg"] = json.loads(json.dumps(found["quant_cfg"]))
    files.write_json(path, found)
    return path

"""Build the quant_cfg from the PTQ settings, before any model is loaded."""

from __future__ import annotations

import copy
import fnmatch
import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

from nemo_modelopt_dropin.preflight import algorithms

from ..errors import ModelOptConfigError, one_of
from . import _quant_cfg_check, quant_cfg_entries
from . import quant_cfg_choices as choices
from ._checks import check_number

DEFAULT_AWQ_BLOCK_SIZE = 128
AUTO = "auto"


def base_quant_cfg(algorithm: str, presets: dict[str, Any], load: Callable) -> tuple[dict[str, Any], bool]:
    """Return a copy of the quant_cfg of an algorithm, and whether it comes from a file.

    A name has precedence over a file of the same name in the working directory.

    Args:
        algorithm: A short name, a preset of modelopt, or the path of a JSON file.
        presets: Short name to quant_cfg.
        load: Reads a JSON file.

    Raises:
        ModelOptConfigError: If it is none of the three, or the file has no "quant_cfg".
    """
    if algorithm == AUTO:
        return {**quant_cfg_entries.disabled(), "algorithm": AUTO}, False
    if algorithm in presets:
        # A preset of the user's own may have the form of another version.
        return _native(presets[algorithm], algorithm), False
    if os.path.isfile(algorithm):
        quant_cfg = load(algorithm)
        if not isinstance(quant_cfg.get("quant_cfg"), (dict, list)):
            raise ModelOptConfigError(
                f'{algorithm} has no object "quant_cfg" (patterns of quantizer names and their attributes) and no list '
                f"of its entries; its keys are {sorted(quant_cfg)}."
            )
        _quant_cfg_check.check(quant_cfg, algorithm)
        return _native(quant_cfg, algorithm), True
    own = choices.get_modelopt_presets()
    if algorithm in own:
        return _native(own[algorithm], algorithm), False
    _check_installed(algorithm)
    try:
        one_of("algorithm", algorithm, [None, AUTO, *presets, *own])
    except ModelOptConfigError as error:
        raise ModelOptConfigError(
            f"Unsupported quantization format: {algorithm}. {error} A path must name an existing JSON file."
        ) from None
    raise AssertionError("unreachable: the name is among the presets")


def _native(quant_cfg: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a copy in the form of the installed modelopt that quantizes what earlier versions would."""
    found = quant_cfg_entries.native(quant_cfg, where)
    if found.get("quant_cfg"):
        quant_cfg_entries.leave_as_before(found)
    return found


def _check_installed(name: str) -> None:
    """Check that the installed modelopt has the preset of an algorithm that is in the table but not among the choices.

    Raises:
        ModelOptConfigError: If it lacks the preset.
    """
    entry = algorithms.TABLE.get(name)
    if problem := algorithms.version_problem(name):
        raise ModelOptConfigError(f"Unsupported quantization format: {name}. {problem}.")
    if entry is not None:
        raise ModelOptConfigError(
            f"Unsupported quantization format: {name}. It needs the preset {entry.preset}, which nvidia-modelopt "
            f"{metadata.version('nvidia-modelopt')} does not have; install a later version."
        )


def is_file(algorithm: str, presets: dict[str, Any]) -> bool:
    """Return whether an algorithm is the path of a JSON file: any string that is not a known name."""
    known = {AUTO, *presets, *algorithms.TABLE, *choices.get_modelopt_presets()}
    return algorithm not in known


def planned_quant_cfgs(config: Any, presets: dict[str, Any], load: Callable) -> dict[str, dict[str, Any]]:
    """Return the quant_cfg of the configured algorithm by name; for "auto", of each format.

    Raises:
        ModelOptConfigError: For a name or combination that cannot work.
    """
    if config.algorithm == AUTO:
        return auto_formats(config, presets)
    for name in ("auto_quantize_bits", "auto_quantize_checkpoint"):
        if getattr(config, name) is not None:
            raise ModelOptConfigError(
                f'{name}={getattr(config, name)!r} needs algorithm="auto", not {config.algorithm!r}.'
            )
    if config.algorithm is None:
        return {}
    return {config.algorithm: base_quant_cfg(config.algorithm, presets, load)[0]}


def auto_formats(config: Any, presets: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the quant_cfg of each format that mixed precision chooses from, with our options applied.

    Raises:
        ModelOptConfigError: For a format or a number of bits that cannot work.
    """
    bits, names = config.auto_quantize_bits, config.auto_quantize_formats
    if bits is None:
        raise ModelOptConfigError('algorithm="auto" needs auto_quantize_bits: the average number of bits of a weight.')
    check_number("auto_quantize_bits", bits, 1, 16, integer=False)
    if isinstance(names, str) or not isinstance(names, (list, tuple)) or not names:
        raise ModelOptConfigError(f"auto_quantize_formats={names!r} must be a list of algorithms, at least one.")
    if len(set(names)) != len(names):
        raise ModelOptConfigError(f"auto_quantize_formats={list(names)} names a format twice.")
    own = choices.get_modelopt_presets()
    formats = {}
    for name in names:
        if name not in presets:
            _check_installed(name)
        one_of("auto_quantize_formats", name, [*presets, *own])
        quant_cfg = copy.deepcopy(presets.get(name) or own[name])
        apply_method_options(quant_cfg, name, False, None, config.awq_block_size, config.sq_alpha)
        choices.disable_kv_cache(quant_cfg)
        if not any(
            fnmatch.fnmatch("weight_quantizer", pattern) for pattern, _ in choices.quantizer_settings(quant_cfg)
        ):
            raise ModelOptConfigError(
                f"auto_quantize_formats: {name!r} quantizes only layers with certain names; use formats for any layer."
            )
        formats[name] = quant_cfg
    lowest = min(formats, key=lambda name: choices.weight_bits(formats[name]))
    if bits < choices.weight_bits(formats[lowest]):
        raise ModelOptConfigError(
            f"auto_quantize_bits={bits} cannot be reached: the smallest of auto_quantize_formats is {lowest!r} with "
            f"{choices.weight_bits(formats[lowest])} bits."
        )
    return formats


def quant_cfg_for(
    config: Any,
    decoder_type: str | None,
    presets: dict[str, Any],
    kv_formats: dict[str, str],
    load: Callable,
    mtq: Any,
    logging: Any,
) -> dict[str, Any]:
    """Return a new quant_cfg with all options of a QuantizationConfig applied, and log what becomes of the KV cache.

    Args:
        config: The QuantizationConfig, or a stand-in for one: options that it does not have are ignored.
        decoder_type: Model Optimizer's name for the model's decoder, None if it is unknown.
        presets: Short name to quant_cfg.
        kv_formats: Name of a KV-cache format to that of modelopt's preset.
        load: Reads a JSON file.
        mtq: ``modelopt.torch.quantization``, which has the presets of the KV cache.
        logging: NeMo's logger.
    """
    quant_cfg, from_file = base_quant_cfg(config.algorithm, presets, load)
    block_size, alpha = (_if_number(getattr(config, name, None)) for name in ("awq_block_size", "sq_alpha"))
    apply_method_options(quant_cfg, config.algorithm, from_file, decoder_type, block_size, alpha)
    enable = getattr(config, "enable_kv_cache", None) if from_file else config.enable_kv_cache
    with_kv_cache = wants_kv_cache(enable, config.algorithm, from_file, decoder_type)
    if with_kv_cache:
        choices.enable_kv_cache(quant_cfg, getattr(mtq, kv_formats[config.kv_cache_qformat]))
    elif with_kv_cache is False:
        choices.disable_kv_cache(quant_cfg)
    if with_kv_cache and enable is None:
        logging.warning("Enabled KV cache quantization but enable_kv_cache is None in quantization_config")
    elif with_kv_cache is not None:
        logging.info(f"{'Enabled' if with_kv_cache else 'Disabled'} KV cache quantization")
    if not from_file:
        # Llama 4's projection of image features is not quantized.
        quant_cfg_entries.add(quant_cfg, "vision_projection.*", {"enable": False})
    return quant_cfg


def _if_number(value: Any) -> Any:
    """Return a number; None for the attribute of a stand-in for the configuration."""
    return value if isinstance(value, (int, float)) else None


def apply_method_options(
    quant_cfg: dict[str, Any], algorithm: str, from_file: bool, decoder_type: str | None, awq_block_size, sq_alpha
) -> None:
    """Set the options of AWQ, GPTQ and SmoothQuant in a quant_cfg, in place.

    The block size or the alpha in a file is kept, unless the block size option differs from its default.
    """
    has_blocks = choices.is_awq(quant_cfg) or choices.is_gptq(quant_cfg)
    if has_blocks and awq_block_size and not (from_file and awq_block_size == DEFAULT_AWQ_BLOCK_SIZE):
        choices.set_awq_block_size(quant_cfg, awq_block_size)
    if algorithm == "w4a8_awq" and decoder_type in ("gemma", "mpt"):
        # On these models TensorRT-LLM overflows with scales from a fine search, so only alpha 0 and 1 are tried.
        quant_cfg["algorithm"] = {"method": "awq_lite", "alpha_step": 1}
    if choices.is_smoothquant(quant_cfg) and sq_alpha is not None:
        choices.set_smoothquant_alpha(quant_cfg, sq_alpha)


def wants_kv_cache(enable: bool | None, algorithm: str, from_file: bool, decoder_type: str | None) -> bool | None:
    """Return whether to quantize the KV cache; None keeps the quant_cfg of a file unchanged.

    It is quantized by default, except with INT8 methods and "gpt" decoders.
    """
    if enable is not None:
        return bool(enable)
    return None if from_file else "int8" not in algorithm.lower() and decoder_type != "gpt"

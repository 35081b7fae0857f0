"""Checks of the PTQ settings, and the quant_cfg they ask for: pure functions, before any model is loaded."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import modelopt.torch.quantization as mtq
from nemo.collections.llm.modelopt.errors import ModelOptConfigError, one_of
from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices

DEFAULT_AWQ_BLOCK_SIZE = 128


def base_quant_cfg(algorithm: str, presets: dict[str, Any], load: Callable) -> tuple[dict[str, Any], bool]:
    """Return a copy of the quant_cfg an algorithm names, and whether it comes from a file.

    A name wins over a file of the same name in the working directory.

    Args:
        algorithm: A short name, a preset of modelopt, or the path of a JSON file.
        presets: Short name to quant_cfg.
        load: Reads a JSON file.

    Raises:
        ModelOptConfigError: If it is none of the three, or the file has no "quant_cfg".
    """
    if algorithm in presets:
        return copy.deepcopy(presets[algorithm]), False
    if os.path.isfile(algorithm):
        quant_cfg = load(algorithm)
        if not isinstance(quant_cfg.get("quant_cfg"), dict):
            raise ModelOptConfigError(
                f'{algorithm} has no object "quant_cfg" (patterns of quantizer names and their attributes); '
                f"its keys are {sorted(quant_cfg)}."
            )
        quant_cfg.setdefault("algorithm", "max")
        return quant_cfg, True
    own = choices.get_modelopt_presets()
    if algorithm in own:
        return own[algorithm], False
    try:
        one_of("algorithm", algorithm, [None, *presets, *own])
    except ModelOptConfigError as error:
        raise ModelOptConfigError(
            f"Unsupported quantization format: {error} A path must name an existing JSON file."
        ) from None
    raise AssertionError("unreachable: the name is among the presets")


def apply_method_options(
    quant_cfg: dict[str, Any], algorithm: str, from_file: bool, decoder_type: str | None, awq_block_size, sq_alpha
) -> None:
    """Put the options of AWQ and SmoothQuant into a quant_cfg, in place.

    A file that states a block size or an alpha keeps it, unless the block size option was changed from its default.
    """
    if choices.is_awq(quant_cfg) and awq_block_size and not (from_file and awq_block_size == DEFAULT_AWQ_BLOCK_SIZE):
        choices.set_awq_block_size(quant_cfg, awq_block_size)
    if algorithm == "w4a8_awq" and decoder_type in ("gemma", "mpt"):
        # TensorRT-LLM overflows with a finely searched scale on these models: try only alpha 0 and 1.
        quant_cfg["algorithm"] = {"method": "awq_lite", "alpha_step": 1}
    if choices.is_smoothquant(quant_cfg):
        choices.set_smoothquant_alpha(quant_cfg, sq_alpha)


def wants_kv_cache(enable: bool | None, algorithm: str, from_file: bool, decoder_type: str | None) -> bool | None:
    """Return whether to quantize the KV cache; None leaves a file's quant_cfg as it is.

    By default it is on, except for INT8 methods and for "gpt" decoders.
    """
    if enable is not None:
        return bool(enable)
    return None if from_file else "int8" not in algorithm.lower() and decoder_type != "gpt"


def apply_kv_cache(quant_cfg: dict[str, Any], wanted: bool | None, preset: str) -> None:
    """Add the KV-cache quantizers of a modelopt preset, take them out, or leave all as it is (None)."""
    if wanted:
        choices.enable_kv_cache(quant_cfg, getattr(mtq, preset))
    elif wanted is False:
        choices.disable_kv_cache(quant_cfg)


def _check_number(name: str, value: Any, low: float, high: float = float("inf"), integer: bool = True) -> None:
    """Raise unless a number is in [low, high]."""
    right_type = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    if right_type and low <= value <= high:
        return
    kind = "an integer" if integer else "a number"
    limits = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
    raise ModelOptConfigError(f"{name}={value!r} must be {kind}, {limits}.")


def check_quantization(config: Any, kv_formats: dict[str, str]) -> None:
    """Raise for values of a QuantizationConfig that cannot work.

    Raises:
        ModelOptConfigError: Naming the field, its value and what is allowed.
    """
    if config.enable_kv_cache is not False and config.kv_cache_qformat not in kv_formats:
        raise ModelOptConfigError(
            f"Unsupported kv cache quantization format: kv_cache_qformat={config.kv_cache_qformat!r}; "
            f"allowed: {sorted(kv_formats)}, or enable_kv_cache=False."
        )
    _check_number("awq_block_size", config.awq_block_size or 0, 0)
    _check_number("sq_alpha", config.sq_alpha, 0.0, 1.0, integer=False)
    _check_number("calibration_dataset_size", config.calibration_dataset_size, 1)
    _check_number("calibration_batch_size", config.calibration_batch_size, 1)
    _check_number("calibration_seq_len", config.calibration_seq_len, 2)
    _check_number("comparison_size", config.comparison_size, 0)


def check_export(config: Any, formats: list, dtypes: list) -> None:
    """Raise for values of an ExportConfig that cannot work.

    Raises:
        ModelOptConfigError: Naming the field, its value and what is allowed.
    """
    if config.export_format not in formats:
        try:
            one_of("export_format", config.export_format, formats)
        except ModelOptConfigError as error:
            raise ModelOptConfigError(f"Unsupported export format: {error}") from None
    if config.dtype not in dtypes:
        raise ModelOptConfigError(f"Unsupported export dtype: dtype={config.dtype!r}; allowed: {dtypes}.")
    one_of("verify", config.verify, ["full", "files", "none"])
    _check_number("inference_tp", config.inference_tp, 1)
    _check_number("inference_pp", config.inference_pp, 1)

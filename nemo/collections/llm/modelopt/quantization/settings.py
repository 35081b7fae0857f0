"""Checks of the PTQ settings, and the quant_cfg they ask for: pure functions, before any model is loaded."""

from __future__ import annotations

import copy
import fnmatch
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo.utils.get_rank import is_global_rank_zero

import modelopt.torch.quantization as mtq
from nemo.collections.llm.modelopt.errors import ModelOptConfigError, one_of
from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices

DEFAULT_AWQ_BLOCK_SIZE = 128
AUTO = "auto"


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
    if algorithm == AUTO:
        return {"quant_cfg": {"default": {"enable": False}}, "algorithm": AUTO}, False
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
        one_of("algorithm", algorithm, [None, AUTO, *presets, *own])
    except ModelOptConfigError as error:
        raise ModelOptConfigError(
            f"Unsupported quantization format: {error} A path must name an existing JSON file."
        ) from None
    raise AssertionError("unreachable: the name is among the presets")


def is_file(algorithm: str, presets: dict[str, Any]) -> bool:
    """Return whether an algorithm is the path of a JSON file: any name that is not taken."""
    return algorithm != AUTO and algorithm not in presets and algorithm not in choices.get_modelopt_presets()


def planned_quant_cfgs(config: Any, presets: dict[str, Any], load: Callable) -> dict[str, dict[str, Any]]:
    """Return the quant_cfg that a configuration asks for by its name, those of all formats for "auto".

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
    """Return the quant_cfg of each format among which mixed precision chooses, with our options applied.

    Raises:
        ModelOptConfigError: For a format or a number of bits that cannot work.
    """
    bits, names = config.auto_quantize_bits, config.auto_quantize_formats
    if bits is None:
        raise ModelOptConfigError('algorithm="auto" needs auto_quantize_bits: the bits of a weight on average.')
    _check_number("auto_quantize_bits", bits, 1, 16, integer=False)
    if isinstance(names, str) or not isinstance(names, (list, tuple)) or not names:
        raise ModelOptConfigError(f"auto_quantize_formats={names!r} must be a list of algorithms, at least one.")
    if len(set(names)) != len(names):
        raise ModelOptConfigError(f"auto_quantize_formats={list(names)} names a format twice.")
    own = choices.get_modelopt_presets()
    found = {}
    for name in names:
        one_of("auto_quantize_formats", name, [*presets, *own])
        quant_cfg = copy.deepcopy(presets.get(name) or own[name])
        apply_method_options(quant_cfg, name, False, None, config.awq_block_size, config.sq_alpha)
        choices.disable_kv_cache(quant_cfg)
        if not any(
            fnmatch.fnmatch("weight_quantizer", pattern) for pattern, _ in choices.quantizer_settings(quant_cfg)
        ):
            raise ModelOptConfigError(
                f"auto_quantize_formats: {name!r} quantizes layers of certain names only; give formats for any layer."
            )
        found[name] = quant_cfg
    lowest = min(found, key=lambda name: choices.weight_bits(found[name]))
    if bits < choices.weight_bits(found[lowest]):
        raise ModelOptConfigError(
            f"auto_quantize_bits={bits} cannot be reached: the smallest of auto_quantize_formats is {lowest!r} with "
            f"{choices.weight_bits(found[lowest])} bits."
        )
    return found


def quant_cfg_for(
    config: Any, decoder_type: str | None, presets: dict[str, Any], kv_formats: dict[str, str], load: Callable
) -> dict[str, Any]:
    """Return the quant_cfg of a QuantizationConfig with all its options applied, a copy of its own.

    Args:
        config: The QuantizationConfig.
        decoder_type: modelopt's name of the model's decoder, None where it is not known.
        presets: Short name to quant_cfg.
        kv_formats: Name of a KV-cache format to that of modelopt's preset.
        load: Reads a JSON file.
    """
    assert config.algorithm is not None, "a model that is not quantized has no quant_cfg"
    quant_cfg, from_file = base_quant_cfg(config.algorithm, presets, load)
    apply_method_options(quant_cfg, config.algorithm, from_file, decoder_type, config.awq_block_size, config.sq_alpha)
    kv_wanted = wants_kv_cache(config.enable_kv_cache, config.algorithm, from_file, decoder_type)
    apply_kv_cache(quant_cfg, kv_wanted, kv_formats[config.kv_cache_qformat])
    if not from_file:
        # Llama 4's projection of image features stays as it is.
        quant_cfg["quant_cfg"]["vision_projection.*"] = {"enable": False}
    return quant_cfg


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
    _check_number("comparison_tokens", config.comparison_tokens, 2)
    if config.sensitivity_scan and not config.comparison_size:
        raise ModelOptConfigError("sensitivity_scan=True compares on held-out rows: comparison_size=0 leaves none.")
    if config.calibration_shuffle_seed is not None:
        _check_number("calibration_shuffle_seed", config.calibration_shuffle_seed, 0)
    column = config.calibration_column
    if column is not None and not (isinstance(column, str) and column):
        raise ModelOptConfigError(f"calibration_column={column!r} must be the name of a column, or None.")


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
    check_writable(config.path)
    _check_number("inference_tp", config.inference_tp, 1)
    _check_number("inference_pp", config.inference_pp, 1)


def check_writable(path: Path) -> None:
    """Raise where no folder can be made at a path; a rank of another machine may see another file system.

    Raises:
        ModelOptConfigError: Naming what is in the way.
    """
    if not is_global_rank_zero():
        return
    place = Path(path).absolute()
    reason = f"{place} is a file" if place.is_file() else None
    place = place.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    if place.is_file():
        reason = f"{place} is a file"
    elif reason is None:
        try:
            # Permissions do not tell all: file systems may be read-only, or virtual.
            os.rmdir(tempfile.mkdtemp(prefix=".writable-", dir=place))
        except OSError as error:
            reason = f"{place} cannot be written to ({error.strerror})"
    if reason:
        raise ModelOptConfigError(f"path={str(path)!r}: {reason}; give an export path in a folder that can be written.")

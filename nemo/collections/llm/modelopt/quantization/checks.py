"""Checks of the PTQ settings, and the quant_cfg they ask for: pure functions, before any model is loaded."""

from __future__ import annotations

import copy
import fnmatch
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo.utils.get_rank import is_global_rank_zero

import modelopt.torch.quantization as mtq
from nemo.collections.llm.modelopt.errors import ModelOptConfigError, one_of
from nemo.collections.llm.modelopt.quantization import quant_cfg_check
from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices
from nemo.collections.llm.modelopt.quantization.config import ExportConfig, QuantizationConfig
from nemo_modelopt_dropin import files
from nemo_modelopt_dropin.preflight import output_checks

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
        quant_cfg_check.check(quant_cfg, algorithm)
        return quant_cfg, True
    own = choices.get_modelopt_presets()
    if algorithm in own:
        return own[algorithm], False
    try:
        one_of("algorithm", algorithm, [None, AUTO, *presets, *own])
    except ModelOptConfigError as error:
        raise ModelOptConfigError(
            f"Unsupported quantization format: {algorithm}. {error} A path must name an existing JSON file."
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
    config: Any,
    decoder_type: str | None,
    presets: dict[str, Any],
    kv_formats: dict[str, str],
    load: Callable,
    own_mtq: Any = mtq,
) -> tuple[dict[str, Any], bool | None]:
    """Return the quant_cfg of a QuantizationConfig with all its options applied, and whether it has a KV cache.

    The quant_cfg is a copy. The second is None for a file that is left as it is.

    Args:
        config: The QuantizationConfig, or a stand-in for one: the options that it does not have are left alone.
        decoder_type: modelopt's name of the model's decoder, None where it is not known.
        presets: Short name to quant_cfg.
        kv_formats: Name of a KV-cache format to that of modelopt's preset.
        load: Reads a JSON file.
        own_mtq: ``modelopt.torch.quantization``, which has the presets of the KV cache.
    """
    assert config.algorithm is not None, "a model that is not quantized has no quant_cfg"
    quant_cfg, from_file = base_quant_cfg(config.algorithm, presets, load)
    block_size, alpha = (_if_number(getattr(config, name, None)) for name in ("awq_block_size", "sq_alpha"))
    apply_method_options(quant_cfg, config.algorithm, from_file, decoder_type, block_size, alpha)
    enable = getattr(config, "enable_kv_cache", None) if from_file else config.enable_kv_cache
    kv_wanted = wants_kv_cache(enable, config.algorithm, from_file, decoder_type)
    if kv_wanted:
        choices.enable_kv_cache(quant_cfg, getattr(own_mtq, kv_formats[config.kv_cache_qformat]))
    elif kv_wanted is False:
        choices.disable_kv_cache(quant_cfg)
    if not from_file:
        # Llama 4's projection of image features stays as it is.
        quant_cfg["quant_cfg"]["vision_projection.*"] = {"enable": False}
    return quant_cfg, kv_wanted


def _if_number(value: Any) -> Any:
    """Return a number, and None for what a stand-in for the configuration answers."""
    return value if isinstance(value, (int, float)) else None


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
    if choices.is_smoothquant(quant_cfg) and sq_alpha is not None:
        choices.set_smoothquant_alpha(quant_cfg, sq_alpha)


def wants_kv_cache(enable: bool | None, algorithm: str, from_file: bool, decoder_type: str | None) -> bool | None:
    """Return whether to quantize the KV cache; None leaves a file's quant_cfg as it is.

    By default it is on, except for INT8 methods and for "gpt" decoders.
    """
    if enable is not None:
        return bool(enable)
    return None if from_file else "int8" not in algorithm.lower() and decoder_type != "gpt"


def is_complete(config: Any) -> bool:
    """Return whether this is one of our dataclasses; stand-ins for them have stock's fields, or fewer."""
    return issubclass(type(config), (QuantizationConfig, ExportConfig))


def check_read_by_stock(quantization: Any, exported: Any, kv_formats: dict[str, str], dtypes: list) -> None:
    """Raise for what stock's constructor checks, of a configuration or of a stand-in for one.

    Raises:
        ModelOptConfigError: Naming the field, its value and what is allowed.
    """
    if quantization.enable_kv_cache:
        _check_kv_format(quantization.kv_cache_qformat, kv_formats)
    if exported is not None and exported.dtype not in dtypes:
        raise ModelOptConfigError(
            f"Unsupported export dtype: {exported.dtype}. dtype={exported.dtype!r}; allowed: {dtypes}."
        )


def _check_kv_format(name: Any, kv_formats: dict[str, str]) -> None:
    if name not in kv_formats:
        raise ModelOptConfigError(
            f"Unsupported kv cache quantization format: {name}. kv_cache_qformat={name!r}; "
            f"allowed: {sorted(kv_formats)}, or enable_kv_cache=False."
        )


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
    if config.enable_kv_cache is not False:
        _check_kv_format(config.kv_cache_qformat, kv_formats)
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


def check_export(config: Any, formats: list) -> None:
    """Raise for values of an ExportConfig that cannot work.

    Raises:
        ModelOptConfigError: Naming the field, its value and what is allowed.
    """
    if config.export_format not in formats:
        try:
            one_of("export_format", config.export_format, formats)
        except ModelOptConfigError as error:
            raise ModelOptConfigError(f"Unsupported export format: {config.export_format}. {error}") from None
    one_of("verify", config.verify, ["full", "files", "none"])
    _check_number("inference_tp", config.inference_tp, 1)
    _check_number("inference_pp", config.inference_pp, 1)


def check_places(config: Any, export_config: Any) -> None:
    """Raise an error if a folder that is written holds something else, or is in the way of another.

    Args:
        config: The QuantizationConfig.
        export_config: The ExportConfig, or None.

    Raises:
        ModelOptConfigError: With what is there and what to do.
    """
    target, problems = {}, []
    if is_complete(export_config):
        target = {"path": str(export_config.path)}
        found = files.problem(Path(export_config.path), files.checkpoint(export_config.export_format))
        problems = [f"path: {found}"] if found else []
    if is_complete(config):
        state, search = config.calibration_state, config.auto_quantize_checkpoint
        problems += output_checks.state_problems("calibration_state", state, files.CALIBRATION_STATE, target)
        others = {**target, "calibration_state": state}
        problems += output_checks.nesting_problems("auto_quantize_checkpoint", search, others)
    if problems:
        raise ModelOptConfigError(f"{problems[0]}.")


def check_writable(path: Path) -> None:
    """Raise where no folder can be made at a path; a rank of another machine may see another file system.

    Raises:
        ModelOptConfigError: Naming what is in the way.
    """
    if not is_global_rank_zero():
        return
    folder = Path(path).absolute()
    # An existing folder is replaced as a whole, in its parent.
    reason = output_checks.unwritable(folder.parent if folder.is_dir() else folder)
    if reason:
        raise ModelOptConfigError(f"path={str(path)!r}: {reason}; give an export path in a folder that can be written.")

"""Check the PTQ settings before any model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo.utils.get_rank import is_global_rank_zero

from nemo_modelopt_dropin import files
from nemo_modelopt_dropin.preflight import algorithms, output_checks, shard_sizes

from ..errors import ModelOptConfigError, one_of
from .config import ExportConfig, QuantizationConfig


def is_complete(config: Any) -> bool:
    """Return whether this is one of our dataclasses; stand-ins for them may lack fields."""
    return issubclass(type(config), (QuantizationConfig, ExportConfig))


def check_read_by_stock(quantization: Any, exported: Any, kv_formats: dict[str, str], dtypes: list) -> None:
    """Check the fields that stock's constructor checks, of configurations or stand-ins for them.

    Raises:
        ModelOptConfigError: With the field, its value and what is allowed.
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


def check_number(name: str, value: Any, low: float, high: float = float("inf"), integer: bool = True) -> None:
    """Check that a value is a number in [low, high].

    Raises:
        ModelOptConfigError: With the setting, its value and what is allowed.
    """
    right_type = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    if right_type and low <= value <= high:
        return
    kind = "an integer" if integer else "a number"
    limits = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
    raise ModelOptConfigError(f"{name}={value!r} must be {kind}, {limits}.")


def check_quantization(config: Any, kv_formats: dict[str, str]) -> None:
    """Check the values of a QuantizationConfig.

    Raises:
        ModelOptConfigError: With the field, its value and what is allowed.
    """
    if config.enable_kv_cache is not False:
        _check_kv_format(config.kv_cache_qformat, kv_formats)
    check_number("awq_block_size", config.awq_block_size or 0, 0)
    check_number("sq_alpha", config.sq_alpha, 0.0, 1.0, integer=False)
    check_number("calibration_dataset_size", config.calibration_dataset_size, 1)
    check_number("calibration_batch_size", config.calibration_batch_size, 1)
    check_number("calibration_seq_len", config.calibration_seq_len, 2)
    check_number("comparison_size", config.comparison_size, 0)
    if config.comparison_tokens is not None:
        check_number("comparison_tokens", config.comparison_tokens, 2)
    if config.sensitivity_scan and not config.comparison_size:
        raise ModelOptConfigError("sensitivity_scan=True compares on held-out rows: comparison_size=0 leaves none.")
    if config.calibration_shuffle_seed is not None:
        check_number("calibration_shuffle_seed", config.calibration_shuffle_seed, 0)
    column = config.calibration_column
    if column is not None and not (isinstance(column, str) and column):
        raise ModelOptConfigError(f"calibration_column={column!r} must be the name of a column, or None.")


def check_export(config: Any, formats: list) -> None:
    """Check the values of an ExportConfig.

    Raises:
        ModelOptConfigError: With the field, its value and what is allowed.
    """
    if config.export_format not in formats:
        try:
            one_of("export_format", config.export_format, formats)
        except ModelOptConfigError as error:
            raise ModelOptConfigError(f"Unsupported export format: {config.export_format}. {error}") from None
    one_of("verify", config.verify, ["full", "files", "none"])
    check_files(config.hf_layout, config.max_shard_size)
    check_number("inference_tp", config.inference_tp, 1)
    check_number("inference_pp", config.inference_pp, 1)


def check_files(hf_layout: Any, max_shard_size: Any) -> None:
    """Check how the files of a Hugging Face checkpoint are to be written.

    Raises:
        ModelOptConfigError: With the setting, its value and what is allowed.
    """
    one_of("hf_layout", hf_layout, algorithms.LAYOUT_CHOICES)
    if problems := shard_sizes.problem("max_shard_size", max_shard_size):
        raise ModelOptConfigError(f"{problems[0]}.")


def check_places(config: Any, export_config: Any) -> None:
    """Check that the folders to be written hold nothing else, and do not lie inside each other.

    Args:
        config: The QuantizationConfig.
        export_config: The ExportConfig, or None.

    Raises:
        ModelOptConfigError: With the content of the folder and what to do.
    """
    target, problems = {}, []
    if is_complete(export_config):
        target = {"path": str(export_config.path)}
        problem = files.problem(Path(export_config.path), files.checkpoint(export_config.export_format))
        problems = [f"path: {problem}"] if problem else []
    if is_complete(config):
        state, search = config.calibration_state, config.auto_quantize_checkpoint
        problems += output_checks.state_problems("calibration_state", state, files.CALIBRATION_STATE, target)
        others = {**target, "calibration_state": state}
        problems += output_checks.nesting_problems("auto_quantize_checkpoint", search, others)
    if problems:
        raise ModelOptConfigError(f"{problems[0]}.")


def check_writable(path: Path) -> None:
    """Check on rank zero that a folder can be created; other ranks may have another file system.

    Raises:
        ModelOptConfigError: With the reason.
    """
    if not is_global_rank_zero():
        return
    folder = Path(path).absolute()
    # An existing folder is replaced as a whole, in its parent.
    reason = output_checks.unwritable(folder.parent if folder.is_dir() else folder)
    if reason:
        raise ModelOptConfigError(f"path={str(path)!r}: {reason}; use an export path in a folder that can be written.")

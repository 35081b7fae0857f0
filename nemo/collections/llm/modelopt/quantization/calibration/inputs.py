"""Checks of the calibration data and of the output folders, which look at the disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .. import _checks
from . import sources


def check(config: Any, export_config: Any) -> None:
    """Check the calibration data and the folders that will be written.

    Args:
        config: The QuantizationConfig, or a stand-in, which is not checked.
        export_config: The ExportConfig, or a stand-in, or None.

    Raises:
        ModelOptConfigError: If the data cannot be used, a folder cannot be written, or something would be overwritten.
    """
    if _checks.is_complete(config) and config.algorithm is not None:
        sources.check(config.calibration_dataset, config.calibration_column, config.calibration_dataset_size)
    if _checks.is_complete(export_config):
        _checks.check_writable(Path(export_config.path))
    _checks.check_places(config, export_config)


def made_by_ptq() -> bool:
    """Return whether NeMo's ``llm.ptq`` calls the constructor of the Quantizer, which calls this function.

    ``llm.ptq`` loads a model next, so the inputs are checked before. Other callers may pass names and paths that do
    not exist, as unit tests do: then the constructor does not look at the disk.
    """
    caller = sys._getframe(2)
    return caller.f_code.co_name == "ptq" and caller.f_globals.get("__name__") == "nemo.collections.llm.api"

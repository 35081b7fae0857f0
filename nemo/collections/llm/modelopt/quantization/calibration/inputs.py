"""When a Quantizer looks at its calibration data and at the place of its export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from nemo.collections.llm.modelopt.quantization import checks
from nemo.collections.llm.modelopt.quantization.calibration import sources


class InputChecks:
    """The checks on the disk: before `llm.ptq` loads a model, otherwise before a real model is quantized."""

    quantization_config: Any
    export_config: Any
    _inputs_checked = False

    def _check_inputs(self) -> None:
        """Look at the calibration data and at the folders that are written, once.

        Raises:
            ModelOptConfigError: If the data cannot be used, nothing can be written there, or something would be lost.
        """
        if self._inputs_checked:
            return
        config = self.quantization_config
        if checks.is_complete(config) and config.algorithm is not None:
            sources.check(config.calibration_dataset, config.calibration_column, config.calibration_dataset_size)
        if checks.is_complete(self.export_config):
            checks.check_writable(Path(self.export_config.path))
        checks.check_places(config, self.export_config)
        self._inputs_checked = True


def made_by_ptq() -> bool:
    """Return whether NeMo's ``llm.ptq`` makes the Quantizer: it loads a model next, so the inputs are checked before.

    Elsewhere a constructor leaves the disk alone: tests make Quantizers of names and paths that do not exist.
    """
    caller = sys._getframe(2)
    return caller.f_code.co_name == "ptq" and caller.f_globals.get("__name__") == "nemo.collections.llm.api"

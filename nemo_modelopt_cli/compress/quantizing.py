"""Build the settings of llm.ptq from those of a compression job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo.collections.llm.modelopt import QuantizationConfig
from nemo.collections.llm.modelopt.quantization import mixture
from nemo_modelopt_cli.compress.settings import Quantization
from nemo_modelopt_dropin.preflight.algorithms import NO_QUANT


def config_of(settings: Quantization, text: str, folder: Path, **more: Any) -> QuantizationConfig:
    """Return the settings of a quantization; a mixture of two algorithms is written as a quant_cfg into a folder.

    Each rank writes the file before it reads it, so that none waits for another. The file is named after what it holds:
    ranks that are not at the same place read the same.

    Args:
        settings: The job's settings.
        text: File of texts to calibrate on.
        folder: Of the job step.
        **more: Further fields of the configuration.
    """
    algorithm: str | None = None if is_plain(settings) else settings.algorithm
    if settings.weights.is_mixed:
        weights = settings.weights
        cache = "-fp8_cache" if weights.fp8_cache else ""
        path = folder / f"quant_cfg-{weights.attention}-{weights.mlp}-{settings.awq_block_size}{cache}.json"
        algorithm = str(mixture.write(path, weights.attention, weights.mlp, settings.awq_block_size, weights.fp8_cache))
    return QuantizationConfig(
        algorithm=algorithm,
        awq_block_size=settings.awq_block_size,
        enable_kv_cache=settings.enable_kv_cache,
        calibration_dataset=text,
        calibration_dataset_size=settings.calibration_size,
        calibration_batch_size=settings.calibration_batch_size,
        calibration_seq_len=settings.calibration_seq_len,
        **more,
    )


def is_plain(settings: Quantization) -> bool:
    """Return whether nothing is quantized."""
    return {settings.weights.attention, settings.weights.mlp} == {NO_QUANT}

"""Decide for whose readers the inputs of experts are calibrated, which the quantized NeMo checkpoint depends on."""

from __future__ import annotations

from pathlib import Path

from nemo_modelopt_cli.compress.settings import Quantization
from nemo_modelopt_dropin.preflight import algorithms, model_sizes


def layout(settings: Quantization, checkpoint: str | Path | None) -> str | None:
    """Return the layout of Hugging Face files for whose readers experts are calibrated.

    None if there are no experts or no such files, and for AWQ and SmoothQuant, whose layout `Quantization` has.

    Args:
        settings: The settings of the quantization.
        checkpoint: The model; only its configuration is read.
    """
    hf_format = algorithms.hf_format_of(settings.algorithm)
    if "hf" not in settings.formats or hf_format is None or algorithms.scales_inputs(settings.algorithm):
        return None
    if not model_sizes.config_of(checkpoint).get("num_moe_experts"):
        return None
    return algorithms.layout_of(hf_format, settings.hf_layout)

"""The checks at the beginning of the constructor and of ``export`` of the Quantizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import ModelOptConfigError
from . import _checks, _transformers_models
from . import quant_cfg_choices as choices
from ._quant_cfg import AUTO, planned_quant_cfgs
from .export import support
from .insert import mixed_precision


def check_device(has_gpu: bool, has_cpu_backend: bool) -> bool:
    """Return whether there is a GPU, after checking that there is one or that the CPU backend is enabled.

    Raises:
        EnvironmentError: If neither is the case.
    """
    if not has_gpu and not has_cpu_backend:
        raise OSError(
            "GPU is required for the quantization. On a CPU, call nemo_modelopt_dropin.cpu_backend.enable() first."
        )
    return has_gpu


def check(
    config: Any,
    export_config: Any,
    has_gpu: bool,
    presets: dict[str, Any],
    kv_formats: dict[str, str],
    export_formats: list,
    load: Callable,
) -> None:
    """Check what goes beyond the fields that stock reads, without looking at the disk.

    Args:
        config: The QuantizationConfig; a stand-in for one is not checked.
        export_config: The ExportConfig, a stand-in, or None.
        has_gpu: Whether CUDA kernels can run.
        presets: Short name to quant_cfg.
        kv_formats: Name of a KV-cache format to that of modelopt's preset.
        export_formats: The supported export formats.
        load: Reads a JSON file.

    Raises:
        EnvironmentError: If the algorithm needs CUDA kernels and there is no GPU.
        ModelOptConfigError: For a value or combination that cannot work.
    """
    planned = {}
    if _checks.is_complete(config):
        _checks.check_quantization(config, kv_formats)
        planned = planned_quant_cfgs(config, presets, load)
    if getattr(config, "algorithm", None) == AUTO:
        mixed_precision.check_supported()
    for name, quant_cfg in planned.items():
        if not has_gpu and choices.needs_cuda(quant_cfg):
            raise OSError(f"GPU is required for the quantization with {name}: CUDA kernels.")
    if _checks.is_complete(export_config):
        _checks.check_export(export_config, export_formats)
        # If NeMo can wrap transformers models, `quantize` checks this: modelopt exports those in another way.
        if not _transformers_models.exists():
            support.check_planned(planned, export_config)


def check_export_call(export_config: Any, model: Any, trainer: Any, export_formats: list) -> None:
    """Check what ``Quantizer.export`` was called with.

    Raises:
        ModelOptConfigError: If there is no export configuration, the format is not supported, or the NeMo format has no
            trainer.
    """
    if export_config is None:
        raise ModelOptConfigError("Quantizer.export needs an ExportConfig, but export_config is None.")
    name = export_config.export_format
    if name not in export_formats:
        raise ModelOptConfigError(f"Unsupported export format: {name}; allowed: {export_formats}.")
    if _transformers_models.is_wrapped(model):
        _transformers_models.check_format(name)
    if name == "nemo" and trainer is None:
        raise ModelOptConfigError("Trainer required for NeMo export.")

"""Choose the layout of a Hugging Face checkpoint before the calibration, and report which programs read it."""

from __future__ import annotations

from typing import Any

import torch
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero

from nemo_modelopt_dropin.console import screen
from nemo_modelopt_dropin.preflight import algorithms, readers

from ... import _parallel
from ...errors import ModelOptConfigError
from .. import quant_cfg_choices as choices
from . import hf_kv_cache, input_scales
from .layouts import layer as layers


def format_of(quant_cfg: dict[str, Any]) -> str | None:
    """Return the format of the weights in Hugging Face files, a name in `HF_FORMATS`, or None if it is not known."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for pattern, attributes in choices.quantizer_settings(quant_cfg):
        settings.setdefault(pattern, []).append(attributes)
    has_input = any("input_quantizer" in pattern for pattern in settings)
    scales_input = choices.is_awq(quant_cfg) or choices.is_smoothquant(quant_cfg)
    weight = next((steps for pattern, steps in settings.items() if "weight_quantizer" in pattern), [])
    return layers.algorithm_of(weight, has_input, scales_input) if weight else None


def requested(export_config: Any) -> str:
    """Return the layout that a configuration asks for; stand-ins for it may lack the field."""
    return getattr(export_config, "hf_layout", algorithms.AUTO)


def of_model(core: torch.nn.Module, layout: str) -> str:
    """Return the name of the layout in which a converted model is written; all ranks must call.

    Args:
        core: The Megatron-Core model on this rank.
        layout: The requested layout, one of `algorithms.LAYOUT_CHOICES`.

    Raises:
        ModelOptConfigError: If no layout, or not the requested one, can hold all formats of the layers.
    """
    own = {name: found for name, module in core.named_modules() if (found := layers.read(module)) is not None}
    scaled = any(input_scales.scale_of(module) is not None for module in core.modules())
    static = any(".experts." in name and layer.algorithm == "W8A8_SQ_PER_CHANNEL" for name, layer in own.items())
    parts = _parallel.gather_objects(({layer.format[0] for layer in own.values()}, scaled, static))
    formats = {name for part, _, _ in parts for name in part}
    # Scales of inputs that the Quantizer did not move into other layers, as for a NeMo checkpoint.
    if any(found for _, found, _ in parts):
        if layout == readers.COMPRESSED_TENSORS:
            raise ModelOptConfigError(
                f"hf_layout={layout!r} has no scales of inputs, and AWQ or SmoothQuant left some in this model. "
                f'Quantize with this hf_layout (export_format="hf" or "nemo"), or use hf_layout={readers.MODELOPT!r}.'
            )
        layout = readers.MODELOPT
    chosen = algorithms.common_layout(formats, layout)
    if chosen == readers.COMPRESSED_TENSORS and any(one for *_, one in parts) and is_global_rank_zero():
        logging.warning(
            "The inputs of experts have calibrated INT8 scales, which vLLM does not read. To write scales for each "
            f"token, quantize with hf_layout={chosen!r}."
        )
    return chosen


def check(quant_cfg: dict[str, Any] | None, algorithm: str | None, export_config: Any) -> None:
    """Check that the layout of a Hugging Face checkpoint can hold an algorithm.

    Args:
        quant_cfg: How the algorithm quantizes.
        algorithm: Its name, for the message.
        export_config: The ``ExportConfig``.

    Raises:
        ModelOptConfigError: With the reason and what to do.
    """
    found = format_of(quant_cfg) if export_config.export_format == "hf" and quant_cfg else None
    layout = requested(export_config)
    problem = algorithms.layout_problem(found, layout) if found in algorithms.HF_FORMATS else None
    if problem:
        raise ModelOptConfigError(f"algorithm={algorithm!r} cannot be exported with hf_layout={layout!r}: {problem}.")


def planned_layout(export_config: Any, planned: dict[str, dict[str, Any]]) -> str | None:
    """Return the layout in which all layers are written, or None if no Hugging Face files of known formats are planned.

    Args:
        export_config: The ``ExportConfig``.
        planned: Name to quant_cfg of the algorithms, see `support.check_planned`.

    Raises:
        ModelOptConfigError: If no layout can hold all formats that mixed precision chooses from.
    """
    found = {name: format_of(quant_cfg) for name, quant_cfg in planned.items()}
    formats = {one for one in found.values() if one in algorithms.HF_FORMATS}
    if export_config.export_format != "hf" or not formats or formats != set(found.values()):
        return None
    try:
        return algorithms.common_layout([*map(str, formats)], requested(export_config))
    except ModelOptConfigError as error:
        layouts = {name: algorithms.HF_FORMATS[str(one)].layouts for name, one in found.items()}
        held = [f"{one} holds {[name for name in found if one in layouts[name]]}" for one in readers.LAYOUTS]
        raise ModelOptConfigError(
            f"auto_quantize_formats={list(found)} cannot be exported together. {error} Layouts: {'; '.join(held)}. "
            'Use formats of one layout, or export_format="nemo".'
        ) from None


def check_cache(
    core: torch.nn.Module, export_config: Any, quant_cfg: dict[str, Any], planned: dict[str, dict[str, Any]]
) -> None:
    """Check that the layout of a Hugging Face checkpoint can describe the quantized KV cache.

    Args:
        core: This rank's Megatron-Core model.
        export_config: The ``ExportConfig``.
        quant_cfg: How the model will be quantized, its KV cache included.
        planned: Name to quant_cfg of the algorithms.

    Raises:
        ModelOptConfigError: With the reason and what to do.
    """
    if export_config.export_format != "hf" or planned_layout(export_config, planned) != readers.COMPRESSED_TENSORS:
        return
    if "NVFP4" in hf_kv_cache.planned_formats(core, quant_cfg):
        raise ModelOptConfigError(
            f"The layout {readers.COMPRESSED_TENSORS}, in which {' and '.join(planned)} is written, has no KV cache in "
            f'NVFP4. Set kv_cache_qformat="fp8", enable_kv_cache=False, or hf_layout={readers.MODELOPT!r} for an '
            "algorithm that it can hold."
        )


def later_layout(export_config: Any, planned: dict[str, dict[str, Any]]) -> str | None:
    """Return `planned_layout`, also for a NeMo checkpoint from which Hugging Face files are written later.

    Such a later export is announced by ``hf_layout`` together with ``export_format="nemo"``.

    Args:
        export_config: The ``ExportConfig``, or None.
        planned: Name to quant_cfg of the algorithms.
    """
    if export_config is None or export_config.export_format not in ("hf", "nemo"):
        return None
    if export_config.export_format == "hf":
        return planned_layout(export_config, planned)
    layout = requested(export_config)
    return None if layout == algorithms.AUTO else layout


def check_mixture(export_config: Any, planned: dict[str, dict[str, Any]]) -> None:
    """Check that one layout can hold all formats that mixed precision chooses from; see `planned_layout`."""
    if len(planned) > 1:
        planned_layout(export_config, planned)


def has_experts(core: Any) -> bool:
    """Return whether a Megatron-Core model has experts."""
    return bool(getattr(getattr(core, "config", None), "num_moe_experts", None))


def log(core: Any, export_config: Any, planned: dict[str, dict[str, Any]]) -> None:
    """Log on rank zero which layout a Hugging Face checkpoint will have, and which programs read it.

    A layout that no known server reads is logged as a warning, with the layouts that are read.

    Args:
        core: The Megatron-Core model; some programs read no experts.
        export_config: The ``ExportConfig``.
        planned: Name to quant_cfg of the algorithms, see `support.check_planned`.
    """
    if export_config.export_format != "hf" or not is_global_rank_zero():
        return
    layout, experts = requested(export_config), has_experts(core)
    for name, quant_cfg in planned.items():
        found = format_of(quant_cfg) if quant_cfg else None
        if found not in algorithms.HF_FORMATS:
            continue
        if warning := algorithms.reader_warning(name, found, layout, experts):
            logging.warning(f"{warning}.")
            continue
        used = algorithms.layout_of(found, layout)
        with screen.results():
            read = readers.text(found, used, experts)
            logging.info(f"{name} is written in the layout {used}, which is read by {read}.")

"""Check whether a model can be exported, before it is calibrated."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from nemo.utils.model_utils import unwrap_model

from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from nemo_modelopt_dropin.preflight import algorithms, families

from ... import _output_layer
from ...errors import ModelOptConfigError
from .. import _decoders, _transformers_models
from .. import quant_cfg_choices as choices
from ..insert import expert_inputs, row_blocks
from . import hf_early, hf_kv_cache, hf_names, hf_sizes, input_scales, layout_choice
from .layouts import layer as layers

_REMEDY = 'Use export_format="nemo" (any algorithm, any parallel layout) or "trtllm"'


def hf_obstacle(quant_cfg: dict[str, Any] | None) -> str | None:
    """Return why a quantized model cannot be stored correctly in Hugging Face format, or None if it can."""
    if not quant_cfg:
        return None
    settings: dict[str, list[dict[str, Any]]] = {}
    for pattern, attributes in choices.quantizer_settings(quant_cfg):
        settings.setdefault(pattern, []).append(attributes)
    has_input = any("input_quantizer" in pattern for pattern in settings)
    scales_input = choices.is_awq(quant_cfg) or choices.is_smoothquant(quant_cfg)
    for pattern, steps in settings.items():
        if "weight_quantizer" in pattern:
            found = _weight_obstacle(steps, has_input, scales_input)
            if found:
                return found
    return None


def _weight_obstacle(
    steps: list[dict[str, Any]], has_input: bool, scales_input: bool, input_settings: dict[str, Any] | None = None
) -> str | None:
    """Return why weights with these quantizer settings cannot be stored correctly, or None."""
    if layers.algorithm_of(steps, has_input, scales_input, input_settings):
        return None
    bits, blocks = steps[0]["num_bits"], steps[0].get("block_sizes") or {}
    inputs = "quantized" if has_input else "unquantized"
    return (
        f"weights with num_bits={bits}, axis={steps[0].get('axis')}, block_sizes={blocks} and {inputs} inputs cannot "
        f"be written; supported formats and their readers: {_formats()}"
    )


def _formats() -> str:
    """Return the formats that can be written, each with the programs that read it."""
    return ", ".join(f"{name} ({algorithms.readers_of(name)})" for name in algorithms.HF_FORMATS)


def hf_obstacle_of(model: torch.nn.Module) -> str | None:
    """Return why a converted model cannot be stored correctly in Hugging Face format, or None."""
    formats = set()
    for name, module in model.named_modules():
        settings = layers.settings_of(module)
        if settings is None:
            continue
        formats.add(layers.algorithm_of(*settings))
        obstacle = _weight_obstacle(*settings) or row_blocks.uneven(name, module, row_blocks.int4_block(settings[0]))
        if obstacle:
            return obstacle
    try:
        algorithms.common_layout([*map(str, formats)])
    except ModelOptConfigError as error:
        return str(error).removesuffix(".")
    scaled = any(input_scales.scale_of(module) is not None for module in model.modules())
    return (
        (scaled and input_scales.obstacle(model))
        or _tied_head(model, None)
        or _lost_quantizers(model, None)
        or hf_kv_cache.obstacle(model)
    )


def _tied_head(core: torch.nn.Module, quant_cfg: dict[str, Any] | None) -> str | None:
    """Return why a quantized output layer that shares the embedding's weight cannot be stored, or None."""
    head = getattr(core, "output_layer", None)
    if head is None or not getattr(core, "share_embeddings_and_output_weights", False):
        return None
    if quant_cfg is None:
        enabled = layers.settings_of(head) is not None
    else:
        enabled = bool(choices.enabled_quantizers(quant_cfg, "output_layer", ("weight_quantizer",)))
    return "the output layer shares the embedding's weight, so it cannot be stored quantized" if enabled else None


def _lost_quantizers(core: torch.nn.Module, quant_cfg: dict[str, Any] | None) -> str | None:
    """Return which quantizers of linear layers a checkpoint cannot describe, or None.

    Readers do not quantize outputs, and quantize inputs only together with weights.
    """
    names = ("weight_quantizer", "input_quantizer", "output_quantizer")
    for name, module in core.named_modules():
        if quant_cfg is None:
            found = {leaf for leaf in names if is_enabled(getattr(module, leaf, None))}
        elif name.rpartition(".")[2].startswith(("linear_", "output_layer")):
            found = set(choices.enabled_quantizers(quant_cfg, name, names))
        else:
            continue
        if "output_quantizer" in found:
            return f"readers do not quantize outputs, such as those of {name}"
        if found == {"input_quantizer"}:
            return f"readers quantize inputs only together with weights, and {name} has no weight quantizer"
    return None


def is_enabled(quantizer: Any) -> bool:
    """Return whether an object is a quantizer that is enabled, or has a step that is."""
    steps = quantizer if isinstance(quantizer, SequentialQuantizer) else [quantizer]
    return any(isinstance(step, TensorQuantizer) and step.is_enabled for step in steps)


def check_contents(export_format: str, quant_cfg: dict[str, Any], model: Any, core: torch.nn.Module) -> None:
    """Check that a Hugging Face checkpoint can hold all quantizers of a model.

    Args:
        export_format: The requested format.
        quant_cfg: How the model will be quantized.
        model: The ``llm.GPTModel``.
        core: Its Megatron-Core model on this rank.

    Raises:
        ModelOptConfigError: With the reason and what to do.
    """
    if export_format != "hf":
        return
    scaled = input_scales.scales_inputs(quant_cfg)
    packed = packs_experts(hf_architecture(model))
    obstacle = (
        (scaled and input_scales.obstacle(core, packed))
        or _tied_head(core, quant_cfg)
        or _lost_quantizers(core, quant_cfg)
    )
    if obstacle:
        raise ModelOptConfigError(f'export_format="hf": {obstacle}. {_REMEDY}.')


def packs_experts(architecture: str | None) -> bool:
    """Return whether modelopt writes all experts of a layer of this transformers class into one tensor."""
    from modelopt.torch.export.plugins.mcore_common import all_mcore_hf_export_mapping

    return bool(all_mcore_hf_export_mapping.get(architecture, {}).get("use_packed_local_experts", False))


def check_format(quant_cfg: dict[str, Any] | None, algorithm: str | None, export_format: str) -> None:
    """Check that an algorithm can be exported correctly in a format.

    Raises:
        ModelOptConfigError: With the reason and what to do.
    """
    obstacle = hf_obstacle(quant_cfg) if export_format == "hf" else None
    if obstacle:
        raise ModelOptConfigError(
            f'algorithm={algorithm!r} cannot be exported with export_format="hf": {obstacle}. {_REMEDY}.'
        )


def check_layout(export_format: str, config: Any, tensor_parallel: int) -> None:
    """Check that the tensor-parallel parts of a model can be joined for Hugging Face.

    Args:
        export_format: The requested format.
        config: The model's configuration.
        tensor_parallel: Tensor parallel size.

    Raises:
        ModelOptConfigError: With the reason and what to do.
    """
    if export_format != "hf" or tensor_parallel == 1:
        return
    if getattr(config, "mamba_stack_spec", None) is not None:
        raise ModelOptConfigError(
            f'export_format="hf" of a Mamba model needs tensor parallel size 1, not {tensor_parallel}: calibrate with '
            f"calibration_tp=1 (any pipeline parallel size). {_REMEDY}."
        )


def check_converted(model: torch.nn.Module) -> None:
    """Check that the Hugging Face checkpoint of a converted Megatron-Core model would be correct.

    Raises:
        ModelOptConfigError: With the reason and what to do.
    """
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        size = parallel_state.get_tensor_model_parallel_world_size()
        check_layout("hf", getattr(model, "config", None), size)
    obstacle = hf_obstacle_of(model)
    if obstacle:
        raise ModelOptConfigError(f"This model cannot be exported to Hugging Face format: {obstacle}. {_REMEDY}.")


def hf_tokenizer(model: Any) -> Any:
    """Return the ``transformers`` tokenizer of a NeMo model, or None if its tokenizer is of another kind."""
    from transformers import PreTrainedTokenizerBase

    tokenizer = getattr(getattr(model, "tokenizer", None), "tokenizer", None)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def hf_architecture(model: Any) -> str | None:
    """Return the transformers class that NeMo's exporter of a model names, or None if it names none."""
    exporter = type(model)._EXPORTERS.get(str(type(model)) + "hf") if hasattr(type(model), "_EXPORTERS") else None
    for base in getattr(exporter, "__orig_bases__", ()):
        for argument in getattr(base, "__args__", ())[1:]:
            name = getattr(argument, "__forward_arg__", getattr(argument, "__name__", None))
            if name and not name.startswith("Auto"):
                return name
    return None


def check_architecture(export_format: str, model: Any, core: Any = None, quant_cfg: Any = None) -> None:
    """Check that NeMo's exporter defines the Hugging Face checkpoint of a model.

    Args:
        export_format: The requested format.
        model: The ``llm.GPTModel``.
        core: Its Megatron-Core model; None checks the class only. All ranks must call with it.
        quant_cfg: How it will be quantized; None for a plain model.

    Raises:
        ModelOptConfigError: If NeMo has no exporter for the model, or one that does not define all of it.
    """
    if export_format != "hf":
        return
    exporters = getattr(type(model), "_EXPORTERS", {})
    if str(type(model)) + "hf" not in exporters:
        raise ModelOptConfigError(
            f'export_format="hf": NeMo has no Hugging Face exporter for {type(model).__name__}; use a model class that '
            f"has one, such as llm.LlamaModel. {_REMEDY}."
        )
    problem = families.class_problem(f"{type(model).__module__}.{type(model).__qualname__}")
    if problem and hf_architecture(model) is None:
        raise ModelOptConfigError(f'export_format="hf": {problem}. {_REMEDY}.')
    if core is None:
        return
    try:
        hf_early.check(model, core, quant_cfg, hf_tokenizer(model))
    except (hf_names.NamesError, hf_sizes.SizesError) as error:
        raise ModelOptConfigError(f'export_format="hf": {error} {_REMEDY}.') from error


def check_planned(planned: dict[str, dict[str, Any]], export_config: Any) -> None:
    """Check that the configured algorithms can be exported from a Megatron model.

    Args:
        planned: Name to quant_cfg.
        export_config: The ``ExportConfig``.

    Raises:
        ModelOptConfigError: With the reason and what to do.
    """
    for name, quant_cfg in planned.items():
        check_format(quant_cfg, name, export_config.export_format)
        layout_choice.check(quant_cfg, name, export_config)
    layout_choice.check_mixture(export_config, planned)


def check_saved_head(export_format: str, quant_cfg: dict[str, Any]) -> None:
    """Check that a checkpoint can hold the output layer.

    Raises:
        ModelOptConfigError: If it is quantized, goes to a NeMo checkpoint, and modelopt gives it a state that Megatron
            does not save.
    """
    names = ("weight_quantizer", "input_quantizer", "output_quantizer")
    if (
        export_format == "nemo"
        and _output_layer.has_state()
        and choices.enabled_quantizers(quant_cfg, _output_layer.NAME, names)
    ):
        raise ModelOptConfigError(
            f"A quantized output layer cannot be saved in a NeMo checkpoint with nvidia-modelopt "
            f"{metadata.version('nvidia-modelopt')}: Megatron's GPTModel saves no state of its quantizers. Disable "
            '"*output_layer*" in the quant_cfg, or export to Hugging Face (export_format="hf").'
        )


def check_model(
    model: Any,
    export_config: Any,
    quant_cfg: dict[str, Any],
    planned: dict[str, dict[str, Any]],
    enable_kv_cache: bool | None = None,
) -> None:
    """Check that a model can be quantized, and exported as configured.

    Args:
        model: The ``llm.GPTModel``, or NeMo 2.5's wrapper of a transformers model.
        export_config: The ``ExportConfig``, or None.
        quant_cfg: How it will be quantized; `hf_kv_cache.check_or_disable` may remove the KV cache from it.
        planned: Name to quant_cfg of the algorithms, see `check_planned`.
        enable_kv_cache: The user's setting.

    Raises:
        ModelOptConfigError: With the reason and what to do.
    """
    if _transformers_models.is_wrapped(model):
        _transformers_models.check(model, export_config, quant_cfg)
        return
    _transformers_models.check_plain(model)
    inner = _decoders.find_gpt_model(model)
    if inner is None:
        raise ModelOptConfigError(
            f"Quantizer.quantize expects an llm.GPTModel or llm.MambaModel (or NeMo's wrapper of one), not a "
            f"{type(model).__name__}."
        )
    if export_config is not None:
        check_planned(planned, export_config)
        check_layout(export_config.export_format, inner.config, inner.config.tensor_model_parallel_size)
        check_architecture(export_config.export_format, inner, unwrap_model(model), quant_cfg)
        row_blocks.check(export_config.export_format, quant_cfg, inner)
        check_saved_head(export_config.export_format, quant_cfg)
        core = unwrap_model(model)
        hf_kv_cache.check_or_disable(export_config.export_format, quant_cfg, core, enable_kv_cache)
        layout_choice.check_cache(core, export_config, quant_cfg, planned)
        check_contents(export_config.export_format, quant_cfg, inner, core)
        layout_choice.log(core, export_config, planned)
        expert_inputs.set_dynamic(core, export_config, quant_cfg, planned)

"""Move the input scales of AWQ and SmoothQuant (``pre_quant_scale``) into the layers before, in the model in memory.

The compressed-tensors layout has no input scales. They are moved after the calibration, so that the model in memory and
the files agree exactly and everything that measures the model measures what is stored:

- q/k/v and the first layer of an MLP: into the norm before them.
- The output projection: into the rows of v. With grouped queries several heads read one row of v, so the scales of
  these heads are replaced by their mean, and the weight of the output projection is rescaled by the quotient.
- The down projection of a gated MLP: into the rows of the up projection, of which the gated product is a multiple.

Every changed weight is rounded to its dtype and gets a new amax, which is clipped as much as the old one was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero

from modelopt.torch.quantization.model_calib import max_calibrate
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from nemo_modelopt_dropin.preflight import algorithms, readers

from ... import _parallel
from ...errors import ModelOptConfigError
from .. import quant_cfg_choices as choices
from ..export import input_scales, layout_choice

_EXPERTS = "the router reads the same norm as the experts, so the scale of the experts' inputs cannot move into it"


@dataclass(frozen=True)
class Move:
    """Where the input scale of one linear layer can go.

    Attributes:
        linear: The layer whose input is scaled.
        apply: Moves a scale `[i]`; None if it is not possible.
        problem: Why it is not possible.
    """

    linear: torch.nn.Module
    apply: Callable[[torch.Tensor], None] | None
    problem: str = ""


def decide(core: Any, export_config: Any, planned: dict[str, dict[str, Any]]) -> bool:
    """Return whether the input scales of a model are moved for its export; all ranks must call it.

    The compressed-tensors layout needs it. modelopt's layout has input scales, but more programs read NVFP4 without.
    With ``export_format="nemo"`` they are moved if ``hf_layout`` is set, for a later export to that layout.

    Args:
        core: This rank's Megatron-Core model, not yet quantized.
        export_config: The ``ExportConfig``, or None.
        planned: Name to quant_cfg of the algorithms.

    Raises:
        ModelOptConfigError: If the layout needs it and a scale has nowhere to go, with the reason and what to do.
    """
    layout = layout_choice.later_layout(export_config, planned)
    if layout is None or not issubclass(type(core), MegatronModule):
        return False
    later = export_config.export_format == "nemo"
    needed, moves = layout == readers.COMPRESSED_TENSORS, False
    for name, quant_cfg in planned.items():
        hf_format = layout_choice.format_of(quant_cfg)
        if not input_scales.scales_inputs(quant_cfg) or not (needed or hf_format == "NVFP4_AWQ"):
            continue
        problems = [text for text in _parallel.gather_objects(obstacle(core, quant_cfg)) if text]
        if problems and needed and (later or falls_back(export_config, str(hf_format))):
            if is_global_rank_zero():
                read = readers.text(str(hf_format), readers.MODELOPT, layout_choice.has_experts(core))
                logging.warning(
                    f"{name} is written in the layout {readers.MODELOPT} (read by: {read}), because {layout} "
                    f"has no input scales: {problems[0]}. To write {layout}, use {_plain(str(hf_format))!r}."
                )
            return False
        if problems and needed:
            raise ModelOptConfigError(
                f"algorithm={name!r} cannot be exported with hf_layout={layout!r}, which has no input scales: "
                f"{problems[0]}. {_way_out(name, str(hf_format))}"
            )
        if problems and is_global_rank_zero():
            logging.warning(
                f"{name} is written as NVFP4_AWQ, which vLLM does not read, because {problems[0]}. To write NVFP4, "
                f"use {_plain(str(hf_format))!r}."
            )
        moves = moves or not problems
    return moves


def falls_back(export_config: Any, hf_format: str) -> bool:
    """Return whether modelopt's layout, which has input scales, may be written instead: the layout was not set."""
    return (
        layout_choice.requested(export_config) == algorithms.AUTO
        and readers.MODELOPT in algorithms.HF_FORMATS[hf_format].layouts
    )


def _way_out(name: str, hf_format: str) -> str:
    plain = _plain(hf_format)
    return f"Use {plain!r} instead of {name!r}, hf_layout={readers.MODELOPT!r}, or export_format='nemo'."


def _plain(hf_format: str) -> str:
    """Return the algorithm that quantizes as a format does, without scales of the inputs."""
    return {"W4A16_AWQ": "int4", "W8A8_SQ_PER_CHANNEL": "int8", "NVFP4_AWQ": "nvfp4"}.get(hf_format, "fp8")


def obstacle(core: torch.nn.Module, quant_cfg: dict[str, Any]) -> str | None:
    """Return why the input scales that a quant_cfg adds cannot be moved, or None.

    Args:
        core: This rank's Megatron-Core model, converted or not.
        quant_cfg: How it will be quantized, by a method that scales inputs.
    """
    moves = {id(move.linear): move for move in _moves(core)}
    for name, module in core.named_modules():
        if not name.rpartition(".")[2].startswith(("linear_", "in_proj", "out_proj", "output_layer")):
            continue
        if not choices.enabled_quantizers(quant_cfg, name, ("weight_quantizer",)):
            continue
        move = moves.get(id(module))
        problem = "no layer before it can take the scale of its input" if move is None else move.problem
        if problem:
            return f"{name}: {problem}"
    return None


def move(core: torch.nn.Module) -> bool:
    """Move all input scales of a calibrated model, in place; no layer has one afterwards.

    Args:
        core: This rank's Megatron-Core model.

    Returns:
        Whether rows of v changed, so that statistics of a quantized KV cache are no longer those of the model.

    Raises:
        ModelOptConfigError: If a scale cannot be moved; `obstacle` reports this before the calibration.
    """
    names = {id(module): name for name, module in core.named_modules()}
    moves = {id(move.linear): move for move in _moves(core)}
    scaled = [module for module in core.modules() if input_scales.scale_of(module) is not None]
    changes_values = False
    with torch.no_grad():
        for module in scaled:
            found = moves.get(id(module))
            if found is None or found.apply is None:
                raise ModelOptConfigError(
                    f"The input scale of {names[id(module)]} cannot move into another layer: "
                    f"{found.problem if found else 'no layer before it can take it'}."
                )
            scale = input_scales.scale_of(module)
            if scale is not None:
                found.apply(scale)
            _drop_scale(module)
            changes_values |= names[id(module)].endswith("linear_proj")
    return changes_values


def _drop_scale(linear: Any) -> None:
    """Remove the input scale of a layer."""
    del linear.input_quantizer._pre_quant_scale
    linear.input_quantizer._enable_pre_quant_scale = False


def _moves(core: torch.nn.Module) -> Iterator[Move]:
    """Yield where the input scale of each linear layer of the transformer layers can go."""
    norms = {id(fold.linear): fold for fold in input_scales.folds(core, everything=True)}
    for layer in core.modules():
        if not isinstance(layer, TransformerLayer):
            continue
        qkv, projection = (getattr(layer.self_attention, name, None) for name in ("linear_qkv", "linear_proj"))
        if qkv is not None:
            yield _into_norm(qkv, norms, "the norm before it has no weight, or its output is also added to the layer's")
            if projection is not None:
                yield _into_values(layer.self_attention, qkv, projection)
        for mlp in layer.mlp.modules():
            if isinstance(mlp, MLP):
                reason = "the norm before it has no weight, or its output is also added to the layer's"
                yield _into_norm(mlp.linear_fc1, norms, reason if mlp is layer.mlp else _EXPERTS)
                yield _into_up(mlp)


def _into_norm(linear: torch.nn.Module, norms: dict[int, input_scales.Fold], problem: str) -> Move:
    fold = norms.get(id(linear))
    if fold is None:
        return Move(linear, None, problem)

    def apply(scale: torch.Tensor) -> None:
        for parameter, offset in fold.parameters():
            parameter.data = input_scales.scaled(parameter.data, scale, offset).to(parameter.dtype)

    return Move(linear, apply)


def _into_values(attention: Any, qkv: Any, projection: Any) -> Move:
    """Return how the scale of the output projection's input moves into the rows of v."""
    heads, groups = attention.num_attention_heads_per_partition, attention.num_query_groups_per_partition
    size = attention.hidden_size_per_attention_head
    # In Megatron's fused layer each group has the rows of its queries, then those of k, then those of v.
    if qkv.weight.shape[0] != (heads + 2 * groups) * size or projection.weight.shape[1] != heads * size:
        return Move(projection, None, "the rows of v are not at the end of each group of q, k and v")

    def apply(scale: torch.Tensor) -> None:
        shared = scale.view(groups, heads // groups, size).mean(dim=1, keepdim=True)
        if heads != groups:
            _rescale_columns(projection, scale, shared.expand(groups, heads // groups, size).reshape(-1))
        rows = torch.ones(groups, heads // groups + 2, size, device=scale.device)
        rows[:, -1:] = shared
        _rescale_rows(qkv, rows.reshape(-1))

    return Move(projection, apply)


def _into_up(mlp: Any) -> Move:
    """Return how the scale of the down projection's input moves into the rows of the up projection."""
    config, down = mlp.config, mlp.linear_fc2
    if not config.gated_linear_unit:
        return Move(down, None, "an activation is between it and the layer before, whose rows could take the scale")
    is_clamped = getattr(config, "activation_func_clamp_value", None) is not None
    is_shifted = bool(getattr(config, "glu_linear_offset", None))
    if is_clamped or is_shifted:
        return Move(down, None, "the gated product is not a multiple of the up projection (it is clamped or shifted)")

    def apply(scale: torch.Tensor) -> None:
        # This rank's part of the gate, then its part of the up projection.
        _rescale_rows(mlp.linear_fc1, torch.cat([torch.ones_like(scale), scale]))

    return Move(down, apply)


def _rescale_rows(linear: Any, factors: torch.Tensor) -> None:
    """Multiply the rows of a layer, and its bias, by factors `[o]`."""
    _change_weight(linear, factors[:, None])
    bias = getattr(linear, "bias", None)
    if isinstance(bias, torch.Tensor) and bias.numel():
        bias.copy_(bias.float() * factors.to(bias.device))


def _rescale_columns(linear: Any, old: torch.Tensor, new: torch.Tensor) -> None:
    """Divide the columns of a layer, whose weight contains the inverse of an old input scale, by a new one instead."""
    _change_weight(linear, (old / new)[None, :])
    quantizer = getattr(linear, "input_quantizer", None)
    if not isinstance(quantizer, TensorQuantizer) or not quantizer.is_enabled or quantizer.amax is None:
        return
    largest = getattr(quantizer, "_amax_for_smoothing", None)
    if largest is None:
        raise ModelOptConfigError(
            "The statistics of the output projection's inputs are not stored with the model, so its input scale cannot "
            "change: quantize the original checkpoint with this export."
        )
    amax = (largest.float().to(new.device).reshape(-1) * new).amax()
    quantizer.amax = amax.to(quantizer.amax.dtype).reshape(quantizer.amax.shape)
    _merge_amax(quantizer, linear)


def _change_weight(linear: Any, factors: torch.Tensor) -> None:
    """Multiply the weight of a layer by factors that broadcast against it, and compute its amax again.

    The search of AWQ's clipping (``awq_clip``, ``awq_full``) chooses an amax below the largest value. Its share of the
    largest value is kept.
    """
    steps = _calibrated_steps(linear)
    chosen = [step.amax.clone() for step in steps]
    _calibrate_weight(linear, steps)
    shares = [torch.where(step.amax > 0, old / step.amax, 1.0) for step, old in zip(steps, chosen, strict=True)]
    linear.weight.copy_(linear.weight.float() * factors.to(linear.weight.device))
    _calibrate_weight(linear, steps)
    for step, share in zip(steps, shares, strict=True):
        step.amax = (step.amax * share).to(step.amax.dtype)


def _calibrated_steps(linear: Any) -> list[Any]:
    """Return the steps of a layer's weight quantizer; none for a layer in 16 bits, or without a calibrated scale."""
    quantizer = getattr(linear, "weight_quantizer", None)
    all_steps: list[Any] = list(quantizer) if isinstance(quantizer, SequentialQuantizer) else [quantizer]
    steps = [step for step in all_steps if isinstance(step, TensorQuantizer) and step.is_enabled]
    return steps if any(step.amax is not None for step in steps) else []


def _calibrate_weight(linear: Any, steps: list[Any]) -> None:
    """Set the amax of a weight to its largest values, as modelopt's calibration does.

    Args:
        linear: The layer.
        steps: The steps of its weight quantizer that have an amax.
    """
    if not steps:
        return
    quantizer = linear.weight_quantizer
    for step in steps:
        step.reset_amax()
    max_calibrate(quantizer, lambda quantizer: quantizer(linear.weight), distributed_sync=False)
    for step in steps:
        is_static_block = bool(step.block_sizes) and step.block_sizes.get("type") != "dynamic"
        by_row = getattr(linear, "_is_row_parallel", False) and step.axis in (0, (0,))
        if not is_static_block and (step.axis is None or by_row):
            _merge_amax(step, linear)


def _merge_amax(quantizer: TensorQuantizer, linear: Any) -> None:
    """Replace an amax by the largest of all tensor-parallel ranks, which share the scale."""
    state = getattr(linear, "parallel_state", None)
    if state is not None:
        quantizer.sync_amax_across_distributed_group(state.tensor_parallel_group)

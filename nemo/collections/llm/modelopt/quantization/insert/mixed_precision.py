"""Mixed precision: modelopt's ``auto_quantize`` search (gradient scores, integer program) for each layer's format."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state

import modelopt
from modelopt.torch.opt.conversion import apply_mode
from modelopt.torch.quantization import algorithms
from modelopt.torch.quantization.mode import QuantizeModeRegistry
from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer

from ..._parallel import device_of, gather_objects, global_name
from ...errors import ModelOptConfigError
from .. import quant_cfg_choices as choices
from .. import quant_cfg_entries
from ..calibration import batching, sources
from . import gated_amax, kv_cache
from .searcher import Searcher, check_supported

UNQUANTIZED = "none"


def insert(
    mtq: Any,
    core: torch.nn.Module,
    quant_cfg: dict[str, Any],
    formats: dict[str, dict[str, Any]],
    batches: list[torch.Tensor],
    config: Any,
) -> dict[str, Any]:
    """Search, calibrate, and quantize the KV cache if the quant_cfg includes it; see `quantize`.

    Args:
        mtq: ``modelopt.torch.quantization``.
        core: This rank's Megatron-Core model.
        quant_cfg: The quant_cfg for the KV cache only.
        formats: Name to quant_cfg, see `quant_cfg.auto_formats`.
        batches: This data-parallel rank's micro-batches `[b, s]`.
        config: The QuantizationConfig.
    """
    size = (config.calibration_dataset_size, config.calibration_batch_size, config.calibration_seq_len, config.packed)
    data = (sources.label(config.calibration_dataset), config.calibration_column, config.calibration_shuffle_seed)
    with kv_cache.attention_support(choices.has_kv_cache(quant_cfg)):
        kv_cache.settle(core, quant_cfg, config.enable_kv_cache)
        bits, checkpoint = config.auto_quantize_bits, config.auto_quantize_checkpoint
        chosen = quantize(core, formats, bits, batches, checkpoint, {"calibration data": (*data, *size)})
    gated_amax.mend(core)
    if choices.has_kv_cache(quant_cfg):
        quantize_kv_cache(mtq, core, quant_cfg, kv_cache_loop(batches))
    return chosen


def quantize(
    core: torch.nn.Module,
    formats: dict[str, dict[str, Any]],
    bits: float,
    batches: list[torch.Tensor],
    checkpoint: str | None = None,
    identity: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Choose a format for each linear layer and calibrate it, in place.

    Args:
        core: This rank's Megatron-Core model.
        formats: Name to quant_cfg, see `quant_cfg.auto_formats`.
        bits: The average number of bits of a weight; layers that the formats exclude count 16.
        batches: This data-parallel rank's micro-batches `[b, s]`.
        checkpoint: A file or folder; a search that is stored in it resumes.
        identity: Further values that must be equal for a stored search to resume.

    Returns:
        "formats", the format of each layer of all pipeline stages, and "effective_bits".

    Raises:
        ModelOptConfigError: If the bits cannot be reached, or the checkpoint belongs to another search.
    """
    check_supported()
    excluded = excluded_layers(core, formats)
    check_reachable(core, formats, excluded, bits)
    recipes = {str(algorithms.QuantRecipe(quant_cfg, name)): name for name, quant_cfg in formats.items()}
    config = {
        "quantization_formats": [(quant_cfg, name) for name, quant_cfg in formats.items()],
        "data_loader": batches,
        "forward_step": _calibrate,
        "forward_backward_step": _score,
        "num_calib_steps": len(batches),
        "num_score_steps": len(batches),
        "disabled_layers": excluded,
        "verbose": False,
        "checkpoint": checkpoint,
        "identity": {**(identity or {}), **_identity(core, formats)},
    }
    core = apply_mode(core, mode="auto_quantize", registry=QuantizeModeRegistry)
    from modelopt.torch.quantization.conversion import set_quantizer_by_cfg

    set_quantizer_by_cfg(core, quant_cfg_entries.disabled("*")["quant_cfg"])
    searcher = Searcher()
    best = searcher.search(core, {"effective_bits": bits}, config=config)
    if not best["is_satisfied"]:
        raise ModelOptConfigError(
            f"auto_quantize_bits={bits}: the search found no formats within this budget (its best choice takes "
            f"{searcher.effective_bits:.2f} bits)."
        )
    chosen = {layer: recipe for name, recipe in best["recipe"].items() for layer in searcher.layers_of(name)}
    layers = {global_name(core, name): recipes.get(str(recipe), UNQUANTIZED) for name, recipe in chosen.items()}
    stages = gather_objects(layers, parallel_state.get_pipeline_model_parallel_group())
    return {
        "formats": {name: fmt for stage in stages for name, fmt in stage.items()},
        "effective_bits": searcher.effective_bits,
    }


def kv_cache_loop(batches: list[torch.Tensor]) -> Callable[[torch.nn.Module], None]:
    """Return the forward loop that calibrates the KV cache on some micro-batches."""
    return lambda model: _calibrate(model, batches, "Calibration of the KV cache")


def quantize_kv_cache(
    mtq: Any, core: torch.nn.Module, quant_cfg: dict[str, Any], forward_loop: Callable[[torch.nn.Module], None]
) -> None:
    """Enable and calibrate the KV-cache quantizers of a quantized model, with all others disabled.

    Statistics of an earlier calibration are dropped.
    """
    cache = quant_cfg_entries.copy_of(quant_cfg, lambda wildcard: "bmm_quantizer" in wildcard)
    mtq.set_quantizer_by_cfg(core, cache["quant_cfg"])
    for name, module in core.named_modules():
        if "bmm_quantizer" in name and isinstance(module, TensorQuantizer) and module.is_enabled:
            module.reset_amax()
    only = quant_cfg_entries.disabled("*")
    quant_cfg_entries.extend(only, cache)
    with mtq.set_quantizer_by_cfg_context(core, only["quant_cfg"]):
        mtq.calibrate(core, "max", forward_loop)


def linear_layers(core: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the layers that modelopt can quantize by their weight `[out, in]`."""
    return {
        name: module
        for name, module in core.named_modules()
        if type(module) in QuantModuleRegistry
        and isinstance(getattr(module, "weight", None), torch.Tensor)
        and module.weight.dim() == 2
        and not isinstance(module, torch.nn.Embedding)
    }


def excluded_layers(core: torch.nn.Module, formats: dict[str, dict[str, Any]]) -> list[str]:
    """Return the layers that one of the formats excludes by name, such as the output layer and routers."""
    patterns = {"vision_projection.*"}
    for quant_cfg in formats.values():
        for entry in quant_cfg_entries.entries(quant_cfg):
            if entry.disables and entry.wildcard != "*" and entry.module_class is None:
                patterns.add(entry.wildcard)
    return [
        name
        for name in linear_layers(core)
        if any(fnmatch.fnmatch(f"{name}.weight_quantizer", pattern) for pattern in patterns)
    ]


def check_reachable(
    core: torch.nn.Module, formats: dict[str, dict[str, Any]], excluded: list[str], bits: float
) -> None:
    """Check that the smallest format in all layers takes no more bits than requested.

    Raises:
        ModelOptConfigError: With the fewest bits that can be reached.
    """
    lowest = min(choices.weight_bits(quant_cfg) for quant_cfg in formats.values())
    taken = total = 0
    for name, module in linear_layers(core).items():
        total += module.weight.numel()
        taken += module.weight.numel() * (16 if name in excluded else lowest)
    sums = torch.tensor([taken, total], dtype=torch.float64, device=device_of(core))
    torch.distributed.all_reduce(sums, group=parallel_state.get_model_parallel_group())
    least = float(sums[0] / sums[1])
    if bits < least:
        raise ModelOptConfigError(
            f"auto_quantize_bits={bits} cannot be reached on this model: at least {least:.2f}, with {lowest} bits in "
            f"every layer except those that stay in 16 bits (on this rank: {excluded}). Use more bits or a "
            "smaller format."
        )


def _calibrate(model, batches: list[torch.Tensor], title: str) -> None:
    with batching.output_layer_skipped(model):
        batching.run_forward(model, batches, title=title)


def _score(model, batches: list[torch.Tensor], title: str) -> None:
    """Run forward and backward for one micro-batch at a time: modelopt stores the differences of one."""
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    schedule = get_forward_backward_func()
    for batch in batching.with_progress(batches, len(batches), title):
        # A single token has no next token to predict.
        if batch.shape[1] < 2:
            continue
        schedule(
            forward_step_func=_loss_step,
            data_iterator=iter([batch]),
            model=model,
            num_microbatches=1,
            seq_length=batch.shape[1],
            micro_batch_size=batch.shape[0],
            forward_only=False,
        )


def _loss_step(data_iterator, model):
    tokens = next(data_iterator)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    output = model(tokens, positions, None, labels=tokens.roll(-1, 1))

    def total(losses):
        # The sum, for the gradient of a log-likelihood; the last token has no successor.
        loss = losses[:, :-1].float().sum()
        return loss, {"loss": loss.detach()}

    return output, total


def _identity(core: torch.nn.Module, formats: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what must be equal for a stored search to resume: formats, layout, layers and weights."""
    weights = [module.weight.detach() for module in linear_layers(core).values()]
    # Neither a copy in fp32 nor a read for each weight.
    sums = [torch.linalg.vector_norm(weight, 1, dtype=torch.float32) for weight in weights]
    has_experts = any(".local_experts." in name for name in linear_layers(core))
    return {
        **({"experts": "one format for each layer"} if has_experts else {}),
        # Later searches count the bits of scales, and check more before they continue.
        "modelopt": modelopt.__version__,
        "formats": repr(formats),
        "ranks": (
            torch.distributed.get_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        ),
        "layers": {name: tuple(module.weight.shape) for name, module in linear_layers(core).items()},
        # Rounded, because another device may sum in another order.
        "weights": f"{sum(torch.stack(sums).tolist()) if sums else 0.0:.4e}",
    }

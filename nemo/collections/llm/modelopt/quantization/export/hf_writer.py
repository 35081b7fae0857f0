"""Write Megatron-Core models as Hugging Face checkpoints, quantized or plain, in any layout of ranks."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nemo.utils.get_rank import is_global_rank_zero

from ... import _parallel, _staging
from . import hf_configs, hf_describe, hf_files, hf_kv_cache, hf_names, hf_shards, hf_sizes, input_scales, parts
from .layouts import layer as layers_
from .layouts import modelopt as modelopt_layout

# The largest size of a file, as in transformers.
MAX_SHARD_BYTES = 5_000_000_000


def write(
    model: Any,
    exporter: Any,
    tokenizer: Any,
    target: Path,
    dtype: torch.dtype = torch.bfloat16,
    layout: Any = modelopt_layout,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model; all ranks must call.

    Args:
        model: This rank's Megatron-Core model.
        exporter: NeMo's exporter for the class of the model.
        tokenizer: The ``transformers`` tokenizer to write, or None.
        target: The checkpoint's folder.
        dtype: The dtype of all tensors that are not quantized.
        layout: A module of `layouts`, which names and packs the tensors of quantized layers.
        max_shard_bytes: The largest size of a file; a larger tensor has a file of its own.

    Raises:
        NamesError: If NeMo's exporter does not define the whole checkpoint.
        SizesError: If its Hugging Face class cannot have the model's sizes.
        ExportError: If a layer cannot be stored.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(layout.scales_as_stored(model, dtype))
        with _staging.fail_together("Reading the quantized layers"):
            layers = _layers(model)
        cache = _kv_cache(model)
        if layout is modelopt_layout:
            input_scales.add_missing(model, layers)
        stack.enter_context(input_scales.folded(model, layers, dtype))
        directory = parts.Directory(model, layers)
        shapes = directory.shapes()
        hf_config = hf_configs.of(exporter, model, tokenizer, hf_names.rows_of_embedding(shapes))
        names = hf_names.of(model, exporter, hf_config, shapes)
        hf_sizes.check(names, shapes, hf_config, model.config)
        writer = hf_shards.Writer(names, directory, layout, dtype)
        writer.write(Path(target), max_shard_bytes, _cache_scales(model, names, layout) if cache else {})
    formats = {name: found for part in _parallel.gather_objects(writer.formats) for name, found in part.items()}
    with _staging.fail_together("Writing the configuration"):
        if is_global_rank_zero():
            hf_config.save_pretrained(target)
            hf_files.name_dtype(Path(target), dtype)
            if tokenizer is not None:
                tokenizer.save_pretrained(target)
            hf_describe.describe(Path(target), layout, formats, cache, names.head)


def _layers(model: torch.nn.Module) -> dict[int, layers_.Layer]:
    """Return what is stored for each quantized layer of this rank, by the module's id.

    Raises:
        ExportError: If a layer has a format that cannot be stored.
    """
    found = {}
    for name, module in model.named_modules():
        if layers_.settings_of(module) is None:
            continue
        layer = layers_.read(module) if isinstance(getattr(module, "weight", None), torch.Tensor) else None
        if layer is None:
            raise _staging.ExportError(
                f"{name} has a quantized weight that Hugging Face files cannot store. Its format is not supported, it "
                "was not calibrated, or it holds several experts (moe_grouped_gemm)."
            )
        found[id(module)] = layer
    return found


def _kv_cache(model: torch.nn.Module) -> str | None:
    """Return ``kv_cache_quant_algo`` of a model; all ranks must call.

    Raises:
        ExportError: If layers have different formats.
    """
    found = set().union(*_parallel.gather_objects(hf_kv_cache.formats(model)))
    if len(found) > 1:
        raise _staging.ExportError(
            f"A Hugging Face checkpoint has one KV-cache format for all layers, not {sorted(map(str, found))}."
        )
    return found.pop() if found else None


def _cache_scales(model: torch.nn.Module, names: hf_names.Names, layout: Any) -> dict[int, dict[str, torch.Tensor]]:
    """Return the scales of the KV cache of all ranks by layer number from 0; all ranks must call."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for scales in _parallel.gather_objects(hf_kv_cache.scales(model, names.attention(), layout)):
        for number, tensors in scales.items():
            found.setdefault(number, tensors)
    return found


def write_with(write: Callable, model: Any, hf_config: Any, tokenizer: Any, target: Path, **kwargs: Any) -> None:
    """Write a model with a function that has the arguments of ``modelopt.torch.export.export_mcore_gpt_to_hf``.

    Args:
        write: The function.
        model: This rank's Megatron-Core model.
        hf_config: The ``transformers`` configuration.
        tokenizer: The ``transformers`` tokenizer to write, or None.
        target: The checkpoint's folder.
        **kwargs: Further arguments of the function.
    """
    hf_config = hf_configs.corrected(hf_config, model)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as source:
        hf_config.save_pretrained(source)
        hf_files.name_dtype(Path(source), kwargs.get("dtype", torch.bfloat16))
        # modelopt's function loads a tokenizer from there, and fails for some classes if there is none.
        if tokenizer is not None:
            tokenizer.save_pretrained(source)
        write(model, pretrained_model_name_or_path=source, export_dir=str(target), **kwargs)


def is_own(write: Callable) -> bool:
    """Return whether a function is modelopt's own writer, and not a replacement of it."""
    from modelopt.torch.export import unified_export_megatron

    return write is unified_export_megatron.export_mcore_gpt_to_hf

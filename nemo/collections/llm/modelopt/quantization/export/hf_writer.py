"""Write Hugging Face checkpoints with an extended version of modelopt's writer.

modelopt's writer names and splits the tensors of Megatron-Core models for each architecture. It does not store
``pre_quant_scale``, cannot split the scales of INT8, and stores the part of a tensor-parallel rank as the whole tensor.
While it writes, four of its functions are replaced by functions of this file, and tensor-parallel parts are gathered.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.utils.get_rank import is_global_rank_zero

from ... import _parallel, _staging
from ...errors import ModelOptConfigError
from . import hf_blocks, hf_describe, hf_encoding, hf_files, hf_kv_cache, input_scales, tensor_parallel


def write(model, hf_config, tokenizer, target: Path, write: Callable, **kwargs: Any) -> None:
    """Write a Megatron-Core model as a Hugging Face checkpoint, quantized or plain, at any parallel size.

    Args:
        model: This rank's Megatron-Core model.
        hf_config: The ``transformers`` configuration.
        tokenizer: The ``transformers`` tokenizer to write, or None.
        target: The checkpoint's folder.
        write: ``modelopt.torch.export.export_mcore_gpt_to_hf``.
        **kwargs: Further arguments of ``write``.
    """
    hf_config = hf_describe.with_architecture(hf_config)
    parallel = parallel_state.model_parallel_is_initialized()
    # The first data-parallel and tensor-parallel rank of each pipeline stage writes all tensors of that stage.
    writes = not parallel or (
        parallel_state.get_data_parallel_rank() == 0 and parallel_state.get_tensor_model_parallel_rank() == 0
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        source = stack.enter_context(tempfile.TemporaryDirectory())
        hf_config.save_pretrained(source)
        hf_files.name_dtype(Path(source), kwargs.get("dtype", torch.bfloat16))
        hf_describe.name_tied(Path(source) / "config.json", model)
        # The writer loads a tokenizer from there, and fails for some classes if there is none.
        if tokenizer is not None:
            tokenizer.save_pretrained(source)
        folder = str(target) if writes else stack.enter_context(tempfile.TemporaryDirectory())
        Path(folder).mkdir(parents=True, exist_ok=True)
        layers = {id(module): layer for module in model.modules() if (layer := hf_encoding.read(module)) is not None}
        cache = _kv_cache(model)
        if isinstance(model, torch.nn.Module):
            input_scales.add_missing(model, layers)
        stack.enter_context(tensor_parallel.whole_tensors(model, layers, writes))
        stack.enter_context(_without_padding(model, hf_config.vocab_size))
        if isinstance(model, torch.nn.Module):
            stack.enter_context(input_scales.folded(model, layers, kwargs.get("dtype", torch.bfloat16)))
            names = hf_describe.names_of(hf_config)
            extra = hf_kv_cache.scales(model, names.attention) if cache else {}
            stack.enter_context(_extended(layers, extra, model.config.num_layers, writes))
        write(model, pretrained_model_name_or_path=source, export_dir=folder, **kwargs)
    with _staging.fail_together("Writing the configuration"):
        if is_global_rank_zero() and isinstance(model, torch.nn.Module):
            hf_describe.describe(target, layers, cache, names.head)


def _kv_cache(model) -> str | None:
    """Return ``kv_cache_quant_algo`` of a model; all ranks must call.

    Raises:
        ExportError: If layers have different formats.
    """
    own = hf_kv_cache.formats(model) if isinstance(model, torch.nn.Module) else set()
    found = set().union(*_parallel.gather_objects(own))
    if len(found) > 1:
        raise _staging.ExportError(
            f"A Hugging Face checkpoint has one KV-cache format for all layers, not {sorted(map(str, found))}."
        )
    return found.pop() if found else None


@contextlib.contextmanager
def _without_padding(model, vocabulary: int) -> Iterator[None]:
    """Remove the rows that pad the vocabulary from the embedding and the output layer, inside the context."""
    layers = [
        getattr(getattr(model, "embedding", None), "word_embeddings", None),
        getattr(model, "output_layer", None),
    ]
    weights = {id(w): w for w in (getattr(layer, "weight", None) for layer in layers) if w is not None}
    whole = [(weight, weight.data) for weight in weights.values() if weight.shape[0] > vocabulary]
    for weight, data in whole:
        weight.data = data[:vocabulary]
    try:
        yield
    finally:
        for weight, data in whole:
            weight.data = data


def _replaced_functions() -> tuple[list[tuple[Any, str]], bool]:
    """Return owner and name of each function of modelopt's writer to replace, and whether it keeps one flat state.

    Raises:
        ModelOptConfigError: If the writer of the installed modelopt lacks one of these functions.
    """
    from modelopt.torch.export import unified_export_megatron as writer

    exporter = writer.GPTModelExporter
    # modelopt 0.37 has a function instead of the method of later versions, and keeps all layers in one state.
    states = (exporter, "_get_quantized_state")
    if not hasattr(*states):
        states = (writer, "get_quantized_state")
    is_flat = not hasattr(writer, "save_safetensors_by_layer_index")
    saver = "save_safetensors" if is_flat else "save_safetensors_by_layer_index"
    names = [states, (exporter, "_get_state_dict"), (writer, "to_quantized_weight"), (writer, saver)]
    missing = [name for owner, name in names if not hasattr(owner, name)]
    if missing:
        raise ModelOptConfigError(
            f"The Hugging Face writer of the installed nvidia-modelopt lacks {missing}; install a supported version."
        )
    return names, is_flat


@contextlib.contextmanager
def _extended(
    layers: dict[int, hf_encoding.Layer], extra: dict[int, dict[str, torch.Tensor]], total_layers: int, writes: bool
) -> Iterator[None]:
    """Extend modelopt's writer by the formats of `hf_encoding` and the scales of the KV cache, inside the context.

    Args:
        layers: What is stored for each layer, by the module's id.
        extra: The scales of the KV cache: number of a layer, from 1, to tensors by name.
        total_layers: Layers of the whole model.
        writes: Whether this rank writes.

    Raises:
        ModelOptConfigError: If the writer of the installed modelopt lacks one of these functions.
    """
    names, is_flat = _replaced_functions()
    originals = [(owner, name, getattr(owner, name)) for owner, name in names]
    state_of, all_states, quantize, _ = (original for _, _, original in originals)

    def quantized_state(*args, **kwargs):
        module, dtype = args[-2:]
        layer = layers.get(id(module))
        if layer is None:
            return hf_blocks.state_of(state_of, *args, **kwargs)
        return _stored(module, layer, dtype), layer.algorithm, None

    def to_quantized(weight, scale, algorithm, *args, **kwargs):
        if algorithm in {layer.algorithm for layer in layers.values()}:
            return hf_encoding.encode(algorithm, weight, scale)
        return quantize(weight, scale, algorithm, *args, **kwargs)

    def save(layer_state_dicts, *args, **kwargs):
        save_layers(_with_cache(layer_state_dicts, extra), *args, **kwargs)

    def save_flat(state, folder):
        save(by_layer(state, total_layers), total_layers, folder, "model-{:05d}-of-{:05d}")

    replacements = [
        quantized_state,
        all_states if writes else lambda self: None,
        to_quantized,
        save_flat if is_flat else save,
    ]
    try:
        for (owner, name), replacement in zip(names, replacements, strict=True):
            setattr(owner, name, replacement)
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _stored(module, layer: hf_encoding.Layer, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors of a quantized layer, for modelopt's writer to split and name."""
    # The codes are computed from the weight itself, not from one that is rounded to the export's dtype. The writer
    # splits values, and `hf_encoding.encode` turns them into the same codes again.
    codes = hf_encoding.codes_of(module, layer) if layer.codes is None else layer.codes
    state = {"weight": hf_encoding.values_of(layer, codes).cpu(), "weight_scale": layer.scale.cpu()}
    if getattr(module, "bias", None) is not None and module.bias.numel() > 0:
        state["bias"] = module.bias.detach().to(dtype).cpu()
    for name in ("weight_scale_2", "input_scale", "pre_quant_scale"):
        value = getattr(layer, name.removeprefix("weight_"))
        if value is not None:
            state[name] = (value.to(dtype) if name == "pre_quant_scale" else value).cpu()
    return state


def _with_cache(
    layer_state_dicts: dict[int, dict[str, torch.Tensor]], extra: dict[int, dict[str, torch.Tensor]]
) -> dict[int, dict[str, torch.Tensor]]:
    """Return the layers' tensors with the scales of the KV cache under the names that readers expect.

    modelopt's Megatron writer uses other names, and does not store them for some architectures.
    """
    found = {}
    for number, state in layer_state_dicts.items():
        kept = {name: value for name, value in state.items() if not name.endswith((".k_scale", ".v_scale"))}
        found[number] = {**kept, **extra.get(number, {})}
    return found


def by_layer(state: dict[str, torch.Tensor], total_layers: int) -> dict[int, dict[str, torch.Tensor]]:
    """Return a state by layer number, from 1, with the embedding in the first and the output layer in the last."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        number = int(layer[1]) + 1 if layer else 1 if "embed" in name else total_layers
        found.setdefault(number, {})[name] = value
    return found


def save_layers(layer_state_dicts: dict, total_layers: int, save_directory, name_template: str, **_: Any) -> None:
    """Write one file for each layer of this rank, and the index of all ranks' files on rank zero.

    Args:
        layer_state_dicts: Number of a layer, from 1, to its tensors by name.
        total_layers: Layers of the whole model.
        save_directory: The checkpoint's folder.
        name_template: Template of the file names.

    Raises:
        ExportError: If another rank could not write its files.
    """
    names: dict[str, str] = {}
    size = 0
    # With modelopt's function, the other ranks hang if the disk is full on one of them.
    with _staging.fail_together("Writing the weights"):
        for number in sorted(layer_state_dicts):
            file = name_template.format(number, total_layers) + ".safetensors"
            tensors = tidy(layer_state_dicts[number])
            _save(tensors, Path(save_directory) / file)
            names.update(dict.fromkeys(tensors, file))
            size += sum(value.numel() * value.element_size() for value in tensors.values())
    parts = _parallel.gather_objects((names, size))
    if is_global_rank_zero():
        weight_map = {name: file for part, _ in parts for name, file in part.items()}
        index = {"metadata": {"total_size": sum(size for _, size in parts)}, "weight_map": weight_map}
        (Path(save_directory) / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a file with the permissions of the user's umask; safetensors creates files with mode 0600."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(mode)


def tidy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a layer's tensors as they are stored: contiguous copies, and scales of INT8 as `[o]`."""
    tensors = {}
    for name, value in state.items():
        codes = state.get(name.removesuffix("_scale"))
        if name.endswith(".weight_scale") and codes is not None and codes.dtype == torch.int8:
            value = value.squeeze(-1)
        tensors[name] = value.clone(memory_format=torch.contiguous_format)
    return tensors

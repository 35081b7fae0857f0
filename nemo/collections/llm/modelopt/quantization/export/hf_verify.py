"""Verify a written Hugging Face checkpoint against the model in memory: codes, scales and logits.

The logits are compared twice. Without rounded inputs, both models compute the same sums, in a different order. With
rounded inputs, an input near the boundary between two codes may be rounded either way; the bound allows for that.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero

from modelopt.torch.quantization.nn import TensorQuantizer
from nemo_modelopt_dropin.console import screen

from ... import _parallel
from ..._staging import ExportError
from ..calibration import batching
from . import hf_contents, hf_files, hf_kv_cache, hf_stored, hf_streamed, input_scales, tensor_parallel
from .layouts import inputs
from .layouts.layer import INT4, Layer

# Sequence of the comparison: long enough for rotary embeddings and masks to matter.
_CHECKED_TOKENS = 32
# Relative error of the logits without rounded inputs, by the dtype that the model in memory computes in. Tensors that
# are not quantized are rounded to the checkpoint's dtype for the comparison. In fp32 only the order of sums differs; in
# 16 bits each layer adds a rounding error.
_TOLERANCE_FP32 = 1e-4
_TOLERANCE_COMPUTED_16 = 0.08
# What the time of a comparison is made of, for `expected_seconds`: reading the files from a disk, and decoding weights
# and two forward passes in fp32 on a few cores.
_BYTES_PER_SECOND = 1e9
_SECONDS_PER_BILLION = 8.0
# Seconds from which on the duration is reported beforehand.
_WORTH_TELLING = 20.0
# The default implementation of attention ignores Gemma's capped scores.
_SETTINGS = {"torch_dtype": torch.float32, "attn_implementation": "eager"}
# With rounded inputs the difference is at most this multiple of the change that rounding causes. If every rounding
# were independent, it would be the square root of two.
_FLIPS = 2.0
# Values that are compared at a time: copies of an embedding would be a fifth of a small model.
_VALUES = 2**22


class Logits(NamedTuple):
    """Logits `[1, s, v]` in fp32.

    Attributes:
        exact: Without quantizing inputs.
        rounded: With quantized inputs.
    """

    exact: torch.Tensor
    rounded: torch.Tensor


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def load(folder: Path) -> torch.nn.Module:
    """Return the ``transformers`` model in fp32 on the CPU with the dequantized weights of a checkpoint.

    The inputs of its linear layers are scaled and quantized as in the checkpoint, by modelopt's quantizers.
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    formats = hf_stored.formats(folder)
    tensors = dict(hf_files.read_tensors(folder))
    # All weights are replaced; drawing random ones first would take longer than the comparison.
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(hf_files.plain_config(folder), **_SETTINGS).eval()
    quantized = hf_stored.quantized_names(tensors)
    names = {f"{name}.weight" for name in quantized} | {name for name in tensors if _is_plain(name, quantized)}
    found = ((name, _dequantized(name, tensors, quantized, formats)) for name in names)
    weights = {name: value.float() for name, value in found if value is not None}
    # Assigned, not copied: one fp32 model is in memory, and not two.
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    for name in quantized:
        module = model.get_submodule(name)
        second = _quantize_like(module, _layer(name, tensors, formats))
        if second is not None:
            torch.nn.utils.parametrize.register_parametrization(module, "weight", second)
    hf_kv_cache.attach(model, tensors, hf_files.kv_cache_of(folder))
    return model


def streamed(folder: Path) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    """Return the model of `load` without its weights, and its parts, each of which reads its own while it runs."""
    formats = hf_stored.formats(folder)
    tensors = dict(hf_files.read_tensors(folder))  # mapped, not read
    model = hf_streamed.without_weights(hf_files.plain_config(folder), **_SETTINGS)
    quantized = hf_stored.quantized_names(tensors)
    buffers = {name for name, _ in model.named_buffers() if name in tensors}
    model.load_state_dict({name: tensors[name].float() for name in buffers}, strict=False)
    rounding = {}
    for name in quantized:
        module = model.get_submodule(name)
        second = _quantize_like(module, _layer(name, tensors, formats))
        if second is not None:
            module.weight_rounding = rounding[f"{name}.weight"] = second

    def source(name: str) -> torch.Tensor | None:
        value = _dequantized(name, tensors, quantized, formats)
        return rounding[name](value) if name in rounding and value is not None else value

    parts = hf_streamed.read_when_run(model, source)
    hf_kv_cache.attach(model, tensors, hf_files.kv_cache_of(folder))
    return model, parts


def _is_plain(name: str, quantized: set[str]) -> bool:
    """Return whether a tensor is a parameter or buffer of the model as it is stored."""
    return not hf_files.is_scale(name) and hf_stored.split(name)[0] not in quantized or name.endswith(".bias")


def _dequantized(
    name: str, tensors: dict[str, torch.Tensor], quantized: set[str], formats: hf_stored.Formats
) -> torch.Tensor | None:
    """Return a parameter of the model in fp32, or as it is stored if it is not quantized; None if there is none."""
    module, leaf = hf_stored.split(name)
    if module in quantized and leaf == "weight":
        return formats.decode(module, _parts_of(module, tensors, formats))
    return tensors[name] if name in tensors and _is_plain(name, quantized) else None


def _parts_of(name: str, tensors: dict[str, torch.Tensor], formats: hf_stored.Formats) -> dict[str, torch.Tensor]:
    return {leaf: value for leaf in formats.leaves() if (value := tensors.get(f"{name}.{leaf}")) is not None}


def _layer(name: str, tensors: dict[str, torch.Tensor], formats: hf_stored.Formats) -> Layer:
    """Return a quantized layer without its codes."""
    return replace(formats.layer(name, _parts_of(name, tensors, formats)), codes=None)


def _quantize_like(module: torch.nn.Module, layer: Layer) -> TensorQuantizer | None:
    """Make a layer scale and quantize its input as what is stored for it implies.

    Returns:
        The quantizer that rounds INT4 weights to FP8, or None.
    """
    if layer.pre_quant_scale is not None:
        pre = layer.pre_quant_scale.float()
        module.register_forward_pre_hook(lambda _, args: (args[0] * pre,))
    quantizer = inputs.input_quantizer(layer)
    if quantizer is not None:
        module.input_quantizer = quantizer
        module.register_forward_pre_hook(lambda module, args: (module.input_quantizer(args[0]),))
    if layer.algorithm in INT4 and layer.scale_2 is not None:
        return inputs.static_quantizer("FP8", layer.scale_2)
    return None


def tokens(vocabulary: int) -> torch.Tensor:
    """Return the token ids `[1, s]` of the comparison; they are the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (1, _CHECKED_TOKENS), generator=generator)


def stored_logits(folder: Path, vocabulary: int) -> Logits:
    """Return the logits of a checkpoint.

    Args:
        folder: The checkpoint.
        vocabulary: Entries without padding.
    """
    model, parts = streamed(folder)
    ids = tokens(vocabulary)
    with torch.no_grad(), screen.bar(total=2 * len(parts), desc="Logits of the files", delay=5.0) as bar:
        for part in parts:
            part.register_forward_hook(lambda *_: bar.update() and None)
        rounded = model(ids).logits.float()
        with switched_off(model, lambda name, quantizer: True):
            return Logits(model(ids).logits.float(), rounded)


# --- the model in memory ----------------------------------------------------------------------------------------------


def quantized_logits(core, vocabulary: int) -> Logits:
    """Return the logits of the quantized model in memory, on every rank.

    Args:
        core: This rank's Megatron-Core model; all ranks must call.
        vocabulary: Entries without padding.
    """
    with _not_stored_disabled(core):
        rounded = _logits(core, vocabulary)
        with switched_off(core, _rounds_on_the_way):
            return Logits(_logits(core, vocabulary), rounded)


def _logits(core, vocabulary: int) -> torch.Tensor:
    outputs: list[torch.Tensor] = []
    device = _parallel.device_of(core)
    was_training = core.training
    core.eval()
    batching.run_forward(core, [tokens(vocabulary).to(device)], outputs.append, "Logits of the export")
    core.train(was_training)
    logits = torch.zeros(1, _CHECKED_TOKENS, vocabulary, device=device)
    if outputs:
        # `[b, s, v]`, split along the vocabulary.
        found = outputs[0].detach().float()
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            found = tensor_parallel.gather(found, found.dim() - 1)
        logits = found[..., :vocabulary].contiguous()
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(logits, last, group=parallel_state.get_pipeline_model_parallel_group())
    return logits.cpu()


@contextlib.contextmanager
def switched_off(model: torch.nn.Module, which: Callable[[str, TensorQuantizer], bool]) -> Iterator[None]:
    """Disable the rounding of quantizers inside the context; a ``pre_quant_scale`` still applies.

    Args:
        model: The model.
        which: Returns whether to disable a quantizer, from its name and the quantizer.
    """
    switched = [
        module
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled and which(name, module)
    ]
    for quantizer in switched:
        quantizer.disable_quant()
    try:
        yield
    finally:
        for quantizer in switched:
            quantizer.enable_quant()


def _rounds_on_the_way(name: str, quantizer: TensorQuantizer) -> bool:
    """Return whether a quantizer rounds computed values: inputs, the KV cache, or INT4 values to FP8 (W4A8)."""
    return not name.endswith(("weight_quantizer", "weight_quantizer.0"))


def _not_stored_disabled(core) -> contextlib.AbstractContextManager[None]:
    """Disable the quantizers that `load` does not reproduce, those of NVFP4 caches, inside the context."""
    return switched_off(core, _is_not_imitated)


def _is_not_imitated(name: str, quantizer: TensorQuantizer) -> bool:
    return "bmm_quantizer" in name and not hf_kv_cache.is_imitated(name, quantizer)


@contextlib.contextmanager
def rounded(core: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Round all parameters that are not quantized to a checkpoint's dtype, inside the context.

    Otherwise an input that is rounded to the neighbouring code differs by a whole step, and the difference grows with
    the depth of the model. A norm that is stored multiplied by the input scale of the next layer is rounded after that
    multiplication.
    """
    kept = []
    norms = input_scales.norms_as_stored(core, dtype)
    for module in core.modules():
        quantizer = getattr(module, "weight_quantizer", None)
        for name, parameter in module.named_parameters(recurse=False):
            value = norms.get(id(parameter))
            if value is None:
                if parameter.dtype == dtype or (name == "weight" and getattr(quantizer, "is_enabled", False)):
                    continue
                if _is_exact(parameter.data, dtype):
                    continue
                value = parameter.data.to(dtype)
            kept.append((parameter, parameter.data))
            parameter.data = value.to(parameter.dtype)
    try:
        with input_scales.rounded(core, dtype), hf_kv_cache.as_stored(core):
            yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def _is_exact(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether values, such as weights that come from a checkpoint in 16 bits, are numbers of a dtype."""
    return all(torch.equal(part, part.to(dtype).to(part.dtype)) for part in values.flatten().split(_VALUES))


# --- the comparison ---------------------------------------------------------------------------------------------------


def tolerance(computed: torch.dtype) -> float:
    """Return the largest relative error of logits without rounded inputs that the order of sums can cause.

    Args:
        computed: The dtype of the model in memory.
    """
    return _TOLERANCE_FP32 if computed == torch.float32 else _TOLERANCE_COMPUTED_16


def compare(folder: Path, expected: Logits, limit: float) -> float:
    """Compare a checkpoint's logits; return the relative error without rounded inputs.

    Args:
        folder: The checkpoint.
        expected: What `quantized_logits` returned.
        limit: See `tolerance`.

    Raises:
        ExportError: If the logits differ by more than rounding can cause.
    """
    if not all(bool(torch.isfinite(logits).all()) for logits in expected):
        raise ExportError(
            "The logits of the quantized model in memory are not finite, so the checkpoint cannot be compared with it. "
            "Its weights or calibration statistics contain NaN or infinity. Check the logits of the original model: if "
            "they are not finite either, the cause is in that model."
        )
    found = stored_logits(folder, expected.exact.shape[-1])
    error = _difference(found.exact, expected.exact)
    flips = max(limit, _FLIPS * _difference(expected.rounded, expected.exact))
    for value, bound, how in [
        (error, limit, "without quantizing inputs"),
        (_difference(found.rounded, expected.rounded), flips, "with quantized inputs"),
    ]:
        if not value <= bound:
            raise ExportError(
                f"The checkpoint's logits differ from those of the model in memory: relative error {value:.3g} "
                f"{how}, but rounding causes at most {bound:.3g}. The checkpoint was deleted. Please report this "
                "with the model's class and the algorithm. To export without this comparison, use "
                "ExportConfig(verify='files')."
            )
    with screen.results():
        logging.info(f"Logits of the written checkpoint agree with the model in memory: relative error {error:.2g}")
    return error


def announce(folder: Path) -> None:
    """Log how large the comparison is and about how long it takes, if that is worth waiting for."""
    parameters = sum(shape.numel() for shape in hf_files.expected_shapes(folder).values())
    seconds = expected_seconds(parameters, sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    if seconds >= _WORTH_TELLING:
        with screen.results():
            logging.info(
                f"Comparing the logits of the written checkpoint with the model in memory: {parameters / 1e9:.1f} "
                f"billion parameters in fp32 on {_cores()} cores of rank zero's CPU take about "
                f"{max(1, round(seconds / 60))} min. The other ranks wait. "
                "ExportConfig(verify='files') leaves this comparison out."
            )


def expected_seconds(parameters: int, stored_bytes: int) -> float:
    """Return about how long a comparison takes.

    Args:
        parameters: of the checkpoint.
        stored_bytes: size of its files.
    """
    return stored_bytes / _BYTES_PER_SECOND + parameters / 1e9 * _SECONDS_PER_BILLION


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Let PyTorch use all cores inside the context: torchrun gives each rank one thread, and the others wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(_cores())
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check_logits(core, folder: Path, dtype: torch.dtype) -> None:
    """Compare a written checkpoint's codes, scales and logits with the model in memory; all ranks must call.

    Args:
        core: This rank's Megatron-Core model.
        folder: The checkpoint.
        dtype: The dtype of the checkpoint's tensors that are not quantized.

    Raises:
        ExportError: On rank zero, if they differ by more than rounding can cause.
    """
    hf_contents.check(core, folder, dtype)
    facts: list[Any] = [None, 0]
    if is_global_rank_zero():
        facts[0] = hf_files.obstacle(folder)
        facts[1] = 0 if facts[0] else hf_files.plain_config(folder).vocab_size
    reason, vocabulary = _parallel.from_rank_zero(facts)
    if reason is not None:
        logging.warning(f"The logits of the written checkpoint were not compared: {reason}")
        return
    with hf_stored.layout(folder).scales_as_stored(core, dtype), rounded(core, dtype):
        expected = quantized_logits(core, vocabulary)
    with _parallel.while_rank_zero_works():
        if is_global_rank_zero():
            announce(folder)
            with all_cores():
                compare(folder, expected, tolerance(next(core.parameters()).dtype))

"""Write, check and apply the scales of a quantized KV cache in a Hugging Face checkpoint.

modelopt's exporter of Hugging Face models names them ``self_attn.k_proj.k_scale`` and ``self_attn.v_proj.v_scale``, the
library compressed-tensors ``self_attn.k_scale`` and ``self_attn.v_scale``. modelopt's Megatron exporter uses other
names, and has no rule for some architectures.

FP8 scales are at least 1.0, as modelopt recommends: the range of FP8 suffices, and with smaller scales, values above
those of the calibration would overflow.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from nemo.utils import logging
from transformers import DynamicCache

from modelopt.torch.quantization.nn import TensorQuantizer

from ...errors import ModelOptConfigError
from .. import quant_cfg_choices as choices
from .layouts import modelopt as modelopt_layout
from .layouts.inputs import static_quantizer

# modelopt divides amax by this number, for a cache in either format.
_MAXBOUND = 448.0
_LOWEST_FP8_SCALE = 1.0
_FORMATS = {(4, 3): "FP8", (2, 1): "NVFP4"}
_QUANTIZERS = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer")
_KEY, _VALUE = _QUANTIZERS[1:]
_NAME = re.compile(r"\blayers\.(\d+)\..*\.([kv])_scale$")
_LATENT = "readers cache one latent vector for multi-latent attention instead of keys and values"
Settings = dict[str, dict[str, Any]]


def format_of(settings: Settings) -> str | None:
    """Return ``kv_cache_quant_algo`` of one attention layer, or None if its cache is not quantized.

    Args:
        settings: Name of each enabled quantizer ("k_bmm_quantizer") to its attributes.

    Raises:
        ValueError: If a Hugging Face checkpoint cannot describe it, with the reason.
    """
    if not settings:
        return None
    if set(settings) != {_KEY, _VALUE}:
        raise ValueError(f"attention must quantize keys and values, both and nothing else, not {sorted(settings)}")
    found = {_FORMATS.get(_bits(attributes)) for attributes in settings.values()}
    if None in found or len(found) > 1 or any(attributes.get("bias") for attributes in settings.values()):
        shown = {name: f"num_bits={attributes['num_bits']}" for name, attributes in settings.items()}
        raise ValueError(f"keys and values must both be FP8 or both NVFP4, without a bias, not {shown}")
    return found.pop()


def _bits(attributes: dict[str, Any]) -> Any:
    bits = attributes["num_bits"]
    return tuple(bits) if isinstance(bits, (tuple, list)) else bits


def _attentions(core: torch.nn.Module) -> Iterator[tuple[int, str, torch.nn.Module, bool]]:
    """Yield the layer number from 0, name, module and whether it is multi-latent, for each attention of this rank."""
    for name, layer in core.named_modules():
        attention: Any = getattr(layer, "self_attention", None) if isinstance(layer, TransformerLayer) else None
        if hasattr(attention, "core_attention"):
            latent = isinstance(attention, MultiLatentAttention)
            yield layer.layer_number - 1, f"{name}.self_attention.core_attention", attention.core_attention, latent


def _present(core_attention: torch.nn.Module) -> Settings:
    """Return the enabled quantizers of a converted attention module with their attributes."""
    return {
        name: {"num_bits": q.num_bits, "bias": getattr(q, "_bias", None)}
        for name, q in core_attention.named_children()
        if isinstance(q, TensorQuantizer) and q.is_enabled
    }


def obstacle(core: torch.nn.Module, quant_cfg: dict[str, Any] | None = None) -> str | None:
    """Return why the KV cache of a model cannot be described in a Hugging Face checkpoint, or None.

    Args:
        core: This rank's Megatron-Core model.
        quant_cfg: How it will be quantized; None if it is converted already.
    """
    formats = set()
    for _, name, attention, latent in _attentions(core):
        settings = (
            _present(attention) if quant_cfg is None else choices.enabled_quantizers(quant_cfg, name, _QUANTIZERS)
        )
        try:
            formats.add(format_of(settings))
        except ValueError as error:
            return f"KV cache of {name}: {error}"
        if settings and latent:
            return _LATENT
        if quant_cfg is None and any(getattr(attention, quantizer).amax is None for quantizer in settings):
            return f"KV cache of {name}: its quantizers are not calibrated"
    if len(formats) > 1:
        return f"the KV cache must have the same format in all layers, not {sorted(map(str, formats))}"
    return None


def check_or_disable(export_format: str, quant_cfg: dict[str, Any], core: torch.nn.Module, enable: bool | None) -> None:
    """Check that a Hugging Face checkpoint can describe a quantized KV cache, or disable a cache nobody asked for.

    Args:
        export_format: The requested format.
        quant_cfg: How the model will be quantized; changed in place if the cache is disabled.
        core: This rank's Megatron-Core model.
        enable: The user's setting; the cache is disabled only if it is None.

    Raises:
        ModelOptConfigError: With the reason and what to do.
    """
    found = obstacle(core, quant_cfg) if export_format == "hf" else None
    if found is None:
        return
    if enable is None and found == _LATENT:
        logging.warning(f'export_format="hf": {found}; the KV cache is not quantized')
        choices.disable_kv_cache(quant_cfg)
        return
    raise ModelOptConfigError(
        f'export_format="hf": {found}. Set enable_kv_cache=False, change the quant_cfg, or use export_format="nemo", '
        "which supports any cache."
    )


def formats(core: torch.nn.Module) -> set[str | None]:
    """Return ``kv_cache_quant_algo`` of each of this rank's attention layers, see `format_of`."""
    return {format_of(_present(attention)) for _, _, attention, _ in _attentions(core)}


def planned_formats(core: torch.nn.Module, quant_cfg: dict[str, Any]) -> set[str | None]:
    """Return the formats of this rank's KV cache that a quant_cfg will enable, once `check_or_disable` accepted it."""
    return {format_of(choices.enabled_quantizers(quant_cfg, name, _QUANTIZERS)) for _, name, _, _ in _attentions(core)}


def scales(
    core: torch.nn.Module, prefixes: Mapping[int, str], layout: Any = modelopt_layout
) -> dict[int, dict[str, torch.Tensor]]:
    """Return the scales of this rank's KV cache: number of each layer, from 0, to tensors by name.

    Args:
        core: This rank's Megatron-Core model.
        prefixes: Prefix of the tensors of attention in the checkpoint, by layer number from 0.
        layout: A module of `layouts`, which names the scales.
    """
    found = {}
    for number, _, attention, _ in _attentions(core):
        if format_of(_present(attention)) is not None:
            quantizers = (attention.k_bmm_quantizer, attention.v_bmm_quantizer)
            found[number] = {
                f"{prefixes[number]}{leaf}": stored_scale(quantizer).cpu().reshape(layout.CACHE_SHAPE)
                for leaf, quantizer in zip(layout.CACHE_SCALES, quantizers, strict=True)
            }
    return found


def stored_scale(quantizer: TensorQuantizer) -> torch.Tensor:
    """Return the fp32 scale that a checkpoint stores for a quantizer of keys or values."""
    scale = quantizer.amax.detach().float().amax().reshape(()) / _MAXBOUND
    return scale.clamp(min=_LOWEST_FP8_SCALE) if _bits({"num_bits": quantizer.num_bits}) == (4, 3) else scale


def is_imitated(name: str, quantizer: TensorQuantizer) -> bool:
    """Return whether `attach` reproduces a quantizer of attention."""
    return name.endswith((_KEY, _VALUE)) and _bits({"num_bits": quantizer.num_bits}) == (4, 3)


@contextlib.contextmanager
def as_stored(core: torch.nn.Module) -> Iterator[None]:
    """Make a model quantize its KV cache with the scales that a checkpoint stores, inside the context."""
    kept = []
    for name, quantizer in core.named_modules():
        if isinstance(quantizer, TensorQuantizer) and quantizer.is_enabled and is_imitated(name, quantizer):
            amax = quantizer._amax
            kept.append((amax, amax.data))
            amax.data = torch.full_like(amax.data, float(stored_scale(quantizer)) * _MAXBOUND)
    try:
        yield
    finally:
        for amax, data in kept:
            amax.data = data


class QuantizedCache(DynamicCache):
    """A KV cache that quantizes its keys and values, as a cache in a narrower format does."""

    def __init__(self, quantizers: torch.nn.ModuleDict):
        """Store the quantizers, which are named by ``k`` or ``v`` and the number of the layer."""
        super().__init__()
        self._quantizers = quantizers

    def update(self, key_states, value_states, layer_idx, cache_kwargs=None):
        """Return keys and values `[b, h, s, d]` as the cache stores them."""
        key, value = (
            self._quantizers[name](states) if (name := f"{leaf}{layer_idx}") in self._quantizers else states
            for leaf, states in (("k", key_states), ("v", value_states))
        )
        return super().update(key, value, layer_idx, cache_kwargs)


def attach(model: torch.nn.Module, tensors: dict[str, torch.Tensor], cache: str | None) -> None:
    """Make a ``transformers`` model use the quantized cache that a checkpoint describes, if that is in FP8.

    Args:
        model: The model; the quantizers become submodules of it.
        tensors: The checkpoint's tensors by name.
        cache: Its ``kv_cache_quant_algo``.
    """
    scales = {f"{match[2]}{match[1]}": value for name, value in tensors.items() if (match := _NAME.search(name))}
    if cache != "FP8" or not scales:
        return
    quantizers = torch.nn.ModuleDict({n: static_quantizer("FP8", scale) for n, scale in scales.items()})
    model.kv_cache_quantizers = quantizers

    def use(module, args, keywords):
        return args, {**keywords, "past_key_values": QuantizedCache(quantizers), "use_cache": True}

    model.register_forward_pre_hook(use, with_kwargs=True)


def scale_problems(cache: str | None, names: set[str], expected: set[str], layout: Any = modelopt_layout) -> list[str]:
    """Return which scales of the KV cache are missing in a checkpoint, or not named in its configuration.

    Args:
        cache: Its ``kv_cache_quant_algo``.
        names: Names of its tensors.
        expected: Names of the tensors that ``transformers`` loads; key and value projections among them need scales.
        layout: A module of `layouts`, which names the scales.
    """
    stored = {name for name in names if _NAME.search(name)}
    if cache is None:
        return [f"{name} is stored, but the configuration has no kv_cache_quant_algo" for name in sorted(stored)]
    wanted = {
        name.removesuffix(f"{leaf}_proj.weight") + scale
        for leaf, scale in zip("kv", layout.CACHE_SCALES, strict=True)
        for name in expected
        if name.endswith(f".{leaf}_proj.weight")
    }
    if not wanted and not stored:
        return [f"the configuration has a KV cache in {cache}, but no scales for it are stored"]
    return [f"{name} is missing for a KV cache in {cache}" for name in sorted(wanted - stored)]

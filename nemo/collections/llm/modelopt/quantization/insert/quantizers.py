"""Insert and calibrate the quantizers of a model, and generate a sample with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero

from modelopt.torch.quantization.nn import TensorQuantizer
from nemo_modelopt_dropin import versions
from nemo_modelopt_dropin.console import screen

from ... import _parallel
from ...errors import ModelOptConfigError
from .. import _transformers_models, comparison
from .. import quant_cfg_choices as choices
from ..calibration import awq_search, gptq
from . import gated_amax, kv_cache, patterns

# The largest values of the formats whose input amax has a lower bound.
_MAXBOUND = {"fp8": 448, "int8_sq": 127}
_MIN_AMAX_SHARE = 0.01
# The modelopt that is known to quantize a quantized model.
_QUANTIZES_ANEW = "0.43"


def drop_quantizers(core: torch.nn.Module, algorithm: Any) -> None:
    """Disable the quantizers of a model that was quantized before, so that it can be quantized again.

    All model-parallel ranks must call it.

    Args:
        core: The Megatron-Core model.
        algorithm: The next algorithm, for the message.

    Raises:
        ModelOptConfigError: If AWQ or SmoothQuant scaled the weights, which are no longer the original ones, or the
            installed modelopt takes no quantized model.
    """
    present = sum(comparison.count_quantizers(core).values())
    if not present:
        return
    quantizers = [module for module in core.modules() if isinstance(module, TensorQuantizer)]
    scaled = sum(hasattr(quantizer, "_pre_quant_scale") for quantizer in quantizers)
    if _parallel.model_parallel_sum([scaled])[0]:
        raise ModelOptConfigError(
            "This model is quantized already, by an algorithm that scaled its weights (AWQ or SmoothQuant): quantizing "
            f"it again with {algorithm} would start from those. Quantize the original checkpoint."
        )
    installed = versions.installed_version("nvidia-modelopt") or _QUANTIZES_ANEW
    if versions.base(installed) < versions.base(_QUANTIZES_ANEW):
        raise ModelOptConfigError(
            f"This model is quantized already, and nvidia-modelopt {installed} cannot quantize it again. Quantize the "
            f"original checkpoint, or install nvidia-modelopt {_QUANTIZES_ANEW}."
        )
    for quantizer in quantizers:
        quantizer.reset_amax()
        quantizer.disable()
    if is_global_rank_zero():
        logging.warning(
            f"This model is quantized already: its {present} quantizers are dropped, and it is quantized again with "
            f"{algorithm} and compared with its current weights."
        )


def insert(
    mtq: Any,
    core: Any,
    quant_cfg: dict[str, Any],
    forward_loop: Any,
    enable_kv_cache: bool | None,
    from_file: bool = False,
) -> Any:
    """Insert the quantizers of a quant_cfg into a model and calibrate them.

    Args:
        mtq: ``modelopt.torch.quantization``.
        core: The Megatron-Core model, or a stand-in.
        quant_cfg: The quant_cfg; KV-cache quantizers that the model cannot have are removed in place.
        forward_loop: Runs calibration data through the model; None if none is needed.
        enable_kv_cache: The user's option, see `kv_cache.settle`.
        from_file: Whether the quant_cfg is the user's own, see `patterns.check`.

    Returns:
        What ``mtq.quantize`` returned.

    Raises:
        ModelOptConfigError: If requested KV-cache quantizers are impossible, a pattern matches nothing, or weights that
            should be quantized are not.
    """
    if not isinstance(core, torch.nn.Module):
        return mtq.quantize(core, quant_cfg, forward_loop)
    with kv_cache.attention_support(choices.has_kv_cache(quant_cfg)):
        kv_cache.settle(core, quant_cfg, enable_kv_cache)
        loop = forward_loop
        if loop and choices.is_awq(quant_cfg):
            loop = awq_search.one_batch_a_layer(loop)
        loop = loop and patterns.checked_loop(loop, quant_cfg, from_file)
        with patterns.checked_here(), gptq.empty_inputs_left_out():
            quantized = mtq.quantize(core, quant_cfg, loop)
    if forward_loop is None:
        patterns.check(core, quant_cfg, from_file)
    if quantized is core:  # not a stand-in's answer
        patterns.check_weights(core, quant_cfg)
    gated_amax.mend(quantized)
    return quantized


def keep_amax_from_vanishing(mtq: Any, quantized: Any, algorithm: str, formats: dict[str, str] | None = None) -> Any:
    """Set a lower bound for the amax of inputs, so that values that calibration has not seen do not overflow.

    With squared ReLU, activations can be near zero on calibration data and large on other data. The bound is 1 % of
    the largest value of the format.

    Args:
        mtq: ``modelopt.torch.quantization``.
        quantized: The quantized model.
        algorithm: The algorithm of all layers.
        formats: With mixed precision, the format of each layer, numbered over all pipeline stages.

    Returns:
        The model that modelopt returned.
    """
    if formats is None:
        return _clamp(mtq, quantized, "*input_quantizer", algorithm)
    for name, module in quantized.named_modules():
        chosen = formats.get(_parallel.global_name(quantized, name)) if hasattr(module, "input_quantizer") else None
        if chosen in _MAXBOUND:
            _clamp(mtq, quantized, f"{name}.input_quantizer", chosen)
    return quantized


def _clamp(mtq: Any, quantized: Any, pattern: str, algorithm: str) -> Any:
    lowest = _MIN_AMAX_SHARE * _MAXBOUND.get(algorithm, 0)
    return mtq.postprocess_amax(quantized, pattern, lambda amax: torch.clamp(amax, min=lowest))


def generate_sample(
    model: Any, generate: Callable, wrap_tokenizer: Callable, inference_params: Callable, logging: Any
) -> None:
    """Log how the quantized model continues two prompts.

    Args:
        model: The ``llm.GPTModel``.
        generate: NeMo's function of this name.
        wrap_tokenizer: NeMo's class ``MCoreTokenizerWrappper``.
        inference_params: Megatron's class ``CommonInferenceParams``.
        logging: NeMo's logger.
    """
    prompts = ["Born in north-east France, Soyer trained as a", "Born in California, Soyer trained as a"]
    if _transformers_models.is_wrapped(model):
        texts = _transformers_models.generate_sample(model, prompts)
        with screen.results():
            logging.info(f"Sample generation after PTQ (with prompts): {texts}")
        return
    dtype = getattr(getattr(model, "config", None), "params_dtype", None)
    wrapper = model.get_inference_wrapper(
        params_dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
        inference_batch_times_seqlen_threshold=30,
    )
    greedy = inference_params(top_k=1, num_tokens_to_generate=30)
    results = generate(wrapper, wrap_tokenizer(model.tokenizer), prompts, inference_params=greedy)
    texts = [prompt + result.generated_text for prompt, result in zip(prompts, results, strict=False)]
    with screen.results():
        logging.info(f"Sample generation after PTQ (with prompts): {texts}")

"""The steps that change the model: inserting and calibrating quantizers, and what follows directly."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero

from modelopt.torch.quantization.nn import TensorQuantizer
from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo.collections.llm.modelopt.quantization import comparison, transformers_models
from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices
from nemo.collections.llm.modelopt.quantization.insert import gated_amax, kv_cache, mixed_precision, patterns

# Largest value of the formats whose input amax is kept from becoming too small.
_MAXBOUND = {"fp8": 448, "int8_sq": 127}
_MIN_AMAX_SHARE = 0.01


def drop_quantizers(core: torch.nn.Module, algorithm: Any) -> None:
    """Switch off what quantized this model before, so that it is quantized anew from the weights that it has.

    All model-parallel ranks must call it.

    Args:
        core: The Megatron-Core model.
        algorithm: The one to come, for the message.

    Raises:
        ModelOptConfigError: If the weights are no longer the original's: AWQ and SmoothQuant scale them.
    """
    present = sum(comparison.count_quantizers(core).values())
    if not present:
        return
    quantizers = [module for module in core.modules() if isinstance(module, TensorQuantizer)]
    scaled = sum(hasattr(quantizer, "_pre_quant_scale") for quantizer in quantizers)
    if comparison.model_parallel_sum([scaled])[0]:
        raise ModelOptConfigError(
            "This model is quantized already, by an algorithm that scaled its weights (AWQ or SmoothQuant): quantizing "
            f"it anew with {algorithm} would build on those. Quantize the original checkpoint."
        )
    for quantizer in quantizers:
        quantizer.reset_amax()
        quantizer.disable()
    if is_global_rank_zero():
        logging.warning(
            f"This model is quantized already: its {present} quantizers are dropped, and it is quantized anew with "
            f"{algorithm} and compared with its weights as they are."
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
        quant_cfg: KV-cache quantizers that cannot be are taken out, in place.
        forward_loop: Runs calibration data through the model; None where none is needed.
        enable_kv_cache: The user's option, see `kv_cache.settle`.
        from_file: The quant_cfg is the user's own, see `patterns.check`.

    Returns:
        What ``mtq.quantize`` returned.

    Raises:
        ModelOptConfigError: If KV-cache quantizers were asked for and cannot be, or a pattern matches nothing.
    """
    if not isinstance(core, torch.nn.Module):
        return mtq.quantize(core, quant_cfg, forward_loop)
    with kv_cache.attention_support(choices.has_kv_cache(quant_cfg)):
        kv_cache.settle(core, quant_cfg, enable_kv_cache)
        loop = forward_loop and patterns.checked_loop(forward_loop, quant_cfg, from_file)
        quantized = mtq.quantize(core, quant_cfg, loop)
    if forward_loop is None:
        patterns.check(core, quant_cfg, from_file)
    gated_amax.mend(quantized)
    return quantized


def keep_amax_from_vanishing(mtq: Any, quantized: Any, algorithm: str, formats: dict[str, str] | None = None) -> Any:
    """Keep the amax of inputs from becoming so small that later values overflow the format.

    Squared ReLU gives activations that are near zero on calibration data and large on others: amax is at least 1 % of
    the format's largest value.

    Args:
        mtq: ``modelopt.torch.quantization``.
        quantized: The quantized model.
        algorithm: Of all layers.
        formats: Of mixed precision: the format of each layer, layers numbered over all pipeline stages.

    Returns:
        The model that modelopt returned.
    """
    if formats is None:
        return _clamp(mtq, quantized, "*input_quantizer", algorithm)
    for name, module in quantized.named_modules():
        chosen = (
            formats.get(mixed_precision.global_name(quantized, name)) if hasattr(module, "input_quantizer") else None
        )
        if chosen in _MAXBOUND:
            _clamp(mtq, quantized, f"{name}.input_quantizer", chosen)
    return quantized


def _clamp(mtq: Any, quantized: Any, pattern: str, algorithm: str) -> Any:
    lowest = _MIN_AMAX_SHARE * _MAXBOUND.get(algorithm, 0)
    return mtq.postprocess_amax(quantized, pattern, lambda amax: torch.clamp(amax, min=lowest))


def generate_sample(tools: ModuleType, model: Any) -> None:
    """Let the quantized model continue two prompts and log what it says.

    Args:
        tools: The module `quantizer`, whose attributes are the collaborators.
        model: The ``llm.GPTModel``.
    """
    prompts = ["Born in north-east France, Soyer trained as a", "Born in California, Soyer trained as a"]
    if transformers_models.is_wrapped(model):
        tools.logging.info(
            f"Sample generation after PTQ (with prompts): {transformers_models.generate_sample(model, prompts)}"
        )
        return
    dtype = getattr(getattr(model, "config", None), "params_dtype", None)
    wrapper = model.get_inference_wrapper(
        params_dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
        inference_batch_times_seqlen_threshold=30,
    )
    greedy = tools.CommonInferenceParams(top_k=1, num_tokens_to_generate=30)
    tokenizer = tools.MCoreTokenizerWrappper(model.tokenizer)
    results = tools.generate(wrapper, tokenizer, prompts, inference_params=greedy)
    texts = [prompt + result.generated_text for prompt, result in zip(prompts, results, strict=False)]
    tools.logging.info(f"Sample generation after PTQ (with prompts): {texts}")

"""Parameters and FLOPs of a GPT model as functions of its prunable sizes: no candidate need be built to be counted.

A part of the model is a sum of products, such as ``3 * hidden_size * ffn_hidden_size`` for a gated MLP: a `Terms`
counts how often each product of sizes occurs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from .. import _parallel
from ..errors import ModelOptConfigError

Terms = Counter[tuple[str, ...]]
EMBEDDING, HEAD = -1, 0
# Routers keep all experts' rows, while each token uses only some experts' weights.
_ROUTER_EXPERTS = "router_experts"


def model_terms(core: nn.Module) -> dict[int, Terms]:
    """Return what the whole model's parameters are made of: 1-indexed layer, `EMBEDDING` or `HEAD` -> terms.

    Args:
        core: the Megatron-Core GPT model. All ranks must call it.

    Raises:
        ModelOptConfigError: for a parameter whose shape is not known to follow from the sizes.
    """
    model: Any = core
    found: dict[int, Terms] = {}
    problem: str | None = None
    numbers = {index: layer.layer_number for index, layer in enumerate(model.decoder.layers)}
    for name, parameter in core.named_parameters():
        if name.startswith("output_layer") and model.share_embeddings_and_output_weights:
            continue  # what is used is the embedding's
        part = HEAD
        if name.startswith("decoder.layers."):
            part = numbers[int(name.split(".")[2])]
        elif name.startswith("embedding."):
            part = EMBEDDING
        try:
            found.setdefault(part, Counter()).update(_parameter_terms(name, parameter, model.config))
        except ModelOptConfigError as error:
            problem = str(error)
    # The problem goes along: a stage must not stop while the others wait.
    whole: dict[int, Terms] = {}
    for stage, complaint in _parallel.gather_over_stages((found, problem)):
        if complaint:
            raise ModelOptConfigError(complaint)
        for part, terms in stage.items():
            whole.setdefault(part, Counter()).update(terms)
    return whole


def _parameter_terms(name: str, parameter: torch.Tensor, config: Any) -> dict[tuple[str, ...], int]:
    """Return the terms of one parameter."""
    module, _, kind = name.rpartition(".")
    leaf, hidden, channels = module.rpartition(".")[2], config.hidden_size, config.kv_channels
    inputs = ("hidden_size",) if kind == "weight" else ()
    if ".local_experts." in name:
        if ".local_experts.0." not in name:
            return {}  # counted with the first, times their number
        ffn: tuple[str, ...] = ("moe_ffn_hidden_size", "num_moe_experts")
    elif ".shared_experts." in name:
        ffn = ("moe_shared_expert_intermediate_size",)
    else:
        ffn = ("ffn_hidden_size",)
    gates = 2 if config.gated_linear_unit else 1
    if kind in ("layer_norm_weight", "layer_norm_bias"):  # a norm that Transformer Engine fuses into a linear layer
        return {("hidden_size",): 1}
    if leaf in ("word_embeddings", "position_embeddings", "output_layer"):
        split = getattr(parameter, "tensor_model_parallel", False)
        ranks = parallel_state.get_tensor_model_parallel_world_size() if split else 1
        return {inputs: parameter.numel() * ranks // (hidden if inputs else 1)}
    if leaf == "linear_qkv":
        return {(*inputs, "num_attention_heads"): channels, (*inputs, "num_query_groups"): 2 * channels}
    if leaf == "linear_proj":
        return {("hidden_size", "num_attention_heads"): channels} if inputs else {("hidden_size",): 1}
    if leaf == "linear_fc1":
        return {(*inputs, *ffn): gates}
    if leaf == "linear_fc2":
        return {("hidden_size", *ffn): 1} if inputs else {("hidden_size", *ffn[1:]): 1}
    if leaf == "router":
        return {(*inputs, _ROUTER_EXPERTS): 1}
    if leaf == "shared_experts" and kind == "gate_weight":
        return {("hidden_size",): 1}
    if leaf in ("q_layernorm", "k_layernorm"):
        return {(): parameter.numel()}
    if "norm" in leaf and parameter.numel() == hidden:
        return {("hidden_size",): 1}
    raise ModelOptConfigError(
        f"target_params: it is not known how the size of {name} {tuple(parameter.shape)} follows from the prunable "
        "sizes; set target_* sizes for this model instead."
    )


def count(terms: Mapping[int, Terms], sizes: Mapping[str, int], layers: Iterable[int]) -> int:
    """Return the number of parameters at some sizes.

    Args:
        terms: what `model_terms` returned.
        sizes: the prunable sizes.
        layers: 1-indexed numbers of the layers that are kept.
    """
    sizes = {_ROUTER_EXPERTS: sizes.get("num_moe_experts", 0), **sizes}
    parts: Terms = Counter()
    for part in (EMBEDDING, HEAD, *layers):
        parts.update(terms.get(part, {}))
    return sum(times * math.prod(sizes[name] for name in product) for product, times in parts.items())


def attending(terms: Mapping[int, Terms], layers: Iterable[int]) -> list[int]:
    """Return the layers that have attention: of a hybrid model, not all."""
    return [part for part in layers if any("num_query_groups" in product for product in terms[part])]


def active(sizes: Mapping[str, int], topk: int) -> dict[str, int]:
    """Return sizes at which `count` gives the parameters that one token uses: ``topk`` experts, the whole router."""
    if not sizes.get("num_moe_experts"):
        return dict(sizes)
    experts = sizes["num_moe_experts"]
    return {**sizes, _ROUTER_EXPERTS: experts, "num_moe_experts": min(topk, experts)}


def flops_per_token(
    terms: Mapping[int, Terms], sizes: Mapping[str, int], layers: Iterable[int], config: Any, seq_length: int
) -> int:
    """Return the floating-point operations of one token's forward pass: two for each weight that multiplies it.

    The output layer counts and the embedding's lookup does not. Attention is counted over the whole sequence, not
    halved for the causal mask.

    Args:
        terms: what `model_terms` returned.
        sizes: the prunable sizes.
        layers: 1-indexed numbers of the layers that are kept.
        config: the model's configuration.
        seq_length: tokens of a sequence.
    """
    layers = list(layers)
    used = count({**terms, EMBEDDING: Counter()}, active(sizes, getattr(config, "moe_router_topk", 0) or 0), layers)
    if HEAD not in terms or not any("hidden_size" in product and times > 1 for product, times in terms[HEAD].items()):
        # Tied: the output layer multiplies by the embedding.
        used += count({EMBEDDING: terms.get(EMBEDDING, Counter())}, sizes, ())
    heads = len(attending(terms, layers)) * sizes["num_attention_heads"]
    return 2 * used + 4 * seq_length * heads * config.kv_channels

"""Entries of a ``transformers`` configuration that NeMo's exporters leave out or write wrong, by family.

Each function returns the entries of one family from NeMo's configuration. A lost entry does not fail: the files are
read, and compute something else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nemo_modelopt_dropin.preflight import families


def of(hf_config: Any, config: Any) -> dict[str, Any]:
    """Return the entries of a family.

    Args:
        hf_config: The ``transformers`` configuration of NeMo's exporter.
        config: The model's own configuration.
    """
    function = _ENTRIES.get(getattr(hf_config, "model_type", ""))
    return {} if function is None else function(config)


def derived(exporter: Any, config: Any) -> Any:
    """Return a configuration for which NeMo's exporter raises an error: that of a DeepSeek V2; None for other models.

    Args:
        exporter: NeMo's exporter for the class of the model.
        config: The model's own configuration.

    Raises:
        ValueError: If ``transformers`` would choose other experts or has no entries for the layers.
    """
    if type(exporter).__name__ != "HFDeepSeekExporter":
        return None
    if problem := families.routing_problem(config):
        raise ValueError(problem)
    # The routers of V3 have biases, and those of V2 have none.
    return None if config.moe_router_enable_expert_bias else _deepseek2(config)


def _deepseek2(config: Any) -> Any:
    """Return the configuration of a DeepSeek V2; `_deepseek` adds the entries that V3 has too."""
    from transformers import DeepseekV2Config

    kinds = list(config.moe_layer_freq)
    dense = kinds.index(1) if 1 in kinds else len(kinds)
    if not all(kinds[dense:]):
        raise ValueError(f"DeepSeek has dense layers before all layers with experts, not moe_layer_freq={kinds}")
    groups = config.moe_router_num_groups or 1
    return DeepseekV2Config(
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_head_dim,
        qk_rope_head_dim=config.qk_pos_emb_head_dim,
        v_head_dim=config.v_head_dim,
        first_k_dense_replace=dense,
        n_routed_experts=config.num_moe_experts,
        moe_intermediate_size=config.moe_ffn_hidden_size,
        num_experts_per_tok=config.moe_router_topk,
        n_group=groups,
        topk_group=config.moe_router_group_topk or 1,
        topk_method="greedy" if groups == 1 else "group_limited_greedy",
        routed_scaling_factor=config.moe_router_topk_scaling_factor or 1.0,
        aux_loss_alpha=config.moe_aux_loss_coeff,
        max_position_embeddings=config.max_position_embeddings,
    )


def _qwen(config: Any) -> dict[str, Any]:
    """Return the sliding windows of a Qwen2 or Qwen3: NeMo's exporters write that there are none."""
    if config.window_size is None:
        return {"use_sliding_window": False, "sliding_window": None}
    local = _local_layers(config)
    first = local.index(True) if any(local) else len(local)
    # Megatron does not count the token itself.
    found = {"use_sliding_window": True, "sliding_window": config.window_size[0] + 1, "max_window_layers": first}
    return {**found, "layer_types": _layer_types(local)}


def _qwen_experts(config: Any) -> dict[str, Any]:
    """Return the routing of a Qwen3 with experts: NeMo's exporter writes that weights of experts add up to one.

    Its class in ``transformers`` has one window for all layers.
    """
    found = {name: value for name, value in _qwen(config).items() if name != "layer_types"}
    if config.window_size is not None and not all(_local_layers(config)):
        raise ValueError("Qwen3MoeConfig has one window for all layers; this model has layers without")
    return {**found, "norm_topk_prob": not config.moe_router_pre_softmax}


def _gemma(config: Any) -> dict[str, Any]:
    return {"rope_theta": config.rotary_base}


def _starcoder(config: Any) -> dict[str, Any]:
    return {"n_inner": config.ffn_hidden_size, "layer_norm_epsilon": config.layernorm_epsilon}


def _starcoder2(config: Any) -> dict[str, Any]:
    return {"norm_epsilon": config.layernorm_epsilon}


def _phi3(config: Any) -> dict[str, Any]:
    found = {"rms_norm_eps": config.layernorm_epsilon, "initializer_range": config.init_method_std}
    # transformers reads the entry, which its configuration class lacks.
    is_default = config.kv_channels == config.hidden_size // config.num_attention_heads
    return found if is_default else {**found, "head_dim": config.kv_channels}


def _gemma2(config: Any) -> dict[str, Any]:
    if config.window_size is None:
        return {}
    # The windows of released models are even. A model imported with the CPU backend has one token less, because
    # Megatron does not count the token itself.
    window = config.window_size[0]
    return {"sliding_window": window + window % 2}


def _gemma3(config: Any) -> dict[str, Any]:
    """Return what NeMo's exporter has constants for: it chooses the scale of the scores by the number of layers."""
    factor = config.rope_scaling_factor
    pattern = sum(config.interleaved_attn_pattern)
    scale = config.softmax_scale
    return {
        "rope_scaling": None if factor == 1 else {"rope_type": "linear", "factor": float(factor)},
        "query_pre_attn_scalar": config.kv_channels if scale is None else _whole(scale**-2),
        "layer_types": _layer_types([number % pattern != 0 for number in range(1, config.num_layers + 1)]),
    }


def _whole(value: float) -> float:
    """Return a number, as an integer if it is one but for its last digits."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value


def _deepseek(config: Any) -> dict[str, Any]:
    found = {
        "num_key_value_heads": config.num_attention_heads,
        "n_shared_experts": (config.moe_shared_expert_intermediate_size or 0) // config.moe_ffn_hidden_size or None,
        "rope_theta": config.rotary_base,
        "rms_norm_eps": config.layernorm_epsilon,
        "norm_topk_prob": config.moe_router_score_function == "sigmoid",
    }
    if config.rope_type == "yarn" and config.rotary_scaling_factor != 1:
        names = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        scaling = {name: getattr(config, name) for name in names}
        found["rope_scaling"] = {"rope_type": "yarn", "factor": float(config.rotary_scaling_factor), **scaling}
    return found


def _gpt_oss(config: Any) -> dict[str, Any]:
    found = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.moe_ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "num_experts_per_tok": config.moe_router_topk,
        "rms_norm_eps": config.layernorm_epsilon,
        "max_position_embeddings": config.seq_length,
        "rope_theta": float(config.rotary_base),
        "layer_types": _layer_types(_local_layers(config)),
    }
    if config.window_size is not None:
        # As for Gemma 2: released models have an even window.
        window = config.window_size if isinstance(config.window_size, int) else config.window_size[0]
        found["sliding_window"] = window + window % 2
    if config.yarn_rotary_scaling_factor == 1:
        return {**found, "rope_scaling": None}
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": float(config.yarn_rotary_scaling_factor),
        "beta_fast": config.yarn_beta_fast,
        "beta_slow": config.yarn_beta_slow,
        "truncate": config.yarn_correction_range_round_to_int,
        "original_max_position_embeddings": config.yarn_original_max_position_embeddings,
    }
    return {**found, "rope_scaling": scaling}


def _local_layers(config: Any) -> list[bool]:
    """Return for each layer whether its attention has the window."""
    if config.window_size is None:
        return [False] * config.num_layers
    skipped = getattr(config, "window_attn_skip_freq", None)
    if not isinstance(skipped, (list, tuple)):
        # Megatron's period: each layer whose number it divides sees all tokens.
        skipped = [not skipped or number % skipped != 0 for number in range(1, config.num_layers + 1)]
    return [bool(one) for one in skipped]


def _layer_types(local: Sequence[bool]) -> list[str]:
    return ["sliding_attention" if one else "full_attention" for one in local]


# Entries of a configuration by ``model_type``, from NeMo's configuration.
_ENTRIES = {
    "gpt_bigcode": _starcoder,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt_oss": _gpt_oss,
    "phi3": _phi3,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "qwen3_moe": _qwen_experts,
    "starcoder2": _starcoder2,
}

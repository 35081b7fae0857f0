"""Take the ``transformers`` configuration of a model from NeMo's exporter, and correct it.

The corrections are here, in one place, because NeMo's exporters leave out entries or take them from the tokenizer:

- the class (none for Nemotron, the dense class for Qwen3 with experts), and whether the output layer is tied (Qwen2),
- the size of the vocabulary, which is that of the tokenizer, in some exporters without its added tokens,
- the sizes that Starcoder and DeepSeek have beyond those of a Llama, and the window of Gemma 2,
- DeepSeek V2, for which the exporter raises an error, and GPT-OSS, for which it has the released sizes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo.lightning import io
from nemo.lightning.io import api
from transformers import AutoModelForCausalLM

from ..._functions import replaced
from .hf_names import NamesError


def of(exporter: Any, core: Any, tokenizer: Any = None, rows: int | None = None) -> Any:
    """Return the configuration.

    Args:
        exporter: NeMo's exporter for the class of the model.
        core: The Megatron-Core model.
        tokenizer: The ``transformers`` tokenizer of the model, or None.
        rows: Rows of the embedding, padding included; None corrects no vocabulary.

    Raises:
        NamesError: If NeMo's exporter cannot derive a configuration.
    """
    with from_context():
        try:
            found = _deepseek2(core.config) if _is_deepseek2(exporter, core) else copy.copy(exporter.config)
        except (ValueError, TypeError, AssertionError, AttributeError, OSError) as error:
            raise NamesError(f"{type(exporter).__name__} of NeMo cannot derive a configuration: {error}.") from error
        vocabulary = _vocabulary(exporter, tokenizer)
    found = corrected(found, core)
    if rows is not None and vocabulary is not None:
        found.vocab_size = min(rows, vocabulary)
    return found


@contextlib.contextmanager
def from_context() -> Iterator[None]:
    """Let NeMo's exporters read only the model of a checkpoint's context, from its own folder, inside the context.

    They pass the checkpoint's folder, in which NeMo does not find values that are stored in files of their own. Some
    read the whole context, and then fail for trainers and optimizers that NeMo cannot read back.
    """
    with contextlib.ExitStack() as stack:
        for module in (io, api):
            stack.enter_context(replaced(module, "load_context", _only_model(module.load_context)))
        yield


def _only_model(load: Callable) -> Callable:
    def load_context(path: Any, subpath: str | None = None, **kwargs: Any) -> Any:
        folder = Path(path) / "context"
        path = folder if folder.is_dir() else path
        if subpath is None:
            return SimpleNamespace(model=load(path, subpath="model", **kwargs))
        return load(path, subpath=subpath, **kwargs)

    return load_context


def corrected(hf_config: Any, core: Any) -> Any:
    """Return a copy of the configuration of NeMo's exporter with its class, ties and further entries.

    Args:
        hf_config: The configuration.
        core: The Megatron-Core model.
    """
    hf_config = copy.copy(hf_config)
    classes = AutoModelForCausalLM._model_mapping
    if type(hf_config) in classes:
        hf_config.architectures = [classes[type(hf_config)].__name__]
    tied = getattr(core, "share_embeddings_and_output_weights", None)
    if isinstance(tied, bool):
        hf_config.tie_word_embeddings = tied
    config = getattr(core, "config", None)
    entries = _ENTRIES.get(getattr(hf_config, "model_type", ""), lambda _: {})(config)
    for name, value in entries.items():
        setattr(hf_config, name, value)
    return hf_config


def _vocabulary(exporter: Any, tokenizer: Any) -> int | None:
    """Return the size of the vocabulary, of the checkpoint if it names one, or of its tokenizer; None if unknown.

    The configuration of the model in memory has the tokenizer's, which the quantizer sets for other exporters.
    """
    named = getattr(io.load_context(Path(exporter), subpath="model.config"), "vocab_size", None)
    if isinstance(named, int):
        return named
    return None if tokenizer is None else len(tokenizer)


def _is_deepseek2(exporter: Any, core: Any) -> bool:
    """Return whether a model is a DeepSeek V2: its routers have no biases, and those of V3 have."""
    return type(exporter).__name__ == "HFDeepSeekExporter" and not core.config.moe_router_enable_expert_bias


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


def _starcoder(config: Any) -> dict[str, Any]:
    return {"n_inner": config.ffn_hidden_size}


def _phi3(config: Any) -> dict[str, Any]:
    # transformers reads the entry, which its configuration class lacks.
    is_default = config.kv_channels == config.hidden_size // config.num_attention_heads
    return {} if is_default else {"head_dim": config.kv_channels}


def _gemma2(config: Any) -> dict[str, Any]:
    if config.window_size is None:
        return {}
    # The windows of released models are even. A model imported with the CPU backend has one token less, because
    # Megatron does not count the token itself.
    window = config.window_size[0]
    return {"sliding_window": window + window % 2}


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
    skipped = config.window_attn_skip_freq
    if not isinstance(skipped, (list, tuple)):
        # Megatron's period: each layer whose number it divides sees all tokens.
        skipped = [not skipped or number % skipped != 0 for number in range(1, config.num_layers + 1)]
    local = [config.window_size is not None and bool(one) for one in skipped]
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
        "layer_types": [("full_attention", "sliding_attention")[one] for one in local],
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


# Entries of a configuration by ``model_type``, from NeMo's configuration.
_ENTRIES = {
    "gpt_bigcode": _starcoder,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "gemma2": _gemma2,
    "gpt_oss": _gpt_oss,
    "phi3": _phi3,
}


def exporter_of(model: Any) -> Any:
    """Return NeMo's exporter for a model in memory; it reads no checkpoint inside `in_memory`."""
    return type(model).exporter("hf", "model in memory")


def in_memory(model: Any) -> Any:
    """Return a context in which NeMo's exporters read a model in memory instead of a checkpoint's context."""

    def load_context(path: Any, subpath: str | None = None, **_: Any) -> Any:
        found: Any = SimpleNamespace(model=model)
        for part in subpath.split(".") if subpath else ():
            found = getattr(found, part)
        return found

    return replaced(io, "load_context", load_context)

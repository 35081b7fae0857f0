"""Take the ``transformers`` configuration of a model from NeMo's exporter, and correct it.

The corrections are here, in one place, because NeMo's exporters leave out entries or take them from the tokenizer:

- the class (none for Nemotron, the dense class for Qwen3 with experts), and whether the output layer is tied (Qwen2),
- the size of the vocabulary, which is that of the tokenizer, in some exporters without its added tokens,
- the sizes that Starcoder and DeepSeek have beyond those of a Llama, and the window of Gemma 2.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo.lightning import io
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
    try:
        found = copy.copy(exporter.config)
    except (ValueError, AttributeError, OSError) as error:
        raise NamesError(f"{type(exporter).__name__} of NeMo cannot derive a configuration: {error}") from error
    found = corrected(found, core)
    vocabulary = _vocabulary(exporter, tokenizer)
    if rows is not None and vocabulary is not None:
        found.vocab_size = min(rows, vocabulary)
    return found


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


def _starcoder(config: Any) -> dict[str, Any]:
    return {"n_inner": config.ffn_hidden_size}


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


# Entries of a configuration by ``model_type``, from NeMo's configuration.
_ENTRIES = {"gpt_bigcode": _starcoder, "deepseek_v3": _deepseek, "gemma2": _gemma2}


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

"""Correct the configurations that NeMo's converters derive from Hugging Face checkpoints, and the other way round.

NeMo's importers leave out or misread some entries of a checkpoint's ``config.json``, on a GPU as well: the model that
they build is then another one, or the conversion fails. Each correction is a function below, with its reason; `_EDITS`
names the models that it applies to. `patch_exporters` keeps the two directions consistent.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

from nemo_modelopt_dropin.cpu_backend.state import CpuBackendError
from nemo_modelopt_dropin.preflight import families

_GEMMAS = ("GemmaModel", "Gemma2Model")


def _change(config: Any, **values: Any) -> None:
    """Set fields of a configuration, also in the record from which NeMo writes a checkpoint's context.

    Fields that this version of Megatron lacks are left out.
    """
    for name, value in values.items():
        if not hasattr(config, name):
            continue
        setattr(config, name, value)
        if hasattr(config, "__io__"):
            setattr(config.__io__, name, value)


def _vocabulary(config: Any, source: Any) -> None:
    """Take the size of the vocabulary from the checkpoint, if the importer takes the tokenizer's.

    The tokenizers of Phi-3, Qwen and DeepSeek have fewer entries than the embedding has rows, and the importer fails.
    Rows are padded to a multiple, which must divide the size.
    """
    unit, size = config.make_vocab_size_divisible_by, source.vocab_size
    if size % unit:
        unit = math.gcd(size, 128)
    _change(config, vocab_size=size, make_vocab_size_divisible_by=unit)


def _head_size(config: Any, source: Any) -> None:
    """Take the size of a head from the checkpoint; NeMo has a constant for Gemma and Qwen3."""
    if getattr(source, "head_dim", None):
        _change(config, kv_channels=source.head_dim)


def _window(config: Any, source: Any) -> None:
    """Take the window from the checkpoint; NeMo reads it for Mistral only.

    Megatron counts the tokens of a window without the token itself, `transformers` with it.
    """
    window, kinds = getattr(source, "sliding_window", None), getattr(source, "layer_types", None)
    local = [int(kind == "sliding_attention") for kind in kinds or ()]
    if window is None or (local and not any(local)):
        _change(config, window_size=None)
        return
    _change(config, window_size=type(config.window_size or [])((window - 1, 0)))
    if local and not all(local):
        _change(config, window_attn_skip_freq=local)


def _length(config: Any, source: Any) -> None:
    """Take the number of positions from the checkpoint; NeMo has a constant, or for Mistral the window or None."""
    _change(config, seq_length=source.max_position_embeddings, max_position_embeddings=source.max_position_embeddings)


def _llama(config: Any, source: Any) -> None:
    """Raise an error for a scaling of the rotary frequencies that NeMo does not compute: it reads the factor only."""
    scaling = getattr(source, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    known = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    wrong = {name: scaling[name] for name, value in known.items() if scaling.get(name, value) != value}
    if kind not in ("default", "llama3") or wrong:
        raise CpuBackendError(
            f"NeMo's Llama computes rope_scaling with rope_type 'llama3' and {known} only; the checkpoint has "
            f"{scaling}. Its logits would be wrong."
        )


def _phi3(config: Any, source: Any) -> None:
    """Take the query groups from the checkpoint, and raise an error for what NeMo's Phi-3 lacks."""
    lacks = [name for name in ("rope_scaling", "tie_word_embeddings") if getattr(source, name, None)]
    lacks += ["partial_rotary_factor"] if getattr(source, "partial_rotary_factor", 1.0) != 1.0 else []
    if lacks:
        values = {name: getattr(source, name) for name in lacks}
        raise CpuBackendError(f"NeMo's Phi-3 has no {', '.join(lacks)}; the checkpoint has {values}.")
    _change(config, num_query_groups=source.num_key_value_heads)


def _qwen3(config: Any, source: Any) -> None:
    """Take the number of experts and how many a token is sent to from the checkpoint; NeMo has 128 and 8."""
    if getattr(source, "num_experts", None) is None:
        return
    if getattr(source, "mlp_only_layers", None) or getattr(source, "decoder_sparse_step", 1) != 1:
        raise CpuBackendError(
            "NeMo's Qwen3 has experts in all layers; the checkpoint has layers without "
            f"(mlp_only_layers={source.mlp_only_layers}, decoder_sparse_step={source.decoder_sparse_step})."
        )
    _change(
        config,
        num_moe_experts=source.num_experts,
        moe_router_topk=source.num_experts_per_tok,
        moe_router_pre_softmax=not source.norm_topk_prob,
    )


def _gemma2(config: Any, source: Any) -> None:
    """Correct the window: the importer reads the class of Gemma 1, which has none, so it may be missing."""
    _change(config, window_size=(source.sliding_window - 1, 0))


def _deepseek(config: Any, source: Any) -> None:
    """Take the scaling of the rotary frequencies from the checkpoint; NeMo has the constants of DeepSeek V3.

    NeMo also chooses groups of experts if the checkpoint has them but does not use them.
    """
    if config.moe_router_enable_expert_bias and not source.norm_topk_prob:
        raise CpuBackendError("NeMo's DeepSeek V3 lets the weights of experts add up to one; norm_topk_prob is false.")
    if getattr(source, "topk_method", None) == "greedy":
        _change(config, moe_router_num_groups=1, moe_router_group_topk=1)
    if problem := families.routing_problem(config):
        raise CpuBackendError(f"{problem}. Its logits would be wrong.")
    scaling = getattr(source, "rope_scaling", None) or {"factor": 1.0}
    _change(
        config,
        max_position_embeddings=source.max_position_embeddings,
        rotary_base=source.rope_theta,
        rotary_scaling_factor=scaling["factor"],
        original_max_position_embeddings=scaling.get("original_max_position_embeddings", 4096),
        beta_fast=scaling.get("beta_fast", 32),
        beta_slow=scaling.get("beta_slow", 1),
        mscale=scaling.get("mscale", 1.0),
        mscale_all_dim=scaling.get("mscale_all_dim", 0.0),
        layernorm_epsilon=source.rms_norm_eps,
    )


def _gpt_oss(config: Any, source: Any) -> None:
    """Take all sizes from the checkpoint; NeMo reads the numbers of layers and experts only."""
    scaling = source.rope_scaling or {}
    _change(
        config,
        hidden_size=source.hidden_size,
        num_attention_heads=source.num_attention_heads,
        num_query_groups=source.num_key_value_heads,
        ffn_hidden_size=source.intermediate_size,
        moe_ffn_hidden_size=source.intermediate_size,
        moe_router_topk=source.num_experts_per_tok,
        layernorm_epsilon=source.rms_norm_eps,
        rotary_base=source.rope_theta,
        yarn_rotary_scaling_factor=scaling.get("factor", 1.0),
        yarn_original_max_position_embeddings=scaling.get("original_max_position_embeddings", 4096),
        yarn_beta_fast=scaling.get("beta_fast", 32.0),
        yarn_beta_slow=scaling.get("beta_slow", 1.0),
        # The factor of sines and cosines is that of `mscale` over that of `mscale_all_dim`; zero is a divisor of one.
        yarn_mscale=scaling.get("mscale") or 1.0,
        yarn_mscale_all_dim=(scaling.get("mscale") and scaling.get("mscale_all_dim")) or 0.0,
        yarn_correction_range_round_to_int=scaling.get("truncate", True),
    )


_EDITS: dict[str, tuple[Callable[[Any, Any], None], ...]] = {
    "LlamaModel": (_llama,),
    "Qwen2Model": (_vocabulary, _window),
    "Qwen3Model": (_vocabulary, _head_size, _length, _window, _qwen3),
    "MistralModel": (_vocabulary, _window, _length),
    "MixtralModel": (_vocabulary, _window),
    "GemmaModel": (_vocabulary, _head_size, _length),
    "Gemma2Model": (_vocabulary, _head_size, _length, _gemma2),
    "Phi3Model": (_vocabulary, _length, _window, _phi3),
    "NemotronModel": (_vocabulary,),
    "StarcoderModel": (_vocabulary,),
    "Starcoder2Model": (_vocabulary, _window),
    "DeepSeekModel": (_vocabulary, _deepseek),
    "GPTOSSModel": (_vocabulary, _head_size, _length, _window, _gpt_oss),
}


def patch_importers() -> None:
    """Correct the configurations of NeMo's importers, see `_EDITS`, and read GPT-OSS files in bf16."""
    from nemo.collections import llm

    for name, edits in _EDITS.items():
        model = getattr(llm, name, None)
        if model is not None:
            _wrap_config(type(model.importer("hf://unused")), edits)
    with contextlib.suppress(ImportError):  # NeMo 2.5 has fewer families
        from nemo.collections.llm.gpt.model import gemma3

        _replace_config(gemma3.HFGemma3Importer, _gemma3_config)
    with contextlib.suppress(ImportError):
        from nemo.collections.llm.gpt.model import gpt_oss

        _patch_loading(gpt_oss)


def _patch_loading(gpt_oss: Any) -> None:
    """Let the importer of GPT-OSS read files in bf16: it reads the orientation of MXFP4 files only."""
    load = gpt_oss._BaseGPTOSSImporter.hf_ckpt_load

    @functools.wraps(load)
    def hf_ckpt_load(self):
        return _as_dequantized(load(self), _hf_config(self))

    gpt_oss._BaseGPTOSSImporter.hf_ckpt_load = hf_ckpt_load


def patch_exporters() -> None:
    """Write windows as the importers read them; NeMo's exporters leave them out, or are one token short."""
    from nemo.collections import llm

    for name in ("MistralModel", "MixtralModel", "Phi3Model", "Starcoder2Model", "Gemma2Model", "Gemma3Model"):
        if hasattr(llm, name):
            exporter = type(getattr(llm, name).exporter("hf", "unused"))
            _wrap_config(exporter, (_exported_window,), read=_saved_config)


def _exported_window(config: Any, saved: Any) -> None:
    """Set the window of a configuration of `transformers` from NeMo's."""
    window = getattr(saved, "window_size", None)
    if window is not None:
        config.sliding_window = (window if isinstance(window, int) else window[0]) + 1


def _saved_config(exporter: Any) -> Any:
    """Return the configuration of the checkpoint that an exporter reads."""
    from nemo.lightning import io

    return io.load_context(str(exporter), subpath="model.config")


def _hf_config(importer: Any) -> Any:
    """Return the configuration of the checkpoint that an importer reads."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(importer))


def _wrap_config(connector: Any, edits: tuple[Callable, ...], read: Callable[[Any], Any] = _hf_config) -> None:
    """Apply functions to the configuration that a converter derives."""
    wrapped = connector.__dict__["config"]
    derive = wrapped.func if isinstance(wrapped, functools.cached_property) else wrapped.fget

    @functools.wraps(derive)
    def config(self):
        derived, source = derive(self), read(self)
        for edit in edits:
            edit(derived, source)
        return derived

    _replace_config(connector, config)


def _replace_config(connector: Any, derive: Callable) -> None:
    """Set the function that derives the configuration of a converter."""
    connector.config = property(derive)


def _gemma3_config(importer: Any) -> Any:
    """Return NeMo's configuration of a Gemma 3; NeMo chooses one of four by the number of layers, without its sizes."""
    from nemo.collections.llm.gpt.model import gemma3
    from nemo.lightning.pytorch.utils import dtype_from_hf
    from transformers import GenerationConfig

    whole = _hf_config(importer)
    source = getattr(whole, "text_config", whole)
    pattern = [kind == "full_attention" for kind in source.layer_types]
    period = pattern.index(True) + 1 if True in pattern else len(pattern) + 1
    if pattern != [(number + 1) % period == 0 for number in range(len(pattern))]:
        raise CpuBackendError(f"NeMo's Gemma 3 repeats local layers and a global one; the checkpoint has {pattern}.")
    if source.attn_logit_softcapping or source.final_logit_softcapping:
        raise CpuBackendError("NeMo's Gemma 3 caps no scores (attn_logit_softcapping, final_logit_softcapping).")
    return gemma3.Gemma3Config1B(
        num_layers=source.num_hidden_layers,
        hidden_size=source.hidden_size,
        ffn_hidden_size=source.intermediate_size,
        num_attention_heads=source.num_attention_heads,
        num_query_groups=source.num_key_value_heads,
        kv_channels=source.head_dim,
        seq_length=source.max_position_embeddings,
        vocab_size=source.vocab_size,
        make_vocab_size_divisible_by=math.gcd(source.vocab_size, 128),
        layernorm_epsilon=source.rms_norm_eps,
        init_method_std=source.initializer_range,
        rotary_base=(source.rope_local_base_freq, source.rope_theta),
        rope_scaling_factor=(source.rope_scaling or {}).get("factor", 1.0),
        window_size=source.sliding_window - 1,
        interleaved_attn_pattern=(period - 1, 1),
        softmax_scale=source.query_pre_attn_scalar**-0.5,
        bf16=str(dtype_from_hf(whole)) == "torch.bfloat16",
        params_dtype=dtype_from_hf(whole),
        generation_config=GenerationConfig.from_pretrained(str(importer)),
    )


def _as_dequantized(state: dict[str, Any], source: Any) -> dict[str, Any]:
    """Return the tensors of a GPT-OSS as dequantized MXFP4 files have them: experts' matrices `[experts, out, in]`."""
    if getattr(source, "quantization_config", None):
        return state
    experts = (".experts.gate_up_proj", ".experts.down_proj")
    return {
        name: value.transpose(-1, -2).contiguous() if name.endswith(experts) else value for name, value in state.items()
    }

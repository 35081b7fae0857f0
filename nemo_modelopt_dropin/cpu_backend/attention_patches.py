"""Patches of Megatron-Core's local layers and attention for CPU ranks; `cpu_backend.PATCHES` lists them."""

from __future__ import annotations

import functools
import inspect


def patch_local_attention() -> None:
    """Let local attention run multi-latent attention, and windows that are a list.

    Multi-latent attention passes the channels of a key and of a value, which only Transformer Engine's class takes;
    they determine nothing but the width of the output. The mask of a window is cached by the window, and a list, as
    NeMo's importers set it and as checkpoints restore it, cannot be a key of a cache.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    construct = DotProductAttention.__init__

    @functools.wraps(construct)
    def __init__(self, *args, k_channels=None, v_channels=None, **kwargs):
        construct(self, *args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
        if isinstance(getattr(self.scale_mask_softmax, "window_size", None), list):
            self.scale_mask_softmax.window_size = tuple(self.scale_mask_softmax.window_size)

    DotProductAttention.__init__ = __init__


def patch_packed_attention() -> None:
    """Let local attention run packed sequences: each sequence attends to itself, as in Transformer Engine's kernels.

    Megatron's local class takes no packed sequences. It runs here on one sequence after the other, with the causal mask
    or the window that it makes itself, so a packed sequence has the same output as one alone.
    """
    import torch
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    attend = DotProductAttention.forward

    @functools.wraps(attend)
    def forward(self, query, key, value, attention_mask, *args, packed_seq_params=None, **kwargs):
        if packed_seq_params is None:
            return attend(self, query, key, value, attention_mask, *args, **kwargs)
        ends = packed_seq_params.cu_seqlens_q_padded
        ends = (packed_seq_params.cu_seqlens_q if ends is None else ends).tolist()
        causal = self.attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        found = []
        for first, end in zip(ends, ends[1:], strict=False):
            if first == end:  # as some data sets pad the list of ends
                continue
            mask = torch.ones(1, 1, end - first, end - first, dtype=torch.bool).triu(1) if causal else None
            # [t, heads, channels], a part of it as [s, 1, heads, channels]
            parts = (x[first:end, None] for x in (query, key, value))
            found.append(attend(self, *parts, mask, *args, **kwargs).squeeze(1))
        return torch.cat(found)

    DotProductAttention.forward = forward


def patch_attention_backend() -> None:
    """Ignore a configuration's attention backend: it selects among Transformer Engine's kernels only.

    Megatron passes it on in environment variables and raises an error if a second model of the process, for example of
    another family, has another backend.
    """
    from megatron.core.models.common.language_module.language_module import LanguageModule

    LanguageModule._set_attention_backend = lambda self: None


_DENSE_NORM = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
_ATTENTION_NORM = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_LATENT_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


def patch_saved_norms() -> None:
    """Save the norms of local layers under the names that Transformer Engine's layers save, for every kind of layer.

    Megatron renames them for dense layers only. In a layer with experts the norm before the experts is separate in
    both, and multi-latent attention has two more norms. A checkpoint from a GPU would not load here, or the reverse.
    """
    from megatron.core.models.gpt import gpt_layer_specs

    build = gpt_layer_specs.get_gpt_layer_local_spec
    signature = inspect.signature(build)

    @functools.wraps(build)
    def get_gpt_layer_local_spec(*args, **kwargs):
        spec = build(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        latent = given.get("multi_latent_attention", False)
        names = {} if given.get("num_experts") else dict(_DENSE_NORM)
        names |= _ATTENTION_NORM if not latent else _LATENT_NORMS if given.get("qk_layernorm") else {}
        spec.submodules.sharded_state_dict_keys_map = names
        return spec

    gpt_layer_specs.get_gpt_layer_local_spec = get_gpt_layer_local_spec

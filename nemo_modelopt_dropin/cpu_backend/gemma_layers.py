"""Build the layers of Gemma 2 and Gemma 3 from Megatron's local modules.

NeMo's specs of both families name Transformer Engine's classes, which are mocks without that package. The layers here
have the same parameters under the same names in a checkpoint.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from nemo.collections.llm.gpt.model import gemma2, gemma3
from torch import Tensor, nn

# Names of the separate norms in a checkpoint, where Transformer Engine's fused layers hold them.
_SAVED_AS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class PostNormLinear(RowParallelLinear):
    """Apply a norm to the output of a row-parallel linear layer.

    The norm is a hook: modelopt quantizes and prunes subclasses only if they share their parent's ``forward``.
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any):
        """Build the layer and its norm; see `RowParallelLinear`."""
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = WrappedTorchNorm(config, output_size, eps=config.layernorm_epsilon)
        self.register_forward_hook(_normalise)


def _normalise(module: nn.Module, args: tuple, output: tuple) -> tuple:
    """Return the output of a `PostNormLinear` with its norm applied."""
    linear: Any = module
    return (linear.post_layernorm(output[0]), *output[1:])


class CappedSoftmax(FusedScaleMaskSoftmax):
    """Cap attention scores smoothly before the mask and the softmax."""

    cap: float | None = None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the attention probabilities `[b, n, s, s]`; see `FusedScaleMaskSoftmax`."""
        return super().forward(gemma2.logit_softcapping(input, self.cap), *args, **kwargs)


class Gemma2Attention(DotProductAttention):
    """Cap the scores, and apply the window to the first of every two layers.

    The released models have the window there; NeMo's class applies it to the second. modelopt prunes subclasses of
    Megatron's class only.
    """

    def __init__(self, config: Any, layer_number: int, *args: Any, **kwargs: Any):
        """Build the attention; see `DotProductAttention`."""
        local = copy.copy(config)
        local.window_size = config.window_size if layer_number % 2 else None
        super().__init__(
            local, layer_number, *args, **kwargs | {"softmax_scale": 1 / math.sqrt(config.query_pre_attn_scalar)}
        )
        self.config = config
        self.scale_mask_softmax.__class__ = CappedSoftmax
        self.scale_mask_softmax.cap = config.attn_logit_softcapping


class Gemma3SelfAttention(SelfAttention):
    """Choose the rotary embeddings of a local or of a global layer.

    NeMo's class overrides ``forward`` without an argument that Megatron passes, so it fails on a GPU as well.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        """Build the attention; see `SelfAttention`."""
        super().__init__(*args, **kwargs)
        self.register_forward_pre_hook(_choose_rotary, with_kwargs=True)


def _choose_rotary(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of a `Gemma3SelfAttention` with one of the two stacked rotary embeddings."""
    layer: Any = module
    local = gemma3._is_local_attn_layer(layer.layer_number, layer.config.interleaved_attn_pattern)
    return args, {**kwargs, "rotary_pos_emb": kwargs["rotary_pos_emb"][0 if local else 1]}


class Gemma3Attention(DotProductAttention):
    """Apply the window to local layers only; the interleaved pattern of the configuration decides which they are."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: AttnMaskType, *args: Any, **kwargs: Any):
        """Build the attention; see `DotProductAttention`."""
        local = copy.copy(config)
        is_local = gemma3._is_local_attn_layer(layer_number, config.interleaved_attn_pattern)
        local.window_size = (config.window_size, 0) if is_local else None
        if config.is_vision_language:
            attn_mask_type = AttnMaskType.arbitrary
        super().__init__(local, layer_number, attn_mask_type, *args, **kwargs)
        self.config = config


def gemma2_spec(config: Any) -> ModuleSpec:
    """Return the spec of a layer of Gemma 2."""
    return _spec(SelfAttention, Gemma2Attention, IdentityOp)


def gemma3_spec(config: Any) -> ModuleSpec:
    """Return the spec of a layer of Gemma 3."""
    return _spec(Gemma3SelfAttention, Gemma3Attention, WrappedTorchNorm)


def _spec(attention: type, core_attention: type, head_norm: type) -> ModuleSpec:
    """Return the spec of a layer with a norm before and after attention and MLP."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=WrappedTorchNorm,
            self_attention=ModuleSpec(
                module=attention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=core_attention,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                    linear_proj=PostNormLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=WrappedTorchNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=PostNormLinear),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_SAVED_AS,
        ),
    )

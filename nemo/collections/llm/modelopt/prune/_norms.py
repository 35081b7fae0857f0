"""Norm classes of PyTorch as prunable modules, so that models prune without Transformer Engine and Apex."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from nemo_modelopt_dropin.cpu_backend import zero_centred

from ..errors import ModelOptConfigError

_EXTENDED = "extended "


def register_torch_norms() -> None:
    """Make torch's norms, and the zero-centred ones of the CPU backend, known to modelopt's registry.

    modelopt prunes no ``nn.RMSNorm``, and from 0.41 on passes the shared hidden size to a norm's set-up, which its own
    ``nn.LayerNorm`` class does not take. Called when a model is pruned, not at import; a second call does nothing.
    """
    from modelopt.torch.nas.modules import _DynamicLayerNorm
    from modelopt.torch.nas.registry import DMRegistry
    from modelopt.torch.nas.traced_hp import TracedHp

    def setup(self: Any, *, num_features: Any = None) -> None:
        if num_features is None:
            num_features = TracedHp(list(range(1, self.normalized_shape[-1] + 1)))
        self._register_hparam("num_features", num_features)
        for name in ("weight", "bias"):
            if hasattr(self, name):
                self._register_dynamic_attribute(name, self._cut_to_active_features)
        self._register_dynamic_attribute("normalized_shape", self._get_normalized_shape)

    for norm in (nn.LayerNorm, nn.RMSNorm, zero_centred.ZeroCentredLayerNorm, zero_centred.ZeroCentredRMSNorm):
        if norm in DMRegistry:
            if "num_features" in inspect.signature(DMRegistry[norm]._setup).parameters:
                continue
            DMRegistry.unregister(norm)
        dynamic = type(f"_Dynamic{norm.__name__}", (_DynamicLayerNorm,), {"_setup": setup})
        DMRegistry.register({norm: f"nn.{norm.__name__}"})(dynamic)


def register_extended(core: nn.Module) -> None:
    """Make the embedding and the output layer of a model known to modelopt if their class extends a known one.

    Those of Gemma scale or cap what their parent returns, which depends on no size that is cut.

    Args:
        core: a Megatron-Core ``GPTModel`` or ``MambaModel``.
    """
    from modelopt.torch.nas.registry import DMRegistry

    # NeMo extends each model by a class of its own. Those of earlier models have the same name, which must be unique.
    for kind in [kind for kind, key in DMRegistry._key_registry.items() if key.startswith(_EXTENDED)]:
        DMRegistry.unregister(kind)
    for name in ("embedding", "output_layer"):
        kind = type(getattr(core, name, None))
        if not issubclass(kind, nn.Module) or kind in DMRegistry:
            continue
        for parent in kind.__mro__:
            if issubclass(parent, nn.Module) and parent in DMRegistry:
                dynamic = DMRegistry._registry[DMRegistry._get_registered_nn_class(parent)]
                DMRegistry.register({kind: f"{_EXTENDED}{kind.__module__}.{kind.__qualname__}"})(dynamic)
                break


def check_norms(core: nn.Module) -> None:
    """Raise an error for a model whose norms modelopt cannot slice.

    Args:
        core: a Megatron-Core ``GPTModel`` or ``MambaModel``.

    Raises:
        ModelOptConfigError: naming the norm classes and the layer spec to use.
    """
    from megatron.core.transformer.identity_op import IdentityOp

    from modelopt.torch.nas.registry import DMRegistry

    decoder: Any = core.decoder
    norms: list[Any] = [getattr(decoder, name, None) for name in ("final_layernorm", "final_norm")]
    for layer in decoder.layers:
        norms.append(getattr(layer, "norm", None))
        for norm, block in (("input_layernorm", "self_attention"), ("pre_mlp_layernorm", "mlp")):
            if not isinstance(getattr(layer, block, None), IdentityOp):
                norms.append(getattr(layer, norm, None))
    unknown = sorted({type(norm).__name__ for norm in norms if norm is not None and type(norm) not in DMRegistry})
    if unknown:
        raise ModelOptConfigError(
            f"Norm layers of class {unknown} cannot be pruned (IdentityOp: the norm is fused into the linear layer); "
            "restore the model with modelopt's layer spec or Megatron's local spec, in which norms are "
            "LayerNorm or RMSNorm modules of their own."
        )


def check_attention(core: nn.Module) -> None:
    """Raise an error for a model whose attention modelopt cannot convert, as NeMo's own classes for Gemma 2 and 3.

    Args:
        core: a Megatron-Core ``GPTModel`` or ``MambaModel``.

    Raises:
        ModelOptConfigError: naming the classes, and what can be pruned.
    """
    from megatron.core.transformer.attention import SelfAttention

    from modelopt.torch.nas.registry import DMRegistry

    decoder: Any = core.decoder
    unknown = set()
    for attention in (getattr(layer, "self_attention", None) for layer in decoder.layers):
        if not isinstance(attention, SelfAttention):
            continue
        inner = type(attention.core_attention)
        if not any(kind.__name__ in ("DotProductAttention", "TEDotProductAttention") for kind in inner.__mro__):
            unknown.add(inner.__name__)
        if type(attention) not in DMRegistry:
            unknown.add(type(attention).__name__)
    if unknown:
        raise ModelOptConfigError(
            f"Attention of class {sorted(unknown)} cannot be pruned by importance, because modelopt prunes Megatron's "
            "classes only; set drop_layers."
        )

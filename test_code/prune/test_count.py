"""Parameters are counted by their names, as the layers of Transformer Engine have them too."""

from __future__ import annotations

import types

import pytest
import torch
from megatron.core import parallel_state
from torch import nn

from nemo.collections.llm.modelopt.prune import _count

SIZES = {"hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2}


def _linear(**shapes: tuple[int, ...]) -> nn.Module:
    module = nn.Module()
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    return module


def _fused_layer(norm: dict[str, tuple[int, ...]], bias: bool) -> nn.Module:
    """Return a transformer layer whose norms are parts of the linear layers after them."""
    qkv, proj, fc1, fc2 = (32, 16), (16, 16), (48, 16), (16, 24)

    def own(shape):
        return {"weight": shape, **({"bias": shape[:1]} if bias else {})}

    attention = nn.ModuleDict({"linear_qkv": _linear(**own(qkv), **norm), "linear_proj": _linear(**own(proj))})
    mlp = nn.ModuleDict({"linear_fc1": _linear(**own(fc1), **norm), "linear_fc2": _linear(**own(fc2))})
    layer: nn.Module = nn.ModuleDict({"self_attention": attention, "mlp": mlp})
    layer.layer_number = 1
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kinds", [["weight"], ["weight", "bias"]])
def test_norms_inside_linear_layers_are_no_biases(monkeypatch, kinds, bias):
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: 1)
    core = nn.Module()
    core.config = types.SimpleNamespace(hidden_size=16, kv_channels=4, gated_linear_unit=True)
    core.share_embeddings_and_output_weights = False
    layer = _fused_layer({f"layer_norm_{kind}": (16,) for kind in kinds}, bias)
    core.decoder = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    found = _count.count(_count.model_terms(core), SIZES, [1])
    assert found == sum(parameter.numel() for parameter in core.parameters())

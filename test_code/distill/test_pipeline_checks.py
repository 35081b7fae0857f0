"""Layers that cannot be compared raise an error before the teacher is loaded."""

from __future__ import annotations

import pytest
from megatron.core import parallel_state
from megatron.core.transformer.identity_op import IdentityOp
from torch import nn

from nemo.collections.llm.modelopt import ModelOptConfigError
from nemo.collections.llm.modelopt.distill._pipeline_checks import check_student_layers


@pytest.fixture(autouse=True)
def one_stage(monkeypatch):
    """Be the only pipeline stage, without process groups."""
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: 1)


def _student(norm: type[nn.Module]) -> nn.Module:
    """Return a model with the layer names of a GPT."""

    def layer() -> nn.Module:
        parts = {"input_layernorm": norm(4), "self_attention": nn.Linear(4, 4)}
        return nn.ModuleDict({**parts, "pre_mlp_layernorm": norm(4), "mlp": nn.Linear(4, 4)})

    return nn.ModuleDict({"decoder": nn.ModuleDict({"layers": nn.ModuleList([layer(), layer()])})})


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("decoder.layers.1.input_layernorm",) * 2, "'decoder.layers.0', or the whole block, .*1.self_attention'"),
        (("decoder.layers.0.input_layernorm",) * 2, "the output of the layer before it, or the whole block"),
        (
            ("decoder.layers.0.mlp", "decoder.layers.1.pre_mlp_layernorm"),
            "The teacher's layer .* 'decoder.layers.1.mlp'",
        ),
    ],
)
def test_norms_inside_linear_layers_are_refused(pair, message):
    with pytest.raises(ModelOptConfigError, match=message):
        check_student_layers(_student(IdentityOp), {pair: None})
    check_student_layers(_student(nn.LayerNorm), {pair: None})


def test_an_unknown_layer_is_refused_with_similar_names():
    with pytest.raises(ModelOptConfigError, match="no layer 'decoder.layers.1.mpl'.*decoder.layers.1.mlp"):
        check_student_layers(_student(nn.LayerNorm), {("decoder.layers.1.mpl", "decoder.layers.1.mlp"): None})

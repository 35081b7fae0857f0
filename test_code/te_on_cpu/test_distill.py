"""Distillation of models on Transformer Engine's layers, against local layers with the same weights."""

from __future__ import annotations

import pytest

from test_code.support import tolerances
from test_code.te_on_cpu import jobs

pytestmark = pytest.mark.te

LOSS = tolerances.of(tolerances.LOSS)
# Both losses, so that the language-model loss is computed before the logits are compared.
BOTH = "skip_lm_loss: false\n"
PAIRS = "intermediate_layer_pairs: [[{0}, {0}]]\n"
# An output of a row-parallel layer, of a fused norm and column-parallel layer, and of a norm of its own.
LAYERS = ["decoder.layers.1.mlp.linear_fc2", "decoder.layers.2.self_attention.linear_qkv", "decoder.final_layernorm"]


@pytest.fixture(scope="module")
def students(ranks_factory, tmp_path_factory):
    """Return the checkpoints of one student by spec; its MLP is half as wide as the teacher's."""
    folder = tmp_path_factory.mktemp("student")
    ranks_factory(1).run(jobs.make_pair, str(folder), ffn_hidden_size=64)
    return {name: str(folder / name) for name in jobs.SPECS}


def losses(pool, llama, students, name, settings=None, **layout):
    return pool.run(jobs.distill, llama[0][name], students[name], name, settings, layout)[0]


@pytest.mark.parametrize("layer", [pytest.param(None, marks=pytest.mark.main), *LAYERS])
def test_losses_equal_those_of_local_layers(ranks, llama, students, tmp_path, layer):
    settings = None
    if layer:
        settings = str(tmp_path / "distillation.yaml")
        (tmp_path / "distillation.yaml").write_text(PAIRS.format(layer))
    local = losses(ranks(1), llama, students, "local", settings)
    assert losses(ranks(1), llama, students, "te", settings) == pytest.approx(local, rel=LOSS)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 2, "sp": True}, {"pp": 2}], ids=str)
def test_losses_equal_those_of_one_rank(ranks, llama, students, layout):
    local = losses(ranks(1), llama, students, "local")
    # Sums over ranks are added in another order.
    assert losses(ranks(2), llama, students, "te", **layout) == pytest.approx(local, rel=2 * LOSS)


@pytest.mark.main
def test_losses_in_bf16_equal_those_of_local_layers(ranks, llama, students):
    """Both round after each layer, but TE's norms and products are fused: other roundings, the same losses."""
    pool, found = ranks(1), {}
    for name in jobs.SPECS:
        found[name] = pool.run(jobs.distill, llama[0][name], students[name], name, bf16=True)[0]
    assert found["te"] == pytest.approx(found["local"], rel=tolerances.of(tolerances.LOSS, tolerances.BF16))


@pytest.mark.parametrize("bf16", [pytest.param(False, marks=pytest.mark.main), True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tp", [1, 2])
def test_logits_are_compared_before_the_cross_entropy_overwrites_them(ranks, llama, students, tmp_path, tp, bf16):
    """TE's cross entropy leaves its gradient in the logits that the distillation loss compares."""
    path = tmp_path / "distillation.yaml"
    path.write_text(BOTH)
    arguments = (llama[0]["te"], students["te"], "te", str(path), {"tp": tp})
    own, other = (ranks(tp).run(jobs.distill, *arguments, bf16=bf16, te_loss=te)[0] for te in (True, False))
    dtype = tolerances.BF16 if bf16 else tolerances.FP32
    assert own == pytest.approx(other, rel=tolerances.of(tolerances.LOSS, dtype))


@pytest.mark.main
def test_a_norm_that_is_fused_into_a_layer_is_refused_with_the_layer_to_use(ranks, llama, students, tmp_path):
    path = tmp_path / "distillation.yaml"
    path.write_text(PAIRS.format("decoder.layers.1.input_layernorm"))
    message = ranks(1).run(jobs.refused_distillation, llama[0]["te"], students["te"], str(path))[0]
    assert "layers.1.input_layernorm' does nothing" in message and "decoder.layers.1.self_attention" in message

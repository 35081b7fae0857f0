"""Input scales and quantizers that a checkpoint cannot hold raise an error; the others are folded into norms."""

from __future__ import annotations

import pytest
import torch


def test_a_quantized_output_layer_that_is_tied_raises_an_error(cpu_backend):
    from types import SimpleNamespace

    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.export import support

    core = torch.nn.Module()
    core.output_layer, core.share_embeddings_and_output_weights = torch.nn.Linear(2, 2), True
    weights = {"*weight_quantizer": {"num_bits": 8, "axis": 0}, "default": {"enable": False}}
    model = SimpleNamespace()
    with pytest.raises(ModelOptConfigError, match="output layer shares the embedding's weight.*nemo"):
        support.check_contents("hf", {"quant_cfg": weights}, model, core)
    off = {**weights, "*output_layer*": {"enable": False}}
    support.check_contents("hf", {"quant_cfg": off}, model, core)
    support.check_contents("nemo", {"quant_cfg": weights}, model, core)
    core.share_embeddings_and_output_weights = False
    support.check_contents("hf", {"quant_cfg": weights}, model, core)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"*input_quantizer": {"num_bits": 8}}, "only together with weights, and linear_fc1 has no weight quantizer"),
        (
            {"*weight_quantizer": {"num_bits": 8, "axis": 0}, "*output_quantizer": {"num_bits": 8}},
            "readers do not quantize outputs, such as those of linear_fc1",
        ),
    ],
)
def test_quantizers_that_files_cannot_describe_raise_an_error(cpu_backend, patterns, message):
    from types import SimpleNamespace

    import modelopt.torch.quantization as mtq

    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import quant_cfg_entries
    from nemo.collections.llm.modelopt.quantization.export import support

    core = torch.nn.ModuleDict({"linear_fc1": torch.nn.Linear(4, 4)})
    quant_cfg = {"quant_cfg": {"default": {"enable": False}, **patterns}, "algorithm": "max"}
    support.check_contents("nemo", quant_cfg, SimpleNamespace(), core)
    with pytest.raises(ModelOptConfigError, match=message):
        support.check_contents("hf", quant_cfg, SimpleNamespace(), core)
    mtq.quantize(
        core, quant_cfg_entries.native(quant_cfg, "patterns"), lambda model: model["linear_fc1"](torch.ones(1, 4))
    )
    with pytest.raises(ModelOptConfigError, match=message):
        support.check_converted(core)


def test_scales_that_cannot_be_stored_raise_an_error_before_calibrating(cpu_backend):
    from types import SimpleNamespace

    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.export import input_scales, support

    scaled = {"quant_cfg": {}, "algorithm": {"method": "awq_lite"}}
    latent = object.__new__(MLASelfAttention)
    torch.nn.Module.__init__(latent)
    core = torch.nn.Sequential(latent)
    with pytest.raises(ModelOptConfigError, match="multi-latent attention differently.*nemo"):
        support.check_contents("hf", scaled, SimpleNamespace(), core)
    support.check_contents("nemo", scaled, SimpleNamespace(), core)
    support.check_contents("hf", {"quant_cfg": {}, "algorithm": "max"}, SimpleNamespace(), core)
    experts = torch.nn.Module()
    experts.config = SimpleNamespace(num_moe_experts=4)
    assert "experts' inputs" in input_scales.obstacle(experts, packs_experts=True)
    assert input_scales.obstacle(experts) is None
    assert support.packs_experts("Llama4ForConditionalGeneration") and not support.packs_experts("LlamaForCausalLM")


@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_norm_with_bias_is_folded_in_any_form(cpu_backend, zero_centred, fused):
    """The norm is a module or a part of the linear layer, and adds one to its weight or not."""
    from megatron.core.transformer.identity_op import IdentityOp

    from nemo.collections.llm.modelopt.quantization.export import input_scales
    from nemo.collections.llm.modelopt.quantization.export.layouts import layer as layers

    core, linear, scale = scaled_layer(zero_centred, fused)
    norm = core.input_layernorm
    assert isinstance(norm, IdentityOp) is fused
    (fold,) = input_scales.folds(core)
    weight, bias = (parameter for parameter, _ in fold.parameters())
    before = [parameter.detach().clone() for parameter in (weight, bias)]
    value = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))

    def output():
        plain = torch.nn.functional.layer_norm(value, (8,))
        return plain * (weight + (1.0 if zero_centred else 0.0)) + bias

    expected = output() * scale
    layer = layers.Layer("W4A16_AWQ", torch.ones(()), pre_quant_scale=scale)
    with input_scales.folded(core, {id(linear): layer}, torch.float32):
        torch.testing.assert_close(output(), expected)
    assert layer.pre_quant_scale is None
    assert all(torch.equal(now, then) for now, then in zip((weight, bias), before, strict=True))


def test_norms_are_rounded_as_they_are_stored(cpu_backend):
    """The check of the logits uses the stored norm divided by the scale that the model in memory still applies."""
    from nemo.collections.llm.modelopt.quantization.export import input_scales

    core, _, scale = scaled_layer(zero_centred=True, fused=False)
    found = input_scales.norms_as_stored(core, torch.bfloat16)
    (fold,) = input_scales.folds(core)
    weight, bias = (parameter for parameter, _ in fold.parameters())
    stored = ((weight + 1) * scale - 1).bfloat16()
    torch.testing.assert_close((found[id(weight)] + 1) * scale - 1, stored.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[id(bias)] * scale, (bias * scale).bfloat16().float(), rtol=1e-5, atol=1e-6)


def scaled_layer(zero_centred: bool, fused: bool):
    """Return a transformer layer with one linear layer whose input is scaled, the linear layer, and the scale."""
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from modelopt.torch.quantization.nn import TensorQuantizer

    generator = torch.Generator().manual_seed(0)
    scale, linear = torch.rand(8, generator=generator) + 0.5, torch.nn.Linear(8, 4)
    linear.input_quantizer = TensorQuantizer()
    linear.input_quantizer.pre_quant_scale = scale
    norm = linear if fused else torch.nn.LayerNorm(8)
    norm.zero_centered_gamma = zero_centred
    names = ("layer_norm_weight", "layer_norm_bias") if fused else ("weight", "bias")
    for name in names:
        setattr(norm, name, torch.nn.Parameter(torch.randn(8, generator=generator)))
    layer = object.__new__(TransformerLayer)
    torch.nn.Module.__init__(layer)
    layer.input_layernorm = IdentityOp() if fused else norm
    layer.self_attention, layer.mlp = torch.nn.Module(), IdentityOp()
    layer.self_attention.linear_qkv = linear
    return layer, linear, scale

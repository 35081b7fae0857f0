"""Input scales move into the layers before, in the model in memory, for the layout that has none."""

from __future__ import annotations

import contextlib

import pytest
import torch

from test_code.support import installed, jobs_quant, jobs_scales, tolerances

# SmoothQuant needs quantized inputs; all have scales for the inputs of every layer.
ALGORITHMS = ("int4_awq", "int8_sq", "nvfp4_awq")
QUANT = {"calibration_dataset_size": 16, "awq_block_size": 16, "enable_kv_cache": False}


# --- on ranks ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def moves(wanted: bool):
    """Move input scales, or keep them, whatever is exported."""
    from nemo.collections.llm.modelopt.quantization.insert import shared_scales

    decide = shared_scales.decide
    shared_scales.decide = lambda *args: wanted
    try:
        yield
    finally:
        shared_scales.decide = decide


def both(checkpoint: str, data: str, algorithm: str, tp: int = 1, spread: float = 0.0, **quant) -> dict:
    """Quantize a checkpoint with its input scales kept and moved; return what both models hold and compute.

    Args:
        checkpoint: The NeMo checkpoint.
        data: The calibration texts.
        algorithm: The algorithm.
        tp: Tensor parallel size.
        spread: See `spread_channels`.
        **quant: Settings of the quantization.
    """
    from test_code.support import ranks

    found = {}
    for name in ("kept", "moved"):
        ranks.reset()
        with moves(name == "moved"):
            found[name] = quantized(checkpoint, data, algorithm, tp, spread, **quant)
    return found


def quantized(checkpoint: str, data: str, algorithm: str, tp: int = 1, spread: float = 0.0, **quant) -> dict:
    """Quantize a checkpoint and return what the model holds and computes."""
    from nemo.collections.llm.modelopt.quantization.export import hf_verify, input_scales
    from test_code.support import tiny

    model, quantizer = restored(checkpoint, data, algorithm, tp, **quant)
    core = tiny.core(model)
    spread_channels(core, spread)
    original = hf_verify.quantized_logits(core, tiny.VOCABULARY).exact
    quantizer.quantize(model)
    logits = hf_verify.quantized_logits(core, tiny.VOCABULARY).rounded
    with hf_verify.switched_off(core, lambda name, quantizer: True):
        unrounded = hf_verify.quantized_logits(core, tiny.VOCABULARY).exact
    return {
        "original": original,
        "logits": logits,
        # Without rounding, scales and their inverses cancel.
        "unrounded": unrounded,
        "scaled": [name for name, module in core.named_modules() if input_scales.scale_of(module) is not None],
        "layouts": [layout_of(core, layout) for layout in ("auto", "compressed-tensors")],
        "amax": jobs_quant.amax_of(model),
        "largest": largest_cached(core, lambda: quantizer._get_forward_loop(model)(core)),
    }


def layout_of(core, layout: str) -> str:
    """Return the layout in which a model is written, or the error."""
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.export import layout_choice

    try:
        return layout_choice.of_model(core, layout)
    except ModelOptConfigError as error:
        return str(error)


def restored(checkpoint: str, data: str, algorithm: str, tp: int = 1, **quant):
    """Restore a checkpoint; return the model and a Quantizer for it."""
    import os

    from nemo.collections.llm.modelopt import (
        QuantizationConfig,
        Quantizer,
        setup_trainer_and_restore_model_with_modelopt_spec,
    )

    settings = {**QUANT, "calibration_dataset": data, **quant}
    config = QuantizationConfig(algorithm=algorithm, calibration_batch_size=4, calibration_seq_len=32, **settings)
    model, _ = setup_trainer_and_restore_model_with_modelopt_spec(
        checkpoint, tensor_model_parallel_size=tp, devices=int(os.environ["WORLD_SIZE"])
    )
    return model, Quantizer(config, None)


def spread_channels(core, spread: float) -> None:
    """Make some channels of the inputs of all layers larger than others, as in trained models of billions of weights.

    Args:
        core: The model; the weights that read the channels are divided by the same factors.
        spread: Standard deviation of the logarithm of the factors.
    """
    from megatron.core.transformer.transformer_layer import TransformerLayer

    if not spread:
        return
    generator = torch.Generator().manual_seed(1)
    for layer in [module for module in core.modules() if isinstance(module, TransformerLayer)]:
        mlp = layer.mlp
        for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
            norm.weight.data *= (spread * torch.randn(norm.weight.shape, generator=generator)).exp()
        up = (spread * torch.randn(mlp.linear_fc2.weight.shape[1], generator=generator)).exp()
        mlp.linear_fc1.weight.data *= torch.cat([torch.ones_like(up), up])[:, None]
        # Four heads of 16 in two groups: the rows of v are the last of each group.
        rows = torch.ones(2, 4, 16)
        rows[:, -1] = (spread * torch.randn(2, 16, generator=generator)).exp()
        layer.self_attention.linear_qkv.weight.data *= rows.view(-1, 1)


def largest_cached(core, run) -> dict[str, float]:
    """Return the largest absolute value that enters each quantizer of the KV cache over the calibration data."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    found: dict[str, float] = {}
    hooks = []
    for name, module in core.named_modules():
        if "bmm_quantizer" in name and isinstance(module, TensorQuantizer) and module.is_enabled:

            def keep(_, args, name=name):
                found[name] = max(found.get(name, 0.0), float(args[0].abs().max()))

            hooks.append(module.register_forward_pre_hook(keep))
    if hooks:
        run()
    for hook in hooks:
        hook.remove()
    return found


def reused(checkpoint: str, data: str, folder: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Store the calibrated state with moved scales and quantize from it; return both logits, and the error without."""
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.export import hf_verify
    from test_code.support import ranks, tiny

    found, message = [], ""
    for name in ("save", "load", "other"):
        ranks.reset()
        model, quantizer = restored(checkpoint, data, "int4_awq")
        with moves(name != "other"):
            if name == "save":
                quantizer.quantize(model)
                quantizer.save_state(folder)
            else:
                try:
                    quantizer.load_state(folder, model)
                except ModelOptConfigError as error:
                    message = str(error)
                    continue
        found.append(hf_verify.quantized_logits(tiny.core(model), tiny.VOCABULARY).rounded)
    return found[0], found[1], message


def refusals(folder: str) -> dict[str, str | bool]:
    """Return what is decided for models and layouts: a switch, or the error."""
    from nemo.collections.llm.modelopt import ExportConfig, setup_trainer_and_restore_model_with_modelopt_spec
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices
    from nemo.collections.llm.modelopt.quantization.insert import shared_scales
    from test_code.quantization.test_hf_scales import make_nemotron
    from test_code.support import ranks, tiny

    presets = choices.get_quant_cfg_choices()
    found: dict[str, str | bool] = {}
    for family, make in (("moe", jobs_scales.make_moe), ("nemotron", make_nemotron)):
        ranks.reset()
        checkpoint = make(f"{folder}/{family}")
        ranks.reset()
        model, _ = setup_trainer_and_restore_model_with_modelopt_spec(checkpoint)
        for layout in ("compressed-tensors", "modelopt", "auto"):
            for name in ("int4_awq", "int8_sq", "int4"):
                export = ExportConfig(path="unused", export_format="hf", hf_layout=layout)
                try:
                    answer: str | bool = shared_scales.decide(tiny.core(model), export, {name: presets[name]})
                except ModelOptConfigError as error:
                    answer = str(error)
                found[f"{family} {layout} {name}"] = answer
    return found


def decisions_for_nemo(checkpoint: str) -> dict[str, bool]:
    """Return by layout whether the scales of int4_awq are moved for a NeMo checkpoint."""
    from nemo.collections.llm.modelopt import ExportConfig, setup_trainer_and_restore_model_with_modelopt_spec
    from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices
    from nemo.collections.llm.modelopt.quantization.insert import shared_scales
    from test_code.support import tiny

    planned = {"int4_awq": choices.get_quant_cfg_choices()["int4_awq"]}
    core = tiny.core(setup_trainer_and_restore_model_with_modelopt_spec(checkpoint)[0])
    return {
        layout: shared_scales.decide(core, ExportConfig("unused", "nemo", hf_layout=layout), planned)
        for layout in ("compressed-tensors", "modelopt", "auto")
    }


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error."""
    return float((found - expected).norm() / expected.norm())


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(ranks_factory, tmp_path_factory):
    """Make the checkpoints of tiny models with bf16 weights and grouped queries, and calibration texts."""
    folder = tmp_path_factory.mktemp("shared")
    data = jobs_quant.corpus(folder / "text.jsonl")
    run = ranks_factory(1).run
    return {name: run(jobs_scales.import_family, str(folder), name)[0] for name in ("llama", "qwen2")} | {"data": data}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_model_computes_the_same_without_input_scales(ranks, source, algorithm, family):
    """Qwen2 has biases of q, k and v."""
    found = ranks(1).run(both, source[family], source["data"], algorithm, spread=1.0)[0]
    kept, now = found["kept"], found["moved"]
    assert len(kept["scaled"]) == 8 and now["scaled"] == []
    # A model with input scales is written in the layout that has them, and another one is not possible.
    assert kept["layouts"][0] == "modelopt"
    assert now["layouts"][1] == "compressed-tensors" or algorithm == "nvfp4_awq"
    assert "has no scales of inputs" in kept["layouts"][1]
    assert kept["amax"].keys() == now["amax"].keys()
    # Sums of fp32.
    assert error(now["unrounded"], kept["original"]) < 5e-6
    assert error(now["logits"], kept["logits"]) > 1e-4


def test_scales_that_heads_share_cost_little(ranks, source, tmp_path):
    """AWQ is better than plain INT4, and as good with the scales that the heads of a group share."""
    run, llama, data = ranks(1).run, source["llama"], source["data"]
    found = run(both, llama, data, "int4_awq", spread=1.0)[0]
    plain = run(quantized, llama, data, jobs_scales.plain_int4(str(tmp_path / "int4.json")), spread=1.0)[0]
    errors = {name: error(one["logits"], one["original"]) for name, one in {**found, "plain": plain}.items()}
    assert errors["moved"] < 0.9 * errors["plain"], errors
    assert errors["moved"] < 1.15 * errors["kept"], errors


@pytest.mark.parametrize("algorithm", ["int4_awq", "int8_sq"])
def test_tensor_ranks_move_the_same_scales(ranks, source, algorithm):
    llama, data = source["llama"], source["data"]
    whole = ranks(1).run(both, llama, data, algorithm)[0]["moved"]
    parts = ranks(2).run(both, llama, data, algorithm, tp=2)
    for found in parts:
        assert found["moved"]["scaled"] == []
        assert error(found["moved"]["unrounded"], found["kept"]["original"]) < 5e-6
    now = parts[0]["moved"]
    # The norms are on both ranks, and must have become the same.
    torch.testing.assert_close(now["logits"], parts[1]["moved"]["logits"], rtol=0, atol=0)
    if algorithm == "int8_sq":
        inputs = [name for name in whole["amax"] if name.endswith("input_quantizer")]
        assert len(inputs) == 8
        for name in inputs:
            torch.testing.assert_close(now["amax"][name], whole["amax"][name], rtol=tolerances.of("amax"), atol=0)
        # A part of the inputs is rounded to the other neighbour, because sums have another order.
        changed = error(whole["logits"], whole["original"])
        assert error(now["logits"], whole["logits"]) < 0.5 * changed


@installed.since_0_43
def test_the_kv_cache_is_calibrated_on_the_new_values(ranks, source):
    quant = {"enable_kv_cache": True, "comparison_size": 0}
    found = ranks(1).run(both, source["llama"], source["data"], "int4_awq", spread=1.0, **quant)[0]
    kept, now = found["kept"], found["moved"]
    for one in (kept, now):
        cached = {name: value for name, value in one["amax"].items() if "bmm_quantizer" in name}
        assert len(cached) == 4 and len(one["largest"]) == 4
    values = [name for name in now["amax"] if name.endswith("v_bmm_quantizer")]
    for name in values:
        assert float(now["amax"][name]) != pytest.approx(float(kept["amax"][name]), rel=0.01)
        # Weights are not quantized during the calibration.
        assert float(now["amax"][name]) == pytest.approx(now["largest"][name], rel=0.2)


def test_a_stored_state_with_moved_scales_is_used_again(ranks, source, tmp_path):
    first, again, message = ranks(1).run(reused, source["llama"], source["data"], str(tmp_path / "state"))[0]
    assert torch.equal(first, again)
    assert "input_scales" in message


def test_scales_move_in_a_nemo_checkpoint_if_its_later_layout_is_set(ranks, source):
    found = ranks(1).run(decisions_for_nemo, source["llama"])[0]
    assert found == {"compressed-tensors": True, "modelopt": False, "auto": False}


def test_what_cannot_move_raises_an_error_before_the_calibration(ranks, tmp_path):
    found = ranks(1).run(refusals, str(tmp_path))[0]
    for family, reason in (
        ("moe", "linear_fc1: the router reads the same norm as the experts"),
        ("nemotron", "linear_fc2: an activation is between it and the layer before"),
    ):
        for name, plain in (("int4_awq", "int4"), ("int8_sq", "int8")):
            text = found[f"{family} compressed-tensors {name}"]
            assert isinstance(text, str), text
            assert text.startswith(f"algorithm={name!r} cannot be exported with hf_layout='compressed-tensors'")
            assert reason in text and f"Use {plain!r} instead of {name!r}, hf_layout='modelopt'" in text
            assert found[f"{family} modelopt {name}"] is False
            assert found[f"{family} auto {name}"] is False, "written in modelopt's layout, with a warning"
        assert found[f"{family} compressed-tensors int4"] is False


def test_weights_in_bf16_get_an_amax_of_what_they_became(cpu_backend):
    import modelopt.torch.quantization as mtq

    from nemo.collections.llm.modelopt.quantization.insert import shared_scales

    model = torch.nn.Sequential(torch.nn.Linear(32, 8)).to(torch.bfloat16)
    mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda model: model(torch.ones(1, 32, dtype=torch.bfloat16)))
    linear, factors = model[0], torch.linspace(0.3, 3.0, 8)
    expected = (linear.weight.float() * factors[:, None]).bfloat16()
    bias = (linear.bias.float() * factors).bfloat16()
    inputs = linear.input_quantizer.amax.clone()
    with torch.no_grad():
        shared_scales._rescale_rows(linear, factors)
    assert torch.equal(linear.weight, expected) and torch.equal(linear.bias, bias)
    assert torch.equal(linear.weight_quantizer.amax.flatten(), expected.abs().amax(dim=1))
    assert torch.equal(linear.input_quantizer.amax, inputs)


# --- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1.0, 0.75])
@pytest.mark.parametrize("what", ["rows", "columns"])
def test_a_changed_weight_keeps_the_clipping_of_awq(cpu_backend, what, clip):
    """AWQ's search of the clipping chooses an amax below the largest value; moving a scale does not undo that."""
    from nemo.collections.llm.modelopt.quantization.export.layouts import layer as layers
    from nemo.collections.llm.modelopt.quantization.insert import shared_scales
    from test_code.quantization.test_hf_codes import layer

    generator = torch.Generator().manual_seed(0)
    linear = layer("W4A16_AWQ", torch.randn(6, 32, generator=generator), clip)
    with torch.no_grad():
        if what == "rows":
            shared_scales._rescale_rows(linear, torch.rand(6, generator=generator) + 0.5)
        else:
            old, new = torch.rand(2, 32, generator=generator) + 0.5
            shared_scales._rescale_columns(linear, old, new)
    largest = linear.weight.detach().abs().view(6, 4, 8).amax(-1)
    # The share is a quotient in fp32.
    torch.testing.assert_close(layers.read(linear).scale * 7, largest * clip, rtol=1e-6, atol=0)

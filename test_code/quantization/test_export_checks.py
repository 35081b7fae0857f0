"""What can be exported is checked before calibrating, and an export appears completely or not at all."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch

MODULE = "nemo.collections.llm.modelopt.quantization.quantizer"


def stage_on_two_ranks(target) -> str:
    """Fail on rank 1 while all ranks export; return the class of the error of this rank."""
    from nemo.collections.llm.modelopt import _staging
    from test_code.support import tiny

    tiny.init_parallel()
    try:
        with _staging.staged(Path(target), "test") as folder:
            folder.mkdir(exist_ok=True)
            if torch.distributed.get_rank() == 1:
                raise OSError("disk full")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


# --- what can be exported ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_state", [True, False])
def test_a_quantized_output_layer_needs_a_modelopt_that_leaves_its_state_out(cpu_backend, monkeypatch, has_state):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.export import support

    monkeypatch.setattr(support._output_layer, "has_state", lambda: has_state)
    head = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8}}}
    without = {"quant_cfg": {**head["quant_cfg"], "*output_layer*": {"enable": False}}}
    support.check_saved_head("hf", head)
    support.check_saved_head("nemo", without)
    refused = pytest.raises(ModelOptConfigError, match="A quantized output layer cannot be saved in a NeMo checkpoint")
    with refused if has_state else contextlib.nullcontext():
        support.check_saved_head("nemo", head)


@pytest.mark.parametrize("algorithm", ["MXFP4_DEFAULT_CFG", "MXINT8_DEFAULT_CFG", "W4A8_MXFP4_FP8_CFG"])
def test_hf_raises_an_error_for_what_it_cannot_write(cpu_backend, algorithm):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import _transformers_models
    from nemo.collections.llm.modelopt.quantization import quantizer as q
    from test_code.support import tiny

    message = f"algorithm='{algorithm}' cannot be exported.*hf.*nemo"
    with patch("torch.cuda.is_available", return_value=True):
        config = q.QuantizationConfig(algorithm=algorithm), q.ExportConfig(path="out", export_format="hf")
        if _transformers_models.exists():
            # With nemo-toolkit 2.5, these can be exported from transformers models, so the error depends on the model.
            quantizer = q.Quantizer(*config)
            never = MagicMock(side_effect=AssertionError("calibration began"))
            with pytest.raises(ModelOptConfigError, match=message):
                quantizer.quantize(tiny.model(), forward_loop=never)
        else:
            with pytest.raises(ModelOptConfigError, match=message):
                q.Quantizer(*config)
        for fmt in ("nemo", "trtllm"):
            q.Quantizer(q.QuantizationConfig(algorithm=algorithm), q.ExportConfig(path="out", export_format=fmt))


def _layer_of(name: str, rows: int, inputs: int, **config) -> torch.nn.Module:
    linear = torch.nn.Linear(inputs, rows, bias=False)
    linear.config = SimpleNamespace(**config)  # type: ignore[assignment]
    return torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({name: linear})})


@pytest.mark.parametrize(
    ("algorithm", "layer", "problem"),
    [
        ("block_fp8", ("linear_qkv", 512, 256, {"kv_channels": 64}), "128 weights do not divide the 64 rows of a head"),
        ("block_fp8", ("linear_fc1", 384, 256, {"gated_linear_unit": True}), "divide the 192 rows of one half"),
        ("block_fp8", ("linear_fc1", 384, 256, {"gated_linear_unit": False}), None),
        ("block_fp8", ("linear_proj", 256, 320, {}), "divide the 320 inputs"),
        ("block_fp8", ("linear_qkv", 512, 256, {"kv_channels": 128}), None),
        ("mxfp8", ("linear_proj", 256, 80, {}), "blocks of 32 weights do not divide the 80 inputs"),
        ("nvfp4", ("linear_proj", 256, 80, {}), None),
        ("nvfp4", ("linear_proj", 256, 72, {}), "blocks of 16 weights do not divide the 72 inputs"),
        ("fp8", ("linear_proj", 255, 77, {}), None),
    ],
)
def test_blocks_that_a_hugging_face_tensor_would_cut_raise_an_error_early(cpu_backend, algorithm, layer, problem):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices
    from nemo.collections.llm.modelopt.quantization.insert import row_blocks

    name, rows, inputs, config = layer
    model = _layer_of(name, rows, inputs, **config)
    quant_cfg = choices.get_quant_cfg_choices()[algorithm]
    row_blocks.check("nemo", quant_cfg, model)
    if problem is None:
        row_blocks.check("hf", quant_cfg, model)
    else:
        with pytest.raises(ModelOptConfigError, match=problem):
            row_blocks.check("hf", quant_cfg, model)


@pytest.mark.parametrize(
    "algorithm",
    ["fp8", "int8", "int8_sq", "int4_awq", "w4a8_awq", "int4", "nvfp4", "INT8_WEIGHT_ONLY_CFG", None]
    + [
        "block_fp8",
        "FP8_PER_CHANNEL_PER_TOKEN_CFG",
        "NVFP4_AWQ_LITE_CFG",
        "MXFP8_DEFAULT_CFG",
        "fp8_wo",
        "w4a16_nvfp4",
    ],
)
def test_hf_takes_the_algorithms_it_can_write(algorithm):
    import modelopt.torch.quantization as mtq

    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    # modelopt 0.37 has fewer presets, and an unknown name raises an error.
    unknown = str(algorithm).endswith("_CFG") and not hasattr(mtq, algorithm)
    refusal = pytest.raises(ModelOptConfigError, match=f"Unsupported quantization format: {algorithm}")
    with patch("torch.cuda.is_available", return_value=True), refusal if unknown else contextlib.nullcontext():
        q.Quantizer(q.QuantizationConfig(algorithm=algorithm), q.ExportConfig(path="out", export_format="hf"))


def test_hf_needs_a_model_with_an_exporter(cpu_backend):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.export import support
    from test_code.support import tiny

    model = tiny.model()
    support.check_architecture("nemo", model)
    with pytest.raises(ModelOptConfigError, match=r"no Hugging Face exporter for GPTModel.*llm.LlamaModel"):
        support.check_architecture("hf", model)


@pytest.mark.parametrize(
    ("name", "architecture"), [("LlamaModel", "LlamaForCausalLM"), ("GemmaModel", "GemmaForCausalLM")]
)
def test_architecture_is_known_before_calibrating(cpu_backend, name, architecture):
    from nemo.collections import llm
    from nemo.collections.llm.modelopt.quantization.export import support

    model = object.__new__(getattr(llm, name))
    assert support.hf_architecture(model) == architecture
    support.check_architecture("hf", model)


def test_hf_with_tensor_parallel_raises_an_error_if_parts_cannot_be_joined():
    from types import SimpleNamespace

    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.export import support

    config = SimpleNamespace(mamba_stack_spec=object())
    support.check_layout("hf", config, 1)
    support.check_layout("nemo", config, 2)
    with pytest.raises(ModelOptConfigError, match="Mamba model needs tensor parallel size 1, not 2"):
        support.check_layout("hf", config, 2)
    support.check_layout("hf", SimpleNamespace(num_moe_experts=8), 2)


def test_converted_models_are_checked_by_their_quantizers():
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.export import support

    def linear(inputs=(4, 3), **weight):
        layer = torch.nn.Linear(2, 2)
        layer.weight_quantizer = TensorQuantizer(QuantizerAttributeConfig(**weight))
        layer.input_quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=inputs))
        return layer

    def weight_only(**weight):
        layer = linear(**(weight or {"num_bits": (4, 3)}))
        layer.input_quantizer.disable()
        return layer

    support.check_converted(linear(num_bits=(4, 3)))
    message = r"axis=0, .* quantized inputs cannot be written; .*readers: FP8 \(vLLM, .*W4A8_AWQ \(TensorRT-LLM\)"
    with pytest.raises(ModelOptConfigError, match=message):
        support.check_converted(linear(num_bits=(4, 3), axis=0))
    support.check_converted(torch.nn.Sequential(linear(num_bits=(4, 3)), linear(8, num_bits=8, axis=0)))
    support.check_converted(torch.nn.Sequential(linear(num_bits=(4, 3)), weight_only(num_bits=8, axis=0)))
    # W4A8 is a format of modelopt's layout only, FP8 weights with inputs in 16 bits of the other.
    two_steps = linear(num_bits=4, block_sizes={-1: 2})
    two_steps.weight_quantizer = SequentialQuantizer(two_steps.weight_quantizer, weight_only().weight_quantizer)
    with pytest.raises(ModelOptConfigError, match="No layout of Hugging Face files can hold FP8_WO and W4A8_AWQ"):
        support.check_converted(torch.nn.Sequential(two_steps, weight_only(num_bits=(4, 3), axis=0)))


def test_trainer_is_needed_for_nemo():
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    with patch("torch.cuda.is_available", return_value=True):
        quantizer = q.Quantizer(q.QuantizationConfig(), q.ExportConfig(path="out", export_format="nemo"))
    with pytest.raises(AssertionError, match="Trainer required for NeMo export"):
        quantizer.export(MagicMock(), "model")


# --- parts of the writers and of the verification ---------------------------------------------------------------------


def test_export_of_nemo_falls_back_for_plain_models():
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    with (
        patch(f"{MODULE}.load_connector_from_trainer_ckpt") as load,
        patch(f"{MODULE}.unwrap_for_modelopt_operations"),
        patch(f"{MODULE}.mto.ModeloptStateManager.is_converted", return_value=False),
    ):
        load.return_value.nemo_load.return_value = (MagicMock(), None)
        assert q.export_hf_checkpoint("model", "out") is None


def test_what_is_not_quantized_is_compared_as_it_is_written(cpu_backend):
    import types

    from nemo.collections.llm.modelopt.quantization.export import hf_verify

    torch.manual_seed(0)
    plain, quantized = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    quantized.weight_quantizer = types.SimpleNamespace(is_enabled=True)
    model = torch.nn.Sequential(plain, quantized)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with hf_verify.rounded(model, torch.bfloat16):
        for name, value in model.named_parameters():
            expected = before[name] if name == "1.weight" else before[name].bfloat16().float()
            assert torch.equal(value, expected), name
        assert not torch.equal(plain.weight, before["0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_the_config_names_the_tokens_that_the_model_was_imported_with(tmp_path, cpu_backend):
    """NeMo's exporters take them from the tokenizer, but the imported generation config is more precise."""
    from types import SimpleNamespace

    from transformers import GenerationConfig

    from nemo.collections.llm.modelopt.quantization.export import hf_describe

    own = GenerationConfig(bos_token_id=1, eos_token_id=[2, 7])
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 9, "bos_token_id": 0, "pad_token_id": 3}))
    hf_describe.write_generation_config(SimpleNamespace(config=SimpleNamespace(generation_config=own)), tmp_path)
    config, generation = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("config", "generation_config"))
    assert config == {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 3}
    assert generation["eos_token_id"] == [2, 7]


@pytest.mark.parametrize("written", [["config.json"], ["config.json", "rank0.safetensors"]])
def test_incomplete_trtllm_checkpoint_is_reported(tmp_path, written):
    from nemo.collections.llm.modelopt.quantization.quantizer import Quantizer

    for name in written:
        (tmp_path / name).touch()
    assert Quantizer._validate_quantized_checkpoint(tmp_path, 1) is (len(written) == 2)
    assert Quantizer._validate_quantized_checkpoint(tmp_path, 2) is False


# --- the staging ------------------------------------------------------------------------------------------------------


def test_staging_appears_only_when_it_ends_well(tmp_path):
    from nemo.collections.llm.modelopt import _staging

    target = tmp_path / "deep" / "out"
    with pytest.raises(OSError, match="disk full"), _staging.staged(target, "test") as folder:
        folder.mkdir()
        (folder / "half").touch()
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []
    with _staging.staged(target, "test") as folder:
        folder.mkdir()
        (folder / "file").write_text("first")
        assert not target.exists()
    (target / "mine").write_text("stays")
    with _staging.staged(target, "test") as folder:
        folder.mkdir()
        (folder / "file").write_text("second")
        (folder / "sub").mkdir()
    assert sorted(p.name for p in target.iterdir()) == [".nemo-modelopt.json", "file", "mine", "sub"]
    assert (target / "file").read_text() == "second"
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_a_failing_rank_takes_the_export_of_all_away(ranks, tmp_path):
    answers = ranks(2).run(stage_on_two_ranks, str(tmp_path / "out"))
    assert "ExportError" in answers[0] and "failed on another rank" in answers[0]
    assert answers[1] == "OSError: disk full"
    assert list(tmp_path.iterdir()) == []

"""Quantization of ``llm.HFAutoModelForCausalLM`` of nemo-toolkit 2.5: a tiny Llama of transformers, on the CPU.

If the installed nemo-toolkit has no such class, a class with the attributes that stock reads replaces it, so that
everything except ``llm.ptq`` runs on every version.
"""

from __future__ import annotations

import json
from importlib import metadata
from unittest.mock import MagicMock, patch

import pytest
import torch

# Warnings of modelopt: its smoothing visits the output layer, which has no quantizer, and its writer copies scales.
pytestmark = [
    pytest.mark.filterwarnings("ignore:lm_head is not calibrated"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor"),
]
HAS_CLASS = metadata.version("nemo-toolkit").startswith("2.5.")


@pytest.fixture(scope="module")
def source(tmp_path_factory, cpu_backend):
    """Make the folder of a tiny Llama with its tokenizer, and calibration texts."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from test_code.support import tiny

    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "llama")
    PreTrainedTokenizerFast.from_pretrained(tiny.tokenizer_folder()).save_pretrained(folder / "llama")
    rows = [json.dumps({"text": text}) for text in tiny.texts(40)]
    (folder / "text.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def wrapper(monkeypatch, source):
    """Return a function that returns a wrapped model, of NeMo's class if there is one."""
    from nemo.collections import llm

    if not HAS_CLASS:
        monkeypatch.setattr(llm, "HFAutoModelForCausalLM", _StandIn, raising=False)
    # Version 2.5 waits two seconds when it logs that the class is deprecated.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return lambda: llm.HFAutoModelForCausalLM(model_name=str(source / "llama"))


class _StandIn(torch.nn.Module):
    def __init__(self, model_name):
        from nemo.collections.common.tokenizers import AutoTokenizer

        super().__init__()
        self.name, self.model, self.tokenizer = model_name, None, AutoTokenizer(model_name)
        self.device = torch.device("cpu")

    def configure_model(self):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(self.name, torch_dtype=torch.bfloat16)


def quantizer(source, target, algorithm, fmt="hf", **export):
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    config = q.QuantizationConfig(
        algorithm=algorithm, calibration_dataset=str(source / "text.jsonl"), calibration_dataset_size=16,
        calibration_batch_size=4, calibration_seq_len=32, awq_block_size=16, enable_kv_cache=False,
    )  # fmt: skip
    return q.Quantizer(config, q.ExportConfig(path=target, export_format=fmt, **export))


def configured(wrapper):
    model = wrapper()
    model.configure_model()
    return model


def dequantized(target, shapes):
    """Return dequantized weights, with one scale for each tensor or output row, and the scales `[out, 1]`."""
    from safetensors.torch import load_file

    tensors = load_file(target / "model.safetensors")
    scales = {n: tensors[f"{n}_scale"].float().reshape(-1, 1) for n in shapes if f"{n}_scale" in tensors}
    found = {name: tensors[name].float() * scales.get(name, 1.0) for name in shapes}
    assert {name: value.shape for name, value in found.items()} == shapes
    return found, scales


@pytest.mark.parametrize(("algorithm", "recorded"), [("fp8", "FP8"), ("int8", "W8A8_SQ_PER_CHANNEL")])
def test_export_to_hf_reloads_in_transformers(source, tmp_path, wrapper, algorithm, recorded):
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    target = tmp_path / algorithm
    quantize = quantizer(source, target, algorithm, generate_sample=algorithm == "fp8")
    model = quantize.quantize(configured(wrapper))
    # 2 layers of 7 linear layers, each with quantizers of weights and inputs; the output layer has none.
    assert quantize.report["quantizers"] == {"weight": 14, "input": 14} | {
        kind: number for kind, number in quantize.report["quantizers"].items() if kind not in ("weight", "input")
    }
    quantize.export(model, str(source / "llama"))

    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == recorded
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(target)("the model").input_ids
    del config["quantization_config"]
    plain = LlamaForCausalLM(LlamaConfig(**config)).float()
    weights, scales = dequantized(target, {name: value.shape for name, value in plain.state_dict().items()})
    plain.load_state_dict(weights)
    original = AutoModelForCausalLM.from_pretrained(source / "llama", torch_dtype=torch.float32)
    assert len(scales) == 14
    for name, scale in scales.items():
        exact = original.state_dict()[name]
        # The bound is half a step: for int8 half the scale; for fp8 2^-4 of the value, or half of the smallest
        # step, 2^-9, if that is more. bf16 arithmetic adds up to 2^-8 of the value.
        bound = scale / 2 if algorithm == "int8" else torch.maximum(exact.abs() / 16, scale * 2**-10)
        assert ((weights[name] - exact).abs() <= bound + exact.abs() / 256).all(), name
    tokens = torch.arange(64).reshape(2, 32)
    with torch.no_grad():
        want, have = original(tokens).logits, plain(tokens).logits
    # Each weight has 3 bits of mantissa (fp8) or 1/127 of its row's largest (int8), a few percent of the output.
    assert 0 < (have - want).norm() / want.norm() < 0.1


@pytest.mark.parametrize("algorithm", ["int4_awq", "int8_sq"])
def test_scales_on_the_inputs_are_written(source, tmp_path, wrapper, algorithm):
    """modelopt's writer for transformers models stores them."""
    from safetensors.torch import load_file

    quantize = quantizer(source, tmp_path / "out", algorithm)
    quantize.export(quantize.quantize(configured(wrapper)), str(source / "llama"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj"
    assert tensors[f"{name}.weight"].dtype == (torch.uint8 if algorithm == "int4_awq" else torch.int8)
    assert tensors[f"{name}.pre_quant_scale"].shape == (64,)


def test_a_model_that_is_not_quantized_is_written_unchanged(source, tmp_path, wrapper):
    from transformers import AutoModelForCausalLM

    quantize = quantizer(source, tmp_path / "plain", None)
    quantize.export(quantize.quantize(configured(wrapper)), str(source / "llama"))
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", torch_dtype="auto").state_dict()
    original = AutoModelForCausalLM.from_pretrained(source / "llama", torch_dtype="auto").state_dict()
    assert all(torch.equal(again[name], value) for name, value in original.items())


def test_names_of_decoder_core_and_tokenizer_folder(source, tmp_path, wrapper):
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    model = configured(wrapper)
    assert q.unwrap_for_modelopt_operations(model) is model.model
    assert q.get_modelopt_decoder_type(model) == "llama"
    assert quantizer(source, tmp_path, "fp8")._get_decoder_type(model) == "llama"
    quantizer(source, tmp_path, "fp8", "trtllm")._save_tokenizer(model, "", tmp_path, "trtllm")
    assert (tmp_path / "huggingface_tokenizer" / "tokenizer.json").exists()
    assert q.export_hf_checkpoint(str(source / "llama"), tmp_path, model=model) is None


@pytest.mark.parametrize(
    ("algorithm", "fmt", "message"),
    [
        ("fp8", "nemo", r"^NeMo export format can only be used with native NeMo checkpoints, not .*llm\.import_ckpt"),
        ("int4", "hf", r'cannot write INT4 weights without AWQ.*algorithm="int4_awq"'),
    ],
)
def test_what_cannot_be_written_raises_an_error_before_calibrating(source, tmp_path, wrapper, algorithm, fmt, message):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    def never(model):
        raise AssertionError("calibration began")

    model = configured(wrapper)
    with pytest.raises(ModelOptConfigError, match=message):
        quantizer(source, tmp_path / "out", algorithm, fmt).quantize(model, never)
    assert not (tmp_path / "out").exists()


def test_export_to_nemo_raises_an_error_without_quantize_too(source, tmp_path, wrapper):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    with pytest.raises(ModelOptConfigError, match="native NeMo checkpoints"):
        quantizer(source, tmp_path / "out", "fp8", "nemo").export(configured(wrapper), "", object())


def test_an_empty_wrapper_raises_an_error(source, tmp_path, wrapper):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    with pytest.raises(ModelOptConfigError, match=r"call its configure_model\(\) first"):
        quantizer(source, tmp_path, "fp8", decoder_type="llama").quantize(wrapper())


def test_a_bare_transformers_model_raises_an_error_with_what_to_do(source, tmp_path):
    from transformers import AutoModelForCausalLM

    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    model = AutoModelForCausalLM.from_pretrained(source / "llama")
    way = "wrap it in llm" if HAS_CLASS else r"only nemo-toolkit 2\.5 has llm"
    message = rf"not a LlamaForCausalLM of transformers: {way}\.HFAutoModelForCausalLM.*llm\.import_ckpt"
    with pytest.raises(ModelOptConfigError, match=message):
        quantizer(source, tmp_path, "fp8").quantize(model)


def test_nemo_ptq_of_a_hugging_face_folder(source, tmp_path, wrapper):
    """``llm.ptq`` of 2.5 supports a folder of transformers files, later versions support NeMo checkpoints only."""
    from nemo.collections import llm
    from nemo.collections.llm.modelopt import ExportConfig

    given = {
        "model_path": str(source / "llama"),
        "export_config": ExportConfig(path=tmp_path / "ptq", export_format="hf"),
        "quantization_config": quantizer(source, tmp_path, "fp8").quantization_config,
    }
    if HAS_CLASS:
        assert llm.ptq(**given) == tmp_path / "ptq"
        assert (tmp_path / "ptq" / "hf_quant_config.json").exists()
    else:
        with pytest.raises(FileNotFoundError, match="llama/"):
            llm.ptq(**given)
        assert not (tmp_path / "ptq").exists()


def test_mixed_precision_raises_an_error(source, tmp_path, wrapper):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import _transformers_models

    with pytest.raises(ModelOptConfigError, match='algorithm="auto" searches Megatron models, not a HFAuto'):
        _transformers_models.check(configured(wrapper), None, {"quant_cfg": {}, "algorithm": "auto"})


# --- mocks of the wrapper, as unit tests of stock in 2.5 pass them ----------------------------------------------------

MODULE = "nemo.collections.llm.modelopt.quantization.quantizer"


@pytest.fixture
def mocked(wrapper):
    """Return a mock that passes ``isinstance`` for the wrapper."""
    from nemo.collections import llm

    model = MagicMock(spec=llm.HFAutoModelForCausalLM)
    model.model, model.tokenizer = MagicMock(), MagicMock()
    return model


@pytest.mark.parametrize("converted", [True, False])
def test_a_mock_is_written_by_modelopt_alone(mocked, converted):
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    with (
        patch(f"{MODULE}.mto") as mto,
        patch(f"{MODULE}.mte") as mte,
        patch(f"{MODULE}.load_connector_from_trainer_ckpt") as load,
    ):
        mto.ModeloptStateManager.is_converted.return_value = converted
        found = q.export_hf_checkpoint("/fake/model", "/fake/out", model=mocked, dtype="x")
    mto.ModeloptStateManager.is_converted.assert_called_once_with(mocked.model)
    load.assert_not_called()
    if converted:
        mte.export_hf_checkpoint.assert_called_once_with(mocked.model, export_dir="/fake/out", dtype="x")
        assert str(found) == "/fake/out"
    else:
        mte.export_hf_checkpoint.assert_not_called()
        assert found is None


def test_a_mock_is_quantized_and_exported(source, mocked):
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    built = quantizer(source, "/fake/out", "fp8", "trtllm", decoder_type="llama")
    with (
        patch(f"{MODULE}.mtq") as mtq,
        patch(f"{MODULE}.mte") as mte,
        patch("accelerate.hooks.remove_hook_from_module"),
        patch.object(built, "_validate_quantized_checkpoint", return_value=True),
    ):
        assert built.quantize(mocked, "loop") is mocked
        assert mtq.quantize.call_args.args[0] is mocked.model and mtq.quantize.call_args.args[2] == "loop"
        mtq.print_quant_summary.assert_called_once_with(mtq.quantize.return_value)
        built.export(mocked, "/fake/model")
    assert mte.export_tensorrt_llm_checkpoint.call_args.kwargs["use_nfs_workspace"] is False
    mocked.tokenizer.save_pretrained.assert_called_once_with("/fake/out/huggingface_tokenizer")
    assert q.unwrap_for_modelopt_operations(mocked) is mocked.model


def test_the_loop_of_a_mock_feeds_its_model(source, mocked):
    built = quantizer(source, "/fake/out", "fp8", "trtllm", decoder_type="llama")
    batch, core = MagicMock(), MagicMock()
    with patch(f"{MODULE}.create_data_iterator_getter", return_value=lambda: iter([batch])):
        built._get_forward_loop(mocked)(core)
    core.assert_called_once_with(batch.to.return_value)
    batch.to.assert_called_once_with(mocked.model.device)

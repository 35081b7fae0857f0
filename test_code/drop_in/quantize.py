"""``Quantizer``: constructor, decoder type, quant_cfg and ``quantize``, on stand-ins."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, patch

import pytest
import torch

from nemo.collections import llm
from nemo.collections.llm.modelopt.quantization import quantizer
from nemo.collections.llm.modelopt.quantization.quantizer import ExportConfig, QuantizationConfig, Quantizer

MODULE = "nemo.collections.llm.modelopt.quantization.quantizer"
DECODERS = {
    "Baichuan2Model": "baichuan",
    "ChatGLMModel": "chatglm",
    "Gemma2Model": "gemma2",
    "Gemma3Model": "gemma3",
    "GemmaModel": "gemma",
    "LlamaModel": "llama",
    "MistralModel": "llama",
    "MixtralModel": "llama",
    "NemotronModel": "gpt",
    "Qwen2Model": "qwen",
    "StarcoderModel": "gpt",
    "Starcoder2Model": "gpt",
    "Phi3Model": "phi3",
}


@pytest.fixture
def gpu():
    with patch("torch.cuda.is_available", return_value=True):
        yield


def made(algorithm="fp8", decoder_type=None, path="/fake/path", generate_sample=False, **settings):
    """Return a Quantizer as on a machine with a GPU, its paths and names made up."""
    with patch("torch.cuda.is_available", return_value=True):
        return Quantizer(
            QuantizationConfig(algorithm=algorithm, **settings),
            ExportConfig(path=path, decoder_type=decoder_type, generate_sample=generate_sample),
        )


def stand_in(spec=llm.GPTModel):
    """Return a model that passes ``isinstance`` and holds no weights."""
    model = MagicMock(spec=spec)
    model.config = MagicMock()
    model.tokenizer = MagicMock(vocab_size=321)
    return model


class Small(torch.nn.Module):
    """A small network with what the Quantizer reads of a NeMo model."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.config = SimpleNamespace(vocab_size=None, pipeline_model_parallel_size=1)
        self.tokenizer = SimpleNamespace(vocab_size=50)
        self.frozen = False

    def freeze(self):
        self.frozen = True

    def forward(self, x):
        return self.linear(x)


@pytest.mark.drop_in
class TestConstructor:
    @pytest.fixture(autouse=True)
    def gpu(self):
        with patch("torch.cuda.is_available", return_value=True):
            yield

    def test_without_a_gpu(self):
        with (
            patch("torch.cuda.is_available", return_value=False),
            patch("nemo_modelopt_dropin.cpu_backend.is_enabled", return_value=False),
            pytest.raises(EnvironmentError, match="GPU is required for the quantization"),
        ):
            Quantizer(QuantizationConfig(), ExportConfig(path="/fake/path"))

    def test_configurations_are_kept(self):
        quantization, export = QuantizationConfig(calibration_dataset="dummy"), ExportConfig(path="/fake/path")
        built = Quantizer(quantization, export)
        assert built.quantization_config is quantization
        assert built.export_config is export

    @pytest.mark.parametrize(
        ("dtype", "expected"), [("bf16", torch.bfloat16), (16, torch.float16), ("16", torch.float16)]
    )
    def test_dtype(self, dtype, expected):
        assert Quantizer(QuantizationConfig(), ExportConfig(path="/fake/path", dtype=dtype)).torch_dtype is expected

    def test_dtype_is_asked_of_nemo_once(self):
        with patch(f"{MODULE}.torch_dtype_from_precision") as convert:
            built = Quantizer(QuantizationConfig(), ExportConfig(path="/fake/path"))
        convert.assert_called_once_with("bf16")
        assert built.torch_dtype is convert.return_value

    @pytest.mark.parametrize("dtype", [32, "fp8", "int8"])
    def test_unsupported_dtype(self, dtype):
        with pytest.raises(AssertionError, match=f"^Unsupported export dtype: {dtype}"):
            Quantizer(QuantizationConfig(), ExportConfig(path="/fake/path", dtype=dtype))

    @pytest.mark.parametrize("qformat", ["int3", "bf16"])
    def test_unsupported_kv_cache_format(self, qformat):
        config = QuantizationConfig(enable_kv_cache=True, kv_cache_qformat=qformat)
        with pytest.raises(AssertionError, match=f"^Unsupported kv cache quantization format: {qformat}"):
            Quantizer(config, ExportConfig(path="/fake/path"))

    @pytest.mark.parametrize("qformat", ["fp8", "nvfp4"])
    def test_supported_kv_cache_formats(self, qformat):
        config = QuantizationConfig(enable_kv_cache=True, kv_cache_qformat=qformat)
        assert Quantizer(config, ExportConfig(path="/fake/path")).quantization_config is config

    def test_kv_cache_format_is_not_looked_at_when_it_is_off(self):
        config = QuantizationConfig(enable_kv_cache=False, kv_cache_qformat="whatever")
        assert Quantizer(config, ExportConfig(path="/fake/path")).quantization_config is config

    @pytest.mark.parametrize("enable", [None, False])
    def test_the_three_fields_it_reads_are_enough(self, enable):
        built = Quantizer(SimpleNamespace(enable_kv_cache=enable), SimpleNamespace(dtype="bf16"))
        assert built.torch_dtype is torch.bfloat16

    def test_namespaces_with_a_kv_cache_format(self):
        config = SimpleNamespace(enable_kv_cache=True, kv_cache_qformat="nvfp4")
        assert Quantizer(config, SimpleNamespace(dtype=16)).torch_dtype is torch.float16

    def test_namespaces_are_checked_too(self):
        with pytest.raises(AssertionError, match="Unsupported kv cache quantization format: int3"):
            Quantizer(SimpleNamespace(enable_kv_cache=True, kv_cache_qformat="int3"), SimpleNamespace(dtype="bf16"))
        with pytest.raises(AssertionError, match="Unsupported export dtype: fp64"):
            Quantizer(SimpleNamespace(enable_kv_cache=None), SimpleNamespace(dtype="fp64"))

    @pytest.mark.parametrize("mock_class", [Mock, MagicMock])
    def test_mocks_of_configurations(self, mock_class):
        quantization = mock_class(spec=QuantizationConfig, enable_kv_cache=None, algorithm="fp8")
        export = mock_class(spec=ExportConfig, dtype="bf16")
        assert Quantizer(quantization, export).export_config is export

    @pytest.mark.parametrize("mock_class", [Mock, MagicMock])
    def test_mocks_without_a_spec(self, mock_class):
        built = Quantizer(mock_class(enable_kv_cache=False), mock_class(dtype="16"))
        assert built.torch_dtype is torch.float16

    @pytest.mark.parametrize("path", ["/fake/path", "/no/such/place", "relative/out"])
    def test_made_up_paths(self, path):
        assert str(Quantizer(QuantizationConfig(), ExportConfig(path=path)).export_config.path) == path

    @pytest.mark.parametrize("name", ["dummy", "/no/such/file.json", "wikitext", "cnn_dailymail"])
    def test_made_up_data(self, name):
        built = Quantizer(QuantizationConfig(calibration_dataset=name), ExportConfig(path="/fake/path"))
        assert built.quantization_config.calibration_dataset == name

    def test_the_disk_is_not_touched(self):
        with patch("tempfile.mkdtemp") as mkdtemp, patch("os.makedirs") as makedirs, patch("os.mkdir") as mkdir:
            Quantizer(QuantizationConfig(calibration_dataset="dummy"), ExportConfig(path="/fake/path"))
        mkdtemp.assert_not_called()
        makedirs.assert_not_called()
        mkdir.assert_not_called()

    @pytest.mark.parametrize("algorithm", [None, "fp8", "int8", "int8_sq", "int4_awq", "w4a8_awq", "int4", "nvfp4"])
    def test_every_algorithm(self, algorithm):
        assert made(algorithm).quantization_config.algorithm == algorithm

    @pytest.mark.parametrize("export_format", ["trtllm", "nemo", "hf"])
    def test_every_export_format(self, export_format):
        built = Quantizer(QuantizationConfig(), ExportConfig(path="/fake/path", export_format=export_format))
        assert built.export_config.export_format == export_format


@pytest.mark.drop_in
class TestConstants:
    def test_formats(self):
        assert quantizer.SUPPORTED_EXPORT_FMT == ["trtllm", "nemo", "hf"]
        assert quantizer.SUPPORTED_DTYPE == [16, "16", "bf16"]
        assert quantizer.KV_QUANT_CFG_CHOICES == {"fp8": "FP8_KV_CFG", "nvfp4": "NVFP4_KV_CFG"}

    def test_the_path_of_an_export_is_a_path(self):
        from pathlib import Path

        assert ExportConfig(path="/fake/path").path == Path("/fake/path")

    def test_choices_are_asked_of_modelopt(self):
        from nemo.collections.llm.modelopt.quantization import quant_cfg_choices

        presets = SimpleNamespace(FP8_DEFAULT_CFG={"quant_cfg": {}}, INT8_DEFAULT_CFG={"quant_cfg": {"*": {}}})
        with patch.object(quant_cfg_choices, "mtq", presets):
            found = quant_cfg_choices.get_quant_cfg_choices()
        assert found == {"fp8": {"quant_cfg": {}}, "int8": {"quant_cfg": {"*": {}}}}


@pytest.mark.drop_in
class TestSetup:
    def test_freezes_and_sets_the_vocabulary(self):
        model = MagicMock()
        model.tokenizer.vocab_size = 1234
        assert Quantizer._setup(model) is None
        assert model.config.vocab_size == 1234
        model.freeze.assert_called_once_with()

    def test_on_a_namespace(self):
        model = SimpleNamespace(config=SimpleNamespace(), tokenizer=SimpleNamespace(vocab_size=7), freeze=Mock())
        Quantizer._setup(model)
        assert model.config.vocab_size == 7


@pytest.mark.drop_in
class TestDecoderType:
    @pytest.mark.parametrize(("name", "decoder"), DECODERS.items())
    def test_by_class(self, name, decoder):
        assert quantizer.get_modelopt_decoder_type(MagicMock(spec=getattr(llm, name))) == decoder

    @pytest.mark.parametrize("spec", [llm.GPTModel, None])
    def test_unknown_class(self, spec):
        assert quantizer.get_modelopt_decoder_type(MagicMock(spec=spec)) is None

    def test_the_list_can_be_replaced(self):
        class Own:
            pass

        with patch.object(quantizer, "gpt_model_type", [(Own, "own")]):
            assert quantizer.get_modelopt_decoder_type(Own()) == "own"
            assert quantizer.get_modelopt_decoder_type(MagicMock(spec=llm.LlamaModel)) is None

    def test_the_first_class_that_fits_counts(self):
        with patch.object(quantizer, "gpt_model_type", [(llm.GPTModel, "first"), (llm.LlamaModel, "second")]):
            assert quantizer.get_modelopt_decoder_type(MagicMock(spec=llm.LlamaModel)) == "first"

    def test_the_setting_wins(self):
        assert made(decoder_type="mpt")._get_decoder_type(stand_in(llm.LlamaModel)) == "mpt"

    @pytest.mark.parametrize("depth", [0, 1, 2, 3])
    def test_inside_of_wrappers(self, depth):
        model = stand_in(llm.GemmaModel)
        for _ in range(depth):
            model = SimpleNamespace(module=model)
        assert made()._get_decoder_type(model) == "gemma"

    def test_llama4_is_known_by_its_name(self):
        class Llama4OmniModel:
            pass

        assert made()._get_decoder_type(Llama4OmniModel()) == "llama"
        assert made()._get_decoder_type(SimpleNamespace(module=Llama4OmniModel())) == "llama"

    def test_not_told_and_not_optional(self):
        with pytest.raises(ValueError, match="^Could not infer the decoder type for the provided model"):
            made()._get_decoder_type(stand_in())

    def test_the_error_says_what_to_do(self):
        with pytest.raises(ValueError, match="Please provide the decoder type explicitly in the ExportConfig"):
            made()._get_decoder_type(stand_in(), optional=False)

    def test_not_told_but_optional(self):
        assert made()._get_decoder_type(stand_in(), optional=True) is None

    def test_the_function_can_be_replaced(self):
        model = stand_in()
        with patch(f"{MODULE}.get_modelopt_decoder_type", return_value="custom") as infer:
            assert made()._get_decoder_type(SimpleNamespace(module=model)) == "custom"
        infer.assert_called_once_with(model)

    def test_unbound(self):
        owner = SimpleNamespace(export_config=SimpleNamespace(decoder_type="phi3"))
        assert Quantizer._get_decoder_type(owner, object()) == "phi3"
        owner.export_config.decoder_type = None
        assert Quantizer._get_decoder_type(owner, stand_in(llm.Phi3Model)) == "phi3"


class QuantCfgCase:
    """Keeps the presets as they were: stock changes them."""

    @pytest.fixture(autouse=True)
    def presets(self):
        kept = copy.deepcopy(quantizer.QUANT_CFG_CHOICES)
        yield
        for name, preset in kept.items():
            quantizer.QUANT_CFG_CHOICES[name].clear()
            quantizer.QUANT_CFG_CHOICES[name].update(preset)


def settings_of(quant_cfg):
    """Return pattern to attributes, also of the list of entries that modelopt 0.44 and later take."""
    found = quant_cfg["quant_cfg"]
    if isinstance(found, dict):
        return found
    settings = {}
    for entry in found:
        if entry.get("parent_class") is None:
            pattern = "default" if entry == {"quantizer_name": "*", "enable": False} else entry["quantizer_name"]
            settings[pattern] = entry.get("cfg") or {"enable": entry["enable"]}
    return settings


def has_kv(quant_cfg):
    return any("bmm_quantizer" in pattern for pattern in settings_of(quant_cfg))


@pytest.mark.drop_in
class TestQuantCfg(QuantCfgCase):
    @pytest.mark.parametrize("algorithm", ["fp8", "int8", "int4", "nvfp4"])
    def test_the_preset_is_inside(self, algorithm):
        preset = copy.deepcopy(quantizer.QUANT_CFG_CHOICES[algorithm])
        found = made(algorithm, "llama", enable_kv_cache=False)._get_quant_cfg(stand_in())
        assert settings_of(preset).items() <= settings_of(found).items()
        assert found["algorithm"] == preset["algorithm"]

    @pytest.mark.parametrize("algorithm", ["fp8", "int8_sq", "int4_awq"])
    def test_the_projection_of_images_is_left_alone(self, algorithm):
        found = made(algorithm, "llama")._get_quant_cfg(stand_in())
        assert settings_of(found)["vision_projection.*"] == {"enable": False}

    def test_a_preset_of_ones_own(self):
        with patch.dict(
            quantizer.QUANT_CFG_CHOICES, {"mine": {"quant_cfg": {"*": {"num_bits": 8}}, "algorithm": "max"}}
        ):
            found = made("mine", "llama", enable_kv_cache=False)._get_quant_cfg(stand_in())
        assert settings_of(found)["*"] == {"num_bits": 8}
        assert found["algorithm"] == "max"

    @pytest.mark.parametrize(
        ("algorithm", "decoder", "expected"),
        [
            ("fp8", "llama", True),
            ("fp8", None, True),
            ("fp8", "gpt", False),
            ("int4_awq", "llama", True),
            ("int4_awq", "gpt", False),
            ("int8", "llama", False),
            ("int8_sq", "llama", False),
            ("int8_sq", "gpt", False),
        ],
    )
    def test_kv_cache_by_default(self, algorithm, decoder, expected):
        assert has_kv(made(algorithm, decoder)._get_quant_cfg(stand_in())) is expected

    @pytest.mark.parametrize("algorithm", ["fp8", "int8", "int8_sq"])
    @pytest.mark.parametrize("decoder", ["llama", "gpt"])
    @pytest.mark.parametrize("enable", [True, False])
    def test_kv_cache_as_asked(self, algorithm, decoder, enable):
        assert has_kv(made(algorithm, decoder, enable_kv_cache=enable)._get_quant_cfg(stand_in())) is enable

    @pytest.mark.parametrize(("qformat", "preset"), [("fp8", "FP8_KV_CFG"), ("nvfp4", "NVFP4_KV_CFG")])
    def test_kv_cache_preset(self, qformat, preset):
        found = made("fp8", "llama", enable_kv_cache=True, kv_cache_qformat=qformat)._get_quant_cfg(stand_in())
        kv_cache = settings_of(getattr(quantizer.mtq, preset))
        kv_cache.pop("default", None)
        assert kv_cache.items() <= settings_of(found).items()

    def test_kv_cache_preset_of_a_replaced_modelopt(self):
        with patch(f"{MODULE}.mtq") as mtq:
            mtq.FP8_KV_CFG = {"quant_cfg": {"*own_bmm_quantizer": {"num_bits": (4, 3)}}}
            found = made("fp8", "llama", enable_kv_cache=True)._get_quant_cfg(stand_in())
        assert settings_of(found)["*own_bmm_quantizer"] == {"num_bits": (4, 3)}

    def test_kv_cache_alone(self):
        with patch.dict(quantizer.QUANT_CFG_CHOICES, {"kv": {}}):
            found = made("kv", "llama", enable_kv_cache=True)._get_quant_cfg(stand_in())
        assert found["algorithm"] == "max"
        assert settings_of(found)["default"] == {"enable": False}
        assert has_kv(found)

    @pytest.mark.parametrize("size", [64, 128, 256])
    @pytest.mark.parametrize("algorithm", ["int4_awq", "w4a8_awq"])
    def test_awq_block_size(self, algorithm, size):
        found = made(algorithm, "llama", awq_block_size=size)._get_quant_cfg(stand_in())
        weight = settings_of(found)["*weight_quantizer"]
        weight = weight[0] if isinstance(weight, list) else weight
        assert weight["block_sizes"][-1] == size

    def test_awq_block_size_of_the_preset(self):
        preset = settings_of(quantizer.QUANT_CFG_CHOICES["int4_awq"])["*weight_quantizer"]["block_sizes"][-1]
        found = made("int4_awq", "llama", awq_block_size=0)._get_quant_cfg(stand_in())
        assert settings_of(found)["*weight_quantizer"]["block_sizes"][-1] == preset

    def test_awq_leaves_the_preset_as_it_was(self):
        before = copy.deepcopy(quantizer.QUANT_CFG_CHOICES["int4_awq"])
        made("int4_awq", "llama", awq_block_size=32)._get_quant_cfg(stand_in())
        assert quantizer.QUANT_CFG_CHOICES["int4_awq"] == before

    @pytest.mark.parametrize(("decoder", "coarse"), [("gemma", True), ("mpt", True), ("llama", False), ("gpt", False)])
    def test_w4a8_searches_coarsely_on_some_decoders(self, decoder, coarse):
        preset = copy.deepcopy(quantizer.QUANT_CFG_CHOICES["w4a8_awq"]["algorithm"])
        found = made("w4a8_awq", decoder)._get_quant_cfg(stand_in())
        assert found["algorithm"] == ({"method": "awq_lite", "alpha_step": 1} if coarse else preset)

    def test_int4_awq_searches_finely_on_gemma(self):
        preset = copy.deepcopy(quantizer.QUANT_CFG_CHOICES["int4_awq"]["algorithm"])
        assert made("int4_awq", "gemma")._get_quant_cfg(stand_in())["algorithm"] == preset

    def test_smoothquant_on_gemma(self):
        found = made("int8_sq", "gemma")._get_quant_cfg(stand_in())
        assert found["algorithm"] == {"method": "smoothquant", "alpha": 0.5}

    def test_decoder_type_is_asked_once_and_may_be_missing(self):
        built, model = made(), stand_in()
        with patch.object(built, "_get_decoder_type", return_value="gpt") as decoder_type:
            built._get_quant_cfg(model)
        decoder_type.assert_called_once_with(model, optional=True)

    def test_unsupported_algorithm(self):
        built = made("fp8")
        built.quantization_config.algorithm = "fp7"
        with pytest.raises(AssertionError, match="^Unsupported quantization format: fp7"):
            built._get_quant_cfg(stand_in())


@pytest.mark.drop_in
class TestQuantCfgOfFilesAndNamespaces(QuantCfgCase):
    @pytest.mark.parametrize("content", [{"quant_cfg": {"*": {"num_bits": 8}}, "algorithm": "max"}, {"quant_cfg": {}}])
    def test_a_file_is_returned_as_it_is_read(self, content):
        built = made()
        built.quantization_config.algorithm = "/fake/config.json"
        with (
            patch(f"{MODULE}.os.path.isfile", return_value=True),
            patch(f"{MODULE}.load_quant_cfg", return_value=copy.deepcopy(content)) as load,
        ):
            found = built._get_quant_cfg(stand_in())
        assert {**found, "quant_cfg": settings_of(found)} == content
        load.assert_called_once_with("/fake/config.json")

    def test_a_real_file(self, tmp_path):
        path = tmp_path / "own.json"
        path.write_text(
            '{"quant_cfg": {"*weight_quantizer": {"num_bits": [4, 3], "block_sizes": {"-1": 16}}}, "algorithm": "max"}'
        )
        found = made(str(path), "llama")._get_quant_cfg(stand_in())
        assert settings_of(found) == {"*weight_quantizer": {"num_bits": (4, 3), "block_sizes": {-1: 16}}}

    @pytest.mark.parametrize(
        ("settings", "kv"),
        [
            ({"algorithm": "fp8", "enable_kv_cache": False}, False),
            ({"algorithm": "fp8", "enable_kv_cache": True, "kv_cache_qformat": "fp8"}, True),
            ({"algorithm": "fp8", "enable_kv_cache": None, "kv_cache_qformat": "nvfp4"}, True),
            ({"algorithm": "int8", "enable_kv_cache": None}, False),
            ({"algorithm": "int4_awq", "awq_block_size": 64, "enable_kv_cache": False}, False),
        ],
    )
    def test_only_the_fields_that_are_read(self, settings, kv):
        owner = SimpleNamespace(
            quantization_config=SimpleNamespace(**settings), _get_decoder_type=Mock(return_value="llama")
        )
        assert has_kv(Quantizer._get_quant_cfg(owner, object())) is kv

    @pytest.mark.parametrize("owner_class", [Mock, MagicMock])
    def test_unbound_with_a_mock(self, owner_class):
        owner = owner_class()
        owner.quantization_config = QuantizationConfig(algorithm="fp8", enable_kv_cache=False)
        owner._get_decoder_type.return_value = "llama"
        found = Quantizer._get_quant_cfg(owner, MagicMock())
        assert settings_of(found)["vision_projection.*"] == {"enable": False}
        assert not has_kv(found)

    @pytest.mark.parametrize(("enable", "word"), [(True, "Enabled"), (False, "Disabled")])
    def test_what_is_logged_about_the_kv_cache(self, enable, word):
        with patch(f"{MODULE}.logging") as logging:
            made("fp8", "llama", enable_kv_cache=enable)._get_quant_cfg(stand_in())
        logging.info.assert_called_once_with(f"{word} KV cache quantization")
        logging.warning.assert_not_called()

    def test_the_automatic_choice_is_a_warning(self):
        with patch(f"{MODULE}.logging") as logging:
            made("fp8", "llama")._get_quant_cfg(stand_in())
        logging.warning.assert_called_once_with(
            "Enabled KV cache quantization but enable_kv_cache is None in quantization_config"
        )


class QuantizeCase:
    """Everything of modelopt replaced."""

    @pytest.fixture(autouse=True)
    def places(self):
        with (
            patch(f"{MODULE}.mtq") as self.mtq,
            patch(f"{MODULE}.unwrap_for_modelopt_operations") as self.unwrap,
            patch(f"{MODULE}.is_global_rank_zero", return_value=True) as self.rank_zero,
        ):
            self.mtq.config.need_calibration.return_value = True
            yield


@pytest.mark.drop_in
class TestQuantize(QuantizeCase):
    @pytest.mark.parametrize("model", [object(), None, "model"])
    def test_without_an_algorithm_nothing_happens(self, model):
        assert made(None).quantize(model) is model
        self.mtq.quantize.assert_not_called()
        self.unwrap.assert_not_called()

    def test_without_an_algorithm_it_is_logged(self):
        with patch(f"{MODULE}.logging") as logging:
            made(None).quantize(object())
        logging.info.assert_called_once_with("Quantization algorithm set to None, returning the non-quantized model")

    @pytest.mark.parametrize("model_class", [llm.GPTModel, llm.LlamaModel, llm.MambaModel])
    def test_the_model_is_returned(self, model_class):
        model = stand_in(model_class)
        assert made(decoder_type="llama").quantize(model, Mock()) is model

    def test_modelopt_gets_the_unwrapped_model(self):
        model, loop, built = stand_in(), Mock(), made(decoder_type="llama")
        with patch.object(built, "_get_quant_cfg") as quant_cfg:
            built.quantize(model, loop)
        self.unwrap.assert_called_once_with(model)
        self.mtq.quantize.assert_called_once_with(self.unwrap.return_value, quant_cfg.return_value, loop)

    def test_the_steps_are_each_taken_once(self):
        model, built = stand_in(), made(decoder_type="llama")
        with (
            patch.object(built, "_setup") as setup,
            patch.object(built, "_get_decoder_type", return_value="llama") as decoder_type,
            patch.object(built, "_get_quant_cfg") as quant_cfg,
            patch.object(built, "_get_forward_loop") as forward_loop,
        ):
            built.quantize(model)
        setup.assert_called_once_with(model)
        decoder_type.assert_called_once_with(model, optional=True)
        quant_cfg.assert_called_once_with(model)
        forward_loop.assert_called_once_with(model)
        self.mtq.config.need_calibration.assert_called_once_with(quant_cfg.return_value)
        assert self.mtq.quantize.call_args.args[2] is forward_loop.return_value

    def test_the_model_is_set_up(self):
        model = stand_in()
        made(decoder_type="llama").quantize(model, Mock())
        assert model.config.vocab_size == 321
        model.freeze.assert_called_once_with()

    def test_no_loop_when_there_is_nothing_to_calibrate(self):
        self.mtq.config.need_calibration.return_value = False
        built = made(decoder_type="llama")
        with patch.object(built, "_get_forward_loop") as forward_loop:
            built.quantize(stand_in())
        forward_loop.assert_not_called()
        assert self.mtq.quantize.call_args.args[2] is None

    def test_a_loop_of_ones_own_is_not_asked_about(self):
        made(decoder_type="llama").quantize(stand_in(), Mock())
        self.mtq.config.need_calibration.assert_not_called()

    @pytest.mark.parametrize(
        ("algorithm", "lowest"), [("fp8", 4.48), ("int8_sq", 1.27), ("int8", 0.0), ("int4_awq", 0.0), ("nvfp4", 0.0)]
    )
    def test_gpt_decoders_keep_amax_from_vanishing(self, algorithm, lowest):
        made(algorithm, "gpt").quantize(stand_in(), Mock())
        self.mtq.postprocess_amax.assert_called_once()
        quantized, pattern, clamp = self.mtq.postprocess_amax.call_args.args
        assert quantized is self.mtq.quantize.return_value
        assert pattern == "*input_quantizer"
        assert clamp(torch.zeros(1)).item() == pytest.approx(lowest)
        assert clamp(torch.tensor([500.0])).item() == 500.0

    @pytest.mark.parametrize("decoder", ["llama", "gemma", "qwen", "phi3", "mpt"])
    def test_other_decoders_are_not_clamped(self, decoder):
        made("fp8", decoder).quantize(stand_in(), Mock())
        self.mtq.postprocess_amax.assert_not_called()

    def test_an_unknown_decoder_is_not_clamped(self):
        made("fp8").quantize(stand_in(llm.GPTModel), Mock())
        self.mtq.postprocess_amax.assert_not_called()

    def test_the_decoder_is_found_by_class(self):
        made("fp8").quantize(stand_in(llm.NemotronModel), Mock())
        self.mtq.postprocess_amax.assert_called_once()

    def test_the_summary_is_of_what_modelopt_returned(self):
        made("fp8", "llama").quantize(stand_in(), Mock())
        self.mtq.print_quant_summary.assert_called_once_with(self.mtq.quantize.return_value)

    def test_the_summary_of_a_gpt_decoder_is_of_the_clamped_model(self):
        made("fp8", "gpt").quantize(stand_in(), Mock())
        self.mtq.print_quant_summary.assert_called_once_with(self.mtq.postprocess_amax.return_value)

    def test_no_summary_on_other_ranks(self):
        self.rank_zero.return_value = False
        made("fp8", "llama").quantize(stand_in(), Mock())
        self.mtq.print_quant_summary.assert_not_called()

    @pytest.mark.parametrize("wanted", [True, False])
    def test_a_sample(self, wanted):
        built, model = made(decoder_type="llama", generate_sample=wanted), stand_in()
        with patch.object(built, "_generate_sample") as sample:
            built.quantize(model, Mock())
        assert sample.call_args_list == ([((model,),)] if wanted else [])

    @pytest.mark.parametrize("algorithm", ["fp8", "int8", "int4"])
    def test_the_algorithm_is_logged(self, algorithm):
        with patch(f"{MODULE}.logging") as logging:
            made(algorithm, "llama").quantize(stand_in(), Mock())
        messages = [call.args[0] for call in logging.info.call_args_list]
        assert f"Quantizing model to {algorithm}..." in messages
        assert any(message.startswith("Using quant_cfg:\n") for message in messages)

    def test_an_error_of_modelopt_is_not_swallowed(self):
        self.mtq.quantize.side_effect = RuntimeError("out of memory")
        with pytest.raises(RuntimeError, match="^out of memory$"):
            made(decoder_type="llama").quantize(stand_in(), Mock())
        self.mtq.print_quant_summary.assert_not_called()


@pytest.mark.drop_in
class TestQuantizeOtherStandIns(QuantizeCase):
    @pytest.mark.parametrize("model_class", [Mock, MagicMock])
    def test_a_plain_mock_with_a_decoder_type(self, model_class):
        model = model_class()
        assert made(decoder_type="llama").quantize(model, Mock()) is model
        self.mtq.quantize.assert_called_once()

    def test_a_wrapper_around_a_mock(self):
        model = SimpleNamespace(
            module=stand_in(llm.NemotronModel),
            config=SimpleNamespace(),
            tokenizer=SimpleNamespace(vocab_size=9),
            freeze=Mock(),
        )
        assert made().quantize(model, Mock()) is model
        self.mtq.postprocess_amax.assert_called_once()
        assert model.config.vocab_size == 9

    def test_a_small_network_with_a_decoder_type(self):
        model = Small()
        assert made("int8", "llama").quantize(model, Mock()) is model
        assert model.frozen and model.config.vocab_size == 50
        self.mtq.quantize.assert_called_once()

    def test_a_small_network_with_its_decoder_type_replaced(self):
        model, built = Small(), made("fp8")
        with patch.object(built, "_get_decoder_type", return_value=None):
            assert built.quantize(model, Mock()) is model
        self.mtq.quantize.assert_called_once()

    @pytest.mark.parametrize("decoder", ["llama", "gpt"])
    def test_unwrapped_to_a_small_network(self, decoder):
        self.unwrap.return_value = Small()
        loop = Mock()
        made("fp8", decoder).quantize(stand_in(), loop)
        assert self.mtq.quantize.call_args.args[0] is self.unwrap.return_value
        assert self.mtq.quantize.call_args.args[2] is loop

    def test_a_sequence_of_modules(self):
        self.unwrap.return_value = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
        model = stand_in()
        assert made("int8_sq", "llama").quantize(model, Mock()) is model

    @pytest.mark.parametrize("owner_class", [Mock, MagicMock])
    @pytest.mark.parametrize("with_loop", [True, False])
    def test_unbound_with_a_mock(self, owner_class, with_loop):
        owner, model, loop = owner_class(), MagicMock(), Mock()
        owner.quantization_config.algorithm = "fp8"
        owner.export_config.generate_sample = False
        owner._get_decoder_type.return_value = "gpt"
        assert Quantizer.quantize(owner, model, loop if with_loop else None) is model
        owner._setup.assert_called_once_with(model)
        expected = loop if with_loop else owner._get_forward_loop.return_value
        self.mtq.quantize.assert_called_once_with(self.unwrap.return_value, owner._get_quant_cfg.return_value, expected)
        self.mtq.print_quant_summary.assert_called_once_with(self.mtq.postprocess_amax.return_value)
        owner._generate_sample.assert_not_called()

    def test_unbound_with_a_namespace(self):
        owner = SimpleNamespace(
            quantization_config=SimpleNamespace(algorithm="int8"),
            export_config=SimpleNamespace(generate_sample=True),
            _setup=Mock(),
            _get_decoder_type=Mock(return_value="llama"),
            _get_quant_cfg=Mock(return_value={"quant_cfg": {}}),
            _get_forward_loop=Mock(),
            _generate_sample=Mock(),
        )
        model = object()
        assert Quantizer.quantize(owner, model) is model
        owner._generate_sample.assert_called_once_with(model)

    @pytest.mark.parametrize("algorithm", ["fp8", "int8"])
    def test_configurations_as_namespaces(self, algorithm):
        with patch("torch.cuda.is_available", return_value=True):
            built = Quantizer(
                SimpleNamespace(algorithm=algorithm, enable_kv_cache=False),
                SimpleNamespace(dtype="bf16", decoder_type="llama", generate_sample=False),
            )
        model = stand_in()
        assert built.quantize(model, Mock()) is model
        assert settings_of(self.mtq.quantize.call_args.args[1])["vision_projection.*"] == {"enable": False}


@pytest.mark.drop_in
class TestQuantizeForReal:
    """modelopt itself, on a small network."""

    @pytest.mark.parametrize("algorithm", ["fp8", "int8"])
    def test_quantizers_are_inserted(self, algorithm):
        model, seen = Small(), []

        def loop(network):
            seen.append(network)
            network(torch.ones(2, 4))

        with patch.object(quantizer.mtq, "print_quant_summary"):
            assert made(algorithm, "llama", enable_kv_cache=False).quantize(model, loop) is model
        assert seen == [model]
        assert hasattr(model.linear, "weight_quantizer") and model.linear.input_quantizer.amax is not None

    def test_amax_of_a_gpt_decoder_is_clamped(self):
        model = Small()
        with patch.object(quantizer.mtq, "print_quant_summary"):
            made("fp8", "gpt").quantize(model, lambda network: network(torch.full((2, 4), 1e-3)))
        assert model.linear.input_quantizer.amax.item() == pytest.approx(4.48)

    def test_the_summary_gets_the_network(self):
        model = Small()
        with patch.object(quantizer.mtq, "print_quant_summary") as summary:
            made("int8", "llama").quantize(model, lambda network: network(torch.ones(1, 4)))
        summary.assert_called_once_with(model)

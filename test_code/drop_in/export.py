"""``Quantizer.export``, its helpers and ``export_hf_checkpoint``, on stand-ins."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, patch

import pytest
import torch

from nemo.collections import llm
from nemo.collections.llm.modelopt.quantization import quantizer
from nemo.collections.llm.modelopt.quantization.quantizer import (
    ExportConfig,
    QuantizationConfig,
    Quantizer,
    export_hf_checkpoint,
)

MODULE = "nemo.collections.llm.modelopt.quantization.quantizer"


def made(export_format="trtllm", path="/fake/out", **settings):
    with patch("torch.cuda.is_available", return_value=True):
        return Quantizer(QuantizationConfig(), ExportConfig(path=path, export_format=export_format, **settings))


def stand_in(pipeline=1):
    model = MagicMock(spec=llm.GPTModel)
    model.config = SimpleNamespace(pipeline_model_parallel_size=pipeline)
    model.tokenizer = MagicMock()
    return model


class ExportCase:
    """All that writes is replaced."""

    @pytest.fixture(autouse=True)
    def places(self):
        with (
            patch(f"{MODULE}.mte") as self.mte,
            patch(f"{MODULE}.barrier") as self.barrier,
            patch(f"{MODULE}.is_global_rank_zero", return_value=True) as self.rank_zero,
            patch(f"{MODULE}.unwrap_for_modelopt_operations") as self.unwrap,
            patch(f"{MODULE}.TrainerContext") as self.context,
            patch(f"{MODULE}.export_hf_checkpoint") as self.export_hf,
            patch(f"{MODULE}.shutil.copytree") as self.copytree,
            patch(f"{MODULE}.ckpt_to_context_subdir", side_effect=lambda path: f"{path}/context") as self.context_dir,
            patch(f"{MODULE}.ckpt_to_weights_subdir") as self.weights_dir,
            patch("accelerate.hooks.remove_hook_from_module") as self.remove_hook,
        ):
            yield


@pytest.mark.drop_in
class TestExport(ExportCase):
    @pytest.mark.parametrize("name", ["onnx", "", None, "TRTLLM"])
    def test_unsupported_format(self, name):
        built = made()
        built.export_config.export_format = name
        with pytest.raises(AssertionError, match=f"^Unsupported export format: {name}"):
            built.export(stand_in(), "/fake/model")
        self.mte.export_tensorrt_llm_checkpoint.assert_not_called()

    # --- trtllm

    @pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 2)])
    @pytest.mark.parametrize("pipeline", [1, 2])
    def test_trtllm(self, tp, pp, pipeline):
        built = made(decoder_type="llama", inference_tp=tp, inference_pp=pp)
        with patch.object(built, "_validate_quantized_checkpoint", return_value=True) as validate:
            assert built.export(stand_in(pipeline), "/fake/model") is None
        self.mte.export_tensorrt_llm_checkpoint.assert_called_once_with(
            model=self.unwrap.return_value,
            decoder_type="llama",
            dtype=torch.bfloat16,
            export_dir=Path("/fake/out"),
            inference_tensor_parallel=tp,
            inference_pipeline_parallel=pp,
            use_nfs_workspace=pipeline > 1,
        )
        validate.assert_called_once_with(Path("/fake/out"), tp)
        self.barrier.assert_called_once_with()

    def test_trtllm_takes_hooks_off(self):
        built, model = made(decoder_type="llama"), stand_in()
        with patch.object(built, "_validate_quantized_checkpoint", return_value=True):
            built.export(model, "/fake/model")
        self.remove_hook.assert_called_once_with(model, recurse=True)

    def test_trtllm_runs_in_inference_mode(self):
        modes, built = [], made(decoder_type="llama")
        self.mte.export_tensorrt_llm_checkpoint.side_effect = lambda **_: modes.append(
            torch.is_inference_mode_enabled()
        )
        with patch.object(built, "_validate_quantized_checkpoint", return_value=True):
            built.export(stand_in(), "/fake/model")
        assert modes == [True]

    def test_trtllm_with_the_decoder_found_by_class(self):
        model = MagicMock(spec=llm.Qwen2Model)
        model.config = SimpleNamespace(pipeline_model_parallel_size=1)
        built = made()
        with patch.object(built, "_validate_quantized_checkpoint", return_value=True):
            built.export(model, "/fake/model")
        assert self.mte.export_tensorrt_llm_checkpoint.call_args.kwargs["decoder_type"] == "qwen"

    def test_trtllm_without_a_decoder_type(self):
        with pytest.raises(ValueError, match="^Could not infer the decoder type for the provided model"):
            made().export(stand_in(), "/fake/model")

    def test_trtllm_that_is_not_complete(self):
        built = made(decoder_type="llama")
        with (
            patch.object(built, "_validate_quantized_checkpoint", return_value=False),
            pytest.raises(AssertionError),  # noqa: PT011 - stock's has no text
        ):
            built.export(stand_in(), "/fake/model")
        self.copytree.assert_not_called()

    def test_other_ranks_neither_validate_nor_save_the_tokenizer(self):
        self.rank_zero.return_value = False
        built = made(decoder_type="llama")
        with (
            patch.object(built, "_validate_quantized_checkpoint") as validate,
            patch.object(built, "_save_tokenizer") as save,
            patch(f"{MODULE}.logging") as logging,
        ):
            built.export(stand_in(), "/fake/model")
        validate.assert_not_called()
        save.assert_not_called()
        logging.info.assert_not_called()

    @pytest.mark.parametrize("dtype", [16, "16"])
    def test_trtllm_in_half_precision(self, dtype):
        built = made(decoder_type="llama", dtype=dtype)
        with patch.object(built, "_validate_quantized_checkpoint", return_value=True):
            built.export(stand_in(), "/fake/model")
        assert self.mte.export_tensorrt_llm_checkpoint.call_args.kwargs["dtype"] is torch.float16

    # --- what follows

    @pytest.mark.parametrize("export_format", ["trtllm", "hf", "nemo"])
    def test_the_tokenizer_is_asked_for(self, export_format):
        built, model, trainer = made(export_format, decoder_type="llama"), stand_in(), MagicMock()
        with (
            patch.object(built, "_save_tokenizer") as save,
            patch.object(built, "_validate_quantized_checkpoint", return_value=True),
            patch("pathlib.Path.exists", return_value=True),
        ):
            self.weights_dir.return_value = "/fake/out/weights"
            built.export(model, "/fake/model", trainer)
        save.assert_called_once_with(model, "/fake/model", Path("/fake/out"), export_format)

    def test_success_is_logged(self):
        built = made(decoder_type="llama")
        with (
            patch.object(built, "_validate_quantized_checkpoint", return_value=True),
            patch(f"{MODULE}.logging") as logging,
        ):
            built.export(stand_in(), "/fake/model")
        logging.info.assert_called_once_with("Export succeeded, model has been exported to /fake/out.")

    # --- hf

    def test_hf(self):
        model = stand_in()
        assert made("hf").export(model, "/fake/model") is None
        self.export_hf.assert_called_once_with("/fake/model", Path("/fake/out"), model=model)
        self.mte.export_tensorrt_llm_checkpoint.assert_not_called()

    def test_hf_in_half_precision(self):
        model = stand_in()
        made("hf", dtype=16).export(model, "/fake/model")
        self.export_hf.assert_called_once_with("/fake/model", Path("/fake/out"), model=model)

    def test_hf_of_a_model_that_is_not_quantized(self):
        self.export_hf.return_value = None
        built = made("hf")
        with patch.object(built, "_save_tokenizer") as save:
            built.export(stand_in(), "/fake/model")
        save.assert_called_once()

    # --- nemo

    def test_nemo_needs_a_trainer(self):
        with pytest.raises(AssertionError, match="^Trainer required for NeMo export"):
            made("nemo").export(stand_in(), "/fake/model")

    def test_nemo(self, tmp_path):
        (tmp_path / "modelopt_state").mkdir()
        self.weights_dir.return_value = tmp_path
        model, trainer = stand_in(), MagicMock()
        made("nemo").export(model, "/fake/model", trainer)
        trainer.strategy.connect.assert_called_once_with(model)
        trainer.strategy.setup_environment.assert_called_once_with()
        trainer.strategy.setup_megatron_parallel.assert_called_once_with(trainer=trainer)
        trainer.save_checkpoint.assert_called_once_with(Path("/fake/out"))
        assert trainer.strategy.trainer is trainer
        self.barrier.assert_called_once_with()
        self.context.from_trainer.assert_called_once_with(trainer)
        dump = self.context.from_trainer.return_value.io_dump
        dump.assert_called_once_with("/fake/out/context", yaml_attrs=["model"])

    def test_nemo_asks_for_the_weights_folder_of_the_export(self, tmp_path):
        (tmp_path / "modelopt_state").mkdir()
        self.weights_dir.return_value = str(tmp_path)
        made("nemo").export(stand_in(), "/fake/model", MagicMock())
        self.weights_dir.assert_called_once_with(Path("/fake/out"), False)

    def test_nemo_without_the_state_of_modelopt(self, tmp_path):
        self.weights_dir.return_value = tmp_path
        with pytest.raises(AssertionError):  # noqa: PT011 - stock's has no text
            made("nemo").export(stand_in(), "/fake/model", MagicMock())

    def test_nemo_on_other_ranks(self):
        self.rank_zero.return_value = False
        trainer = MagicMock()
        made("nemo").export(stand_in(), "/fake/model", trainer)
        trainer.save_checkpoint.assert_called_once_with(Path("/fake/out"))
        self.context.from_trainer.assert_not_called()

    # --- other forms

    @pytest.mark.parametrize("owner_class", [Mock, MagicMock])
    @pytest.mark.parametrize("export_format", ["trtllm", "hf"])
    def test_unbound_with_a_mock(self, owner_class, export_format):
        owner, model = owner_class(), stand_in()
        owner.export_config = SimpleNamespace(
            path=Path("/x"), export_format=export_format, inference_tp=1, inference_pp=1
        )
        Quantizer.export(owner, model, "/fake/model")
        owner._save_tokenizer.assert_called_once_with(model, "/fake/model", Path("/x"), export_format)
        if export_format == "hf":
            self.export_hf.assert_called_once_with("/fake/model", Path("/x"), model=model)
        else:
            keywords = self.mte.export_tensorrt_llm_checkpoint.call_args.kwargs
            assert keywords["dtype"] is owner.torch_dtype
            assert keywords["decoder_type"] is owner._get_decoder_type.return_value
            owner._validate_quantized_checkpoint.assert_called_once_with(Path("/x"), 1)

    def test_unbound_with_a_namespace(self):
        owner = SimpleNamespace(
            export_config=SimpleNamespace(path=Path("/x"), export_format="hf", inference_tp=1, inference_pp=1),
            _save_tokenizer=Mock(),
        )
        Quantizer.export(owner, object(), "/fake/model")
        owner._save_tokenizer.assert_called_once()

    @pytest.mark.parametrize("export_format", ["trtllm", "hf"])
    def test_a_small_network(self, export_format):
        model = torch.nn.Linear(2, 2)
        model.config = SimpleNamespace(pipeline_model_parallel_size=1)
        built = made(export_format, decoder_type="llama")
        with patch.object(built, "_validate_quantized_checkpoint", return_value=True):
            built.export(model, "/fake/model")
        written = self.export_hf if export_format == "hf" else self.mte.export_tensorrt_llm_checkpoint
        written.assert_called_once()


@pytest.mark.drop_in
class TestSaveTokenizer:
    @pytest.fixture(autouse=True)
    def places(self):
        with (
            patch(f"{MODULE}.is_global_rank_zero", return_value=True) as self.rank_zero,
            patch(f"{MODULE}.shutil.copytree") as self.copytree,
        ):
            yield

    @pytest.mark.parametrize(("is_zero", "fmt"), [(False, "hf"), (False, "trtllm"), (True, "nemo")])
    def test_nothing_to_save(self, is_zero, fmt):
        self.rank_zero.return_value = is_zero
        model = MagicMock()
        made()._save_tokenizer(model, "/fake/model", Path("/fake/out"), fmt)
        self.copytree.assert_not_called()
        model.tokenizer.tokenizer.save_pretrained.assert_not_called()

    def test_a_tokenizer_of_transformers(self):
        model = MagicMock()
        model.tokenizer.tokenizer = MagicMock(spec=quantizer.PreTrainedTokenizerBase)
        made()._save_tokenizer(model, "/fake/model", Path("/fake/out"), "hf")
        model.tokenizer.tokenizer.save_pretrained.assert_called_once_with("/fake/out")
        self.copytree.assert_not_called()

    def test_the_class_of_tokenizers_can_be_replaced(self):
        model = SimpleNamespace(tokenizer=SimpleNamespace(tokenizer=Mock()))
        with patch(f"{MODULE}.PreTrainedTokenizerBase", Mock):
            made()._save_tokenizer(model, "/fake/model", Path("/fake/out"), "hf")
        model.tokenizer.tokenizer.save_pretrained.assert_called_once_with("/fake/out")

    @pytest.mark.parametrize(
        "model",
        [
            SimpleNamespace(),
            SimpleNamespace(tokenizer=object()),
            SimpleNamespace(tokenizer=SimpleNamespace(tokenizer=object())),
            MagicMock(),
        ],
    )
    def test_other_tokenizers_take_the_context_along(self, model):
        with patch(f"{MODULE}.ckpt_to_context_subdir", return_value="/fake/model/context") as context:
            made()._save_tokenizer(model, "/fake/model", Path("/fake/out"), "hf")
        context.assert_called_once_with("/fake/model")
        self.copytree.assert_called_once_with("/fake/model/context", "/fake/out/nemo_context", dirs_exist_ok=True)

    def test_trtllm_takes_the_context_along(self):
        model = MagicMock()
        model.tokenizer.tokenizer = MagicMock(spec=quantizer.PreTrainedTokenizerBase)
        with patch(f"{MODULE}.ckpt_to_context_subdir", return_value="ctx"):
            made()._save_tokenizer(model, "/fake/model", Path("/fake/out"), "trtllm")
        self.copytree.assert_called_once_with("ctx", "/fake/out/nemo_context", dirs_exist_ok=True)

    def test_the_modules_can_be_replaced(self):
        with (
            patch(f"{MODULE}.ckpt_to_context_subdir", return_value="ctx"),
            patch(f"{MODULE}.shutil") as shutil,
            patch(f"{MODULE}.os") as os,
        ):
            made()._save_tokenizer(MagicMock(), "/fake/model", Path("/fake/out"), "trtllm")
        shutil.copytree.assert_called_once_with("ctx", os.path.join.return_value, dirs_exist_ok=True)
        self.copytree.assert_not_called()

    def test_unbound(self):
        with patch(f"{MODULE}.ckpt_to_context_subdir", return_value="ctx"):
            Quantizer._save_tokenizer(object(), object(), "/fake/model", Path("/o"), "trtllm")
        self.copytree.assert_called_once_with("ctx", "/o/nemo_context", dirs_exist_ok=True)


@pytest.mark.drop_in
class TestValidate:
    @pytest.mark.parametrize(
        ("files", "tp", "complete"),
        [
            ([], 1, False),
            (["config.json"], 1, False),
            (["rank0.safetensors"], 1, False),
            (["config.json", "rank0.safetensors"], 1, True),
            (["config.json", "rank0.safetensors"], 2, False),
            (["config.json", "rank1.safetensors"], 2, False),
            (["config.json", "rank0.safetensors", "rank1.safetensors"], 2, True),
            (["config.json"], 0, True),
        ],
    )
    def test_files(self, tmp_path, files, tp, complete):
        for name in files:
            (tmp_path / name).touch()
        assert Quantizer._validate_quantized_checkpoint(tmp_path, tp) is complete

    def test_what_is_missing_is_logged(self, tmp_path):
        with patch(f"{MODULE}.logging") as logging:
            Quantizer._validate_quantized_checkpoint(tmp_path, 1)
        logging.error.assert_called_once()
        assert logging.error.call_args.args[0].startswith("Failed to export the quantized model.")

    def test_nothing_is_logged_when_complete(self, tmp_path):
        (tmp_path / "config.json").touch()
        (tmp_path / "rank0.safetensors").touch()
        with patch(f"{MODULE}.logging") as logging:
            made()._validate_quantized_checkpoint(tmp_path, 1)
        logging.error.assert_not_called()


@pytest.mark.drop_in
class TestExportHfCheckpoint:
    @pytest.fixture(autouse=True)
    def places(self):
        with (
            patch(f"{MODULE}.load_connector_from_trainer_ckpt") as self.load,
            patch(f"{MODULE}.unwrap_for_modelopt_operations") as self.unwrap,
            patch(f"{MODULE}.mto") as self.mto,
            patch(f"{MODULE}.mte") as self.mte,
        ):
            self.exporter = self.load.return_value
            self.exporter.nemo_load.return_value = ("loaded", None)
            self.mto.ModeloptStateManager.is_converted.return_value = True
            yield

    @pytest.mark.parametrize("export_dir", ["/fake/out", Path("/fake/out")])
    def test_writes_with_modelopt(self, export_dir):
        model = MagicMock()
        assert export_hf_checkpoint("/fake/model", export_dir, model=model) == Path("/fake/out")
        self.load.assert_called_once_with("/fake/model", "hf")
        self.unwrap.assert_called_once_with(model)
        self.mto.ModeloptStateManager.is_converted.assert_called_once_with(self.unwrap.return_value)
        (written,), keywords = self.mte.export_mcore_gpt_to_hf.call_args
        assert written is self.unwrap.return_value
        assert keywords["export_dir"] == "/fake/out"
        assert set(keywords) == {"pretrained_model_name_or_path", "export_dir"}

    def test_the_configuration_lies_where_modelopt_looks(self):
        export_hf_checkpoint("/fake/model", "/fake/out", model=MagicMock())
        folder = self.mte.export_mcore_gpt_to_hf.call_args.kwargs["pretrained_model_name_or_path"]
        self.exporter.config.save_pretrained.assert_called_once_with(folder)
        assert not Path(folder).exists()

    def test_the_temporary_folder_can_be_replaced(self):
        with patch(f"{MODULE}.tempfile") as tempfile:
            tempfile.TemporaryDirectory.return_value.__enter__.return_value = "/fake/tmp"
            export_hf_checkpoint("/fake/model", "/fake/out", model=MagicMock())
        self.exporter.config.save_pretrained.assert_called_once_with("/fake/tmp")
        keywords = self.mte.export_mcore_gpt_to_hf.call_args.kwargs
        assert keywords["pretrained_model_name_or_path"] == "/fake/tmp"

    @pytest.mark.parametrize("extra", [{"dtype": torch.float16}, {"export_extra_modules": True}])
    def test_further_arguments(self, extra):
        export_hf_checkpoint("/fake/model", "/fake/out", model=MagicMock(), **extra)
        assert extra.items() <= self.mte.export_mcore_gpt_to_hf.call_args.kwargs.items()

    def test_the_model_is_loaded_when_there_is_none(self):
        export_hf_checkpoint("/fake/model", "/fake/out")
        self.exporter.nemo_load.assert_called_once_with("/fake/model")
        self.unwrap.assert_called_once_with("loaded")

    def test_a_model_is_not_loaded_twice(self):
        export_hf_checkpoint("/fake/model", "/fake/out", MagicMock())
        self.exporter.nemo_load.assert_not_called()

    def test_a_plain_model_is_not_written(self):
        self.mto.ModeloptStateManager.is_converted.return_value = False
        assert export_hf_checkpoint("/fake/model", "/fake/out", model=MagicMock()) is None
        self.mte.export_mcore_gpt_to_hf.assert_not_called()
        self.exporter.config.save_pretrained.assert_not_called()

    def test_runs_in_inference_mode(self):
        modes = []
        self.mte.export_mcore_gpt_to_hf.side_effect = lambda *_, **__: modes.append(torch.is_inference_mode_enabled())
        export_hf_checkpoint("/fake/model", "/fake/out", model=MagicMock())
        assert modes == [True]

    def test_a_small_network(self):
        self.unwrap.return_value = torch.nn.Linear(2, 2)
        assert export_hf_checkpoint("/fake/model", "/fake/out", model=object()) == Path("/fake/out")
        self.mte.export_mcore_gpt_to_hf.assert_called_once()

    def test_an_error_of_modelopt_is_not_swallowed(self):
        self.mte.export_mcore_gpt_to_hf.side_effect = RuntimeError("cannot write")
        with pytest.raises(RuntimeError, match="^cannot write$"):
            export_hf_checkpoint("/fake/model", "/fake/out", model=MagicMock())


@pytest.mark.drop_in
class TestUnwrap:
    def test_asks_nemo(self):
        model = object()
        with patch(f"{MODULE}.unwrap_model") as unwrap:
            assert quantizer.unwrap_for_modelopt_operations(model) is unwrap.return_value
        unwrap.assert_called_once_with(model)

    @pytest.mark.parametrize("depth", [0, 1, 3])
    def test_takes_wrappers_off(self, depth):
        model = inner = object()
        for _ in range(depth):
            model = SimpleNamespace(module=model)
        assert quantizer.unwrap_for_modelopt_operations(model) is inner


@pytest.mark.drop_in
class TestGenerateSample:
    @pytest.fixture(autouse=True)
    def places(self):
        with (
            patch(f"{MODULE}.generate") as self.generate,
            patch(f"{MODULE}.MCoreTokenizerWrappper") as self.wrapper,
            patch(f"{MODULE}.CommonInferenceParams") as self.params,
            patch(f"{MODULE}.logging") as self.logging,
        ):
            self.generate.return_value = [SimpleNamespace(generated_text=" A"), SimpleNamespace(generated_text=" B")]
            yield

    @pytest.mark.parametrize("model", [MagicMock(), Mock(), SimpleNamespace(tokenizer=1, get_inference_wrapper=Mock())])
    def test_two_prompts_are_continued(self, model):
        assert Quantizer._generate_sample(model) is None
        self.wrapper.assert_called_once_with(model.tokenizer)
        self.params.assert_called_once_with(top_k=1, num_tokens_to_generate=30)
        model.get_inference_wrapper.assert_called_once_with(
            params_dtype=torch.bfloat16, inference_batch_times_seqlen_threshold=30
        )
        positional, keywords = self.generate.call_args
        assert positional[:2] == (model.get_inference_wrapper.return_value, self.wrapper.return_value)
        assert len(positional[2]) == 2
        assert keywords == {"inference_params": self.params.return_value}

    def test_what_comes_out_is_logged(self):
        Quantizer._generate_sample(MagicMock())
        self.logging.info.assert_called_once()
        message = self.logging.info.call_args.args[0]
        assert message.startswith("Sample generation after PTQ (with prompts):")
        assert "Soyer trained as a A" in message and "Soyer trained as a B" in message

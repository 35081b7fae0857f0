"""``model_utils``: layer specs, restoring with a trainer, and the state of Model Optimizer, on stand-ins."""

from __future__ import annotations

import contextlib
import importlib.util
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, patch

import pytest
import torch
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from megatron.core.dist_checkpointing.validation import StrictHandling

from nemo.collections import llm
from nemo.collections.llm.modelopt import model_utils
from nemo.collections.llm.modelopt.model_utils import (
    _set_gpt_mamba_modelopt_spec,
    restore_modelopt_state,
    save_modelopt_state,
    set_modelopt_spec_if_exists_in_ckpt,
    setup_trainer_and_restore_model_with_modelopt_spec,
)

MODULE = "nemo.collections.llm.modelopt.model_utils"

# NeMo moved it in 2.6.
_PLACES = "common.tokenizers.tokenizer_utils", "nlp.modules.common.tokenizer_utils"
TOKENIZER_UTILS = next(
    name for name in (f"nemo.collections.{one}" for one in _PLACES) if importlib.util.find_spec(name)
)


def gpt_config(**given):
    return llm.GPTConfig(num_layers=2, hidden_size=32, num_attention_heads=2, **given)


@pytest.mark.drop_in
class TestLayerSpec:
    @pytest.fixture(autouse=True)
    def places(self):
        with (
            patch(f"{MODULE}.get_gpt_modelopt_spec", create=True) as self.gpt,
            patch(f"{MODULE}.get_mamba_stack_modelopt_spec", create=True) as self.mamba,
        ):
            yield

    @pytest.mark.parametrize("config", [gpt_config(), MagicMock(spec=llm.GPTConfig), Mock(spec=llm.LlamaConfig)])
    def test_gpt(self, config):
        assert _set_gpt_mamba_modelopt_spec(config) is config
        assert config.transformer_layer_spec.func is self.gpt
        assert config.transformer_layer_spec.keywords["remap_te_layernorm"] is True

    @pytest.mark.parametrize("config", [MagicMock(spec=llm.SSMConfig), Mock(spec=llm.SSMConfig)])
    def test_mamba(self, config):
        assert _set_gpt_mamba_modelopt_spec(config) is config
        assert config.mamba_stack_spec.func is self.mamba
        assert config.mamba_stack_spec.keywords == {"remap_te_layernorm": True}

    @pytest.mark.parametrize("config", [object(), SimpleNamespace(), MagicMock(), None])
    def test_other_configurations(self, config):
        with pytest.raises(ValueError, match="^No modelopt layer spec supported for config type"):
            _set_gpt_mamba_modelopt_spec(config)

    @pytest.mark.parametrize("path", ["{}", "nemo://{}"])
    @pytest.mark.parametrize("spec", [llm.GPTModel, llm.LlamaModel, llm.MambaModel])
    def test_of_a_checkpoint(self, tmp_path, path, spec):
        (tmp_path / "weights" / "modelopt_state").mkdir(parents=True)
        model = MagicMock(spec=spec)
        model.config = MagicMock()
        with patch(f"{MODULE}._set_gpt_mamba_modelopt_spec") as choose:
            set_modelopt_spec_if_exists_in_ckpt(model, path.format(tmp_path))
        choose.assert_called_once_with(model.config)
        assert model.config.gradient_accumulation_fusion is False

    def test_of_a_plain_checkpoint(self, tmp_path):
        (tmp_path / "weights").mkdir()
        with patch(f"{MODULE}._set_gpt_mamba_modelopt_spec") as choose:
            set_modelopt_spec_if_exists_in_ckpt(MagicMock(spec=llm.GPTModel), str(tmp_path))
        choose.assert_not_called()

    def test_of_a_model_that_is_configured(self, tmp_path):
        (tmp_path / "weights" / "modelopt_state").mkdir(parents=True)
        model = MagicMock(spec=llm.GPTModel)
        model.module = object()
        with patch(f"{MODULE}._set_gpt_mamba_modelopt_spec") as choose:
            set_modelopt_spec_if_exists_in_ckpt(model, str(tmp_path))
        choose.assert_not_called()

    def test_of_another_model(self, tmp_path):
        (tmp_path / "weights" / "modelopt_state").mkdir(parents=True)
        with patch(f"{MODULE}.logging") as logging:
            set_modelopt_spec_if_exists_in_ckpt(object(), str(tmp_path))
        logging.warning.assert_called_once_with(
            "<class 'object'> is neither a GPTModel nor MambaModel. Modelopt state will not be loaded."
        )


@pytest.mark.drop_in
class TestTrainerSetup:
    @pytest.fixture(autouse=True)
    def places(self):
        with (
            patch(f"{MODULE}.nl") as self.nl,
            patch(f"{MODULE}._set_gpt_mamba_modelopt_spec") as self.spec,
            patch(f"{MODULE}._setup_trainer_and_restore_model") as self.restore,
            patch(f"{MODULE}.ckpt_to_context_subdir", return_value="/fake/context"),
            patch("nemo_modelopt_dropin.cpu_backend.is_enabled", return_value=False),
        ):
            self.model = self.nl.io.load_context.return_value
            yield

    def test_what_is_returned(self):
        found = setup_trainer_and_restore_model_with_modelopt_spec("/fake/model")
        assert found == (self.model, self.nl.Trainer.return_value)

    def test_the_strategy_for_inference(self):
        setup_trainer_and_restore_model_with_modelopt_spec("/fake/model", 2, 4, expert_model_parallel_size=3)
        self.nl.MegatronStrategy.assert_called_once_with(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=4,
            expert_model_parallel_size=3,
            pipeline_dtype=torch.bfloat16,
            ckpt_load_optimizer=False,
            ckpt_parallel_save_optim=False,
            setup_optimizers=False,
            ddp="pytorch",
            ckpt_load_strictness=None,
        )

    def test_the_strategy_for_training(self):
        setup_trainer_and_restore_model_with_modelopt_spec("/fake/model", inference_only=False)
        self.nl.MegatronStrategy.assert_called_once_with(
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            expert_model_parallel_size=1,
            pipeline_dtype=torch.bfloat16,
            ckpt_load_strictness=None,
        )

    def test_an_older_checkpoint(self):
        setup_trainer_and_restore_model_with_modelopt_spec("/fake/model", legacy_ckpt=True)
        assert self.nl.MegatronStrategy.call_args.kwargs["ckpt_load_strictness"] is StrictHandling.LOG_ALL

    def test_further_arguments(self):
        setup_trainer_and_restore_model_with_modelopt_spec(
            "/fake/model", strategy_kwargs={"lazy_init": True}, trainer_kwargs={"limit_val_batches": 3}
        )
        assert self.nl.MegatronStrategy.call_args.kwargs["lazy_init"] is True
        assert self.nl.Trainer.call_args.kwargs["limit_val_batches"] == 3

    def test_the_trainer(self):
        setup_trainer_and_restore_model_with_modelopt_spec("/fake/model", devices=2, num_nodes=3)
        self.nl.MegatronMixedPrecision.assert_called_once_with(
            precision="bf16-mixed", params_dtype=torch.bfloat16, autocast_enabled=False, grad_reduce_in_fp32=True
        )
        self.nl.Trainer.assert_called_once_with(
            devices=2,
            num_nodes=3,
            accelerator="gpu",
            strategy=self.nl.MegatronStrategy.return_value,
            plugins=self.nl.MegatronMixedPrecision.return_value,
        )

    def test_the_model_is_read_and_restored(self):
        setup_trainer_and_restore_model_with_modelopt_spec("/fake/model")
        self.nl.io.load_context.assert_called_once_with(path="/fake/context", subpath="model")
        self.spec.assert_called_once_with(self.model.config)
        self.restore.assert_called_once_with("/fake/model", self.nl.Trainer.return_value, self.model, None)
        assert self.nl.Trainer.return_value.strategy.restore_config is None

    @pytest.mark.parametrize("inference_only", [True, False])
    def test_the_optimizer(self, inference_only):
        setup_trainer_and_restore_model_with_modelopt_spec("/fake/model", inference_only=inference_only)
        assert hasattr(self.model, "optim") is not inference_only

    def test_overrides(self):
        overrides = {"sequence_parallel": False, "anything": 3}
        setup_trainer_and_restore_model_with_modelopt_spec("/fake/model", model_config_overrides=overrides)
        assert self.model.config.sequence_parallel is False and self.model.config.anything == 3

    @pytest.mark.parametrize("end", ["first", "last"])
    def test_unequal_stages(self, end):
        name = f"num_layers_in_{end}_pipeline_stage"
        setup_trainer_and_restore_model_with_modelopt_spec("/fake/model", **{name: 5})
        assert getattr(self.model.config, name) == 5

    def test_a_tokenizer_of_ones_own(self):
        with patch(f"{TOKENIZER_UTILS}.get_tokenizer") as get:
            setup_trainer_and_restore_model_with_modelopt_spec("/fake/model", tokenizer_path="/fake/tokenizer")
        get.assert_called_once_with("/fake/tokenizer")
        assert self.restore.call_args.args[3] is get.return_value


class Core:
    """A model of which only the parts that hide something are used."""

    def __init__(self, *names):
        self.hidden = False
        for name in names:
            setattr(self, name, getattr(self, f"_{name}"))

    @contextlib.contextmanager
    def _hide_teacher_model(self):
        self.hidden = True
        yield
        self.hidden = False

    def _hide_loss_modules(self):
        raise AssertionError("only returned")


class StateCase:
    @pytest.fixture(autouse=True)
    def places(self):
        with (
            patch(f"{MODULE}.mto") as self.mto,
            patch(f"{MODULE}.unwrap_model") as self.unwrap,
            patch(f"{MODULE}.ckpt_to_weights_subdir") as self.dir,
        ):
            self.dir.side_effect = lambda path, is_saving: f"{path}/weights"
            self.unwrap.return_value = Core()
            self.converted = self.mto.ModeloptStateManager.is_converted
            self.converted.return_value = False
            yield


@pytest.mark.drop_in
class TestRestoreState(StateCase):
    def test_of_a_path(self):
        model = object()
        assert restore_modelopt_state(model, "/fake/ckpt") is None
        self.unwrap.assert_called_once_with(model)
        self.mto.plugins.restore_sharded_modelopt_state.assert_called_once_with(
            [self.unwrap.return_value], "/fake/ckpt/weights", prefix="module."
        )

    @pytest.mark.parametrize(
        "trainer", [None, SimpleNamespace(ckpt_path=None, strategy=SimpleNamespace(restore_config=None))]
    )
    def test_of_no_checkpoint(self, trainer):
        assert restore_modelopt_state(object(), trainer=trainer) is None
        self.unwrap.assert_not_called()

    @pytest.mark.parametrize(
        ("restore", "resume", "path"),
        [(SimpleNamespace(path="/a"), None, "/a"), (None, "/b", "/b"), (SimpleNamespace(path="/a"), "/b", "/a")],
    )
    def test_of_a_trainer(self, restore, resume, path):
        trainer = SimpleNamespace(strategy=SimpleNamespace(restore_config=restore), ckpt_path=resume)
        restore_modelopt_state(object(), trainer=trainer)
        assert self.mto.plugins.restore_sharded_modelopt_state.call_args.args[1] == f"{path}/weights"

    def test_once_only(self):
        self.converted.return_value = True
        assert restore_modelopt_state(object(), "/fake/ckpt") is None
        self.mto.plugins.restore_sharded_modelopt_state.assert_not_called()

    def test_the_teacher_is_hidden(self):
        core, seen = Core("hide_teacher_model"), []
        self.unwrap.return_value = core
        restore = self.mto.plugins.restore_sharded_modelopt_state
        restore.side_effect = lambda *_, **__: seen.append(core.hidden)
        restore_modelopt_state(object(), "/fake/ckpt")
        assert seen == [True] and not core.hidden

    def test_what_hides_the_losses_is_returned(self):
        core = Core("hide_loss_modules")
        self.unwrap.return_value = core
        assert restore_modelopt_state(object(), "/fake/ckpt") == core.hide_loss_modules

    def test_of_a_small_network(self):
        self.unwrap.return_value = torch.nn.Linear(2, 2)
        assert restore_modelopt_state(object(), "/fake/ckpt") is None
        self.mto.plugins.restore_sharded_modelopt_state.assert_called_once()


@pytest.mark.drop_in
class TestSaveState(StateCase):
    def test_of_a_plain_model(self):
        save_modelopt_state(object(), "/fake/ckpt", MagicMock())
        self.mto.plugins.save_sharded_modelopt_state.assert_not_called()

    def test_of_a_converted_model(self):
        self.converted.return_value = True
        writer = SimpleNamespace(async_save=False, save_sharded_strategy="strategy")
        save_modelopt_state(object(), "/fake/ckpt", writer)
        self.mto.plugins.save_sharded_modelopt_state.assert_called_once_with(
            [self.unwrap.return_value], "/fake/ckpt/weights", sharded_strategy="strategy"
        )
        self.dir.assert_called_once_with("/fake/ckpt", is_saving=True)

    @pytest.mark.parametrize("is_async", [True, False])
    def test_asynchronous_writing_is_finished_first(self, is_async):
        self.converted.return_value = True
        writer = MagicMock(async_save=is_async)
        save_modelopt_state(object(), "/fake/ckpt", writer)
        assert writer.maybe_finalize_save_checkpoint.called is is_async
        if is_async:
            writer.maybe_finalize_save_checkpoint.assert_called_once_with(blocking=True)

    def test_a_wrapped_writer(self):
        self.converted.return_value = True
        wrapper = MagicMock(spec=_WrappingCheckpointIO)
        wrapper.checkpoint_io = SimpleNamespace(save_sharded_strategy="inner")
        save_modelopt_state(object(), "/fake/ckpt", wrapper)
        assert self.mto.plugins.save_sharded_modelopt_state.call_args.kwargs == {"sharded_strategy": "inner"}

    def test_the_teacher_is_hidden(self):
        self.converted.return_value = True
        core, seen = Core("hide_teacher_model"), []
        self.unwrap.return_value = core
        save = self.mto.plugins.save_sharded_modelopt_state
        save.side_effect = lambda *_, **__: seen.append(core.hidden)
        save_modelopt_state(object(), "/fake/ckpt", MagicMock(async_save=False))
        assert seen == [True]


@pytest.mark.drop_in
class TestModelUtilsNames:
    def test_what_is_exported(self):
        assert set(model_utils.__all__) == {
            "set_modelopt_spec_if_exists_in_ckpt",
            "setup_trainer_and_restore_model_with_modelopt_spec",
        }

    @pytest.mark.parametrize("name", ["HAVE_TE", "HAVE_MAMBA_SSM", "HAVE_CAUSAL_CONV1D"])
    def test_what_is_installed(self, name):
        assert isinstance(getattr(model_utils, name), bool)

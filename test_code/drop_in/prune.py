"""``prune_language_model``, ``PruningConfig`` and ``save_pruned_model``, on stand-ins."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, call, patch

import pytest
import torch

from nemo.collections import llm
from nemo.collections.llm.modelopt.prune import pruner
from nemo.collections.llm.modelopt.prune.pruner import PruningConfig, prune_language_model, save_pruned_model

MODULE = "nemo.collections.llm.modelopt.prune.pruner"
HPARAMS = (
    "ffn_hidden_size",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "mamba_num_heads",
    "mamba_head_dim",
    "num_layers",
)
NOTHING = {f"target_{name}": None for name in HPARAMS} | {"drop_layers": None}


def settings(**given):
    """Return a configuration with stock's eight fields and no others."""
    return SimpleNamespace(**{**NOTHING, **given})


@pytest.mark.drop_in
class TestPruningConfig:
    def test_defaults(self):
        config = PruningConfig()
        assert {name: getattr(config, name) for name in NOTHING} == NOTHING

    @pytest.mark.parametrize("name", [name for name in HPARAMS if name != "num_query_groups"])
    def test_each_target_excludes_dropping_layers(self, name):
        with pytest.raises(ValueError, match="^drop_layers cannot be used with other pruning parameters"):
            PruningConfig(drop_layers=[1], **{f"target_{name}": 8})

    def test_all_targets_exclude_dropping_layers(self):
        with pytest.raises(ValueError, match="^drop_layers cannot be used with other pruning parameters"):
            PruningConfig(drop_layers=[1, 2], **{f"target_{name}": 8 for name in HPARAMS})

    @pytest.mark.parametrize("layers", [[1], [2, 3], [1, 5, 9]])
    def test_dropping_layers_alone(self, layers):
        assert PruningConfig(drop_layers=layers).drop_layers == layers

    def test_no_layers_to_drop_do_not_exclude_targets(self):
        assert PruningConfig(drop_layers=[], target_num_layers=4).target_num_layers == 4

    def test_positional(self):
        config = PruningConfig(512, 256, 8, 4, 2, 16, 12)
        assert [getattr(config, f"target_{name}") for name in HPARAMS] == [512, 256, 8, 4, 2, 16, 12]

    def test_hparams_of_stock_are_supported(self):
        assert set(HPARAMS) <= pruner.SUPPORTED_PRUNING_HPARAMS


class PruneCase:
    @pytest.fixture(autouse=True)
    def places(self):
        with patch(f"{MODULE}.mtp") as self.mtp, patch(f"{MODULE}.llm.validate") as self.validate:
            yield


@pytest.mark.drop_in
class TestDropLayers(PruneCase):
    @pytest.mark.parametrize(
        "model", [MagicMock(spec=llm.GPTModel), MagicMock(spec=llm.MambaModel), MagicMock(), Mock(), object()]
    )
    @pytest.mark.parametrize("layers", [[1], [3, 4]])
    def test_modelopt_drops_them(self, model, layers):
        assert prune_language_model(model, PruningConfig(drop_layers=layers)) is model
        self.mtp.plugins.drop_mcore_language_model_layers.assert_called_once_with(model, layers_to_drop=layers)
        self.mtp.prune.assert_not_called()

    @pytest.mark.parametrize("config", [SimpleNamespace(drop_layers=[2]), Mock(drop_layers=[2])])
    def test_nothing_else_is_read(self, config):
        model = MagicMock(spec=llm.GPTModel)
        assert prune_language_model(model, config) is model
        self.mtp.plugins.drop_mcore_language_model_layers.assert_called_once_with(model, layers_to_drop=[2])

    def test_a_small_network(self):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        assert prune_language_model(model, PruningConfig(drop_layers=[1])) is model
        self.mtp.plugins.drop_mcore_language_model_layers.assert_called_once_with(model, layers_to_drop=[1])

    def test_data_is_left_alone(self):
        data, trainer = MagicMock(), MagicMock()
        own = data.val_dataloader
        prune_language_model(MagicMock(), PruningConfig(drop_layers=[1]), data, trainer)
        assert data.val_dataloader is own
        self.validate.assert_not_called()

    def test_the_list_itself_is_passed(self):
        layers = (1, 2)
        prune_language_model(MagicMock(), SimpleNamespace(drop_layers=layers))
        assert list(self.mtp.plugins.drop_mcore_language_model_layers.call_args.kwargs["layers_to_drop"]) == [1, 2]

    def test_an_error_of_modelopt_is_not_swallowed(self):
        self.mtp.plugins.drop_mcore_language_model_layers.side_effect = RuntimeError("no such layer")
        with pytest.raises(RuntimeError, match="^no such layer$"):
            prune_language_model(MagicMock(spec=llm.GPTModel), PruningConfig(drop_layers=[99]))


@pytest.mark.drop_in
class TestPrune(PruneCase):
    @pytest.mark.parametrize(
        "targets",
        [
            {"ffn_hidden_size": 9216},
            {"hidden_size": 3072},
            {"num_layers": 16},
            {"num_attention_heads": 16, "num_query_groups": 4},
            {"mamba_num_heads": 64},
            {"mamba_head_dim": 32},
            {"ffn_hidden_size": 1024, "hidden_size": 512, "num_layers": 8},
        ],
    )
    @pytest.mark.parametrize("form", [PruningConfig, settings])
    def test_targets_reach_modelopt(self, targets, form):
        model = MagicMock(spec=llm.GPTModel)
        config = form(**{f"target_{name}": size for name, size in targets.items()})
        assert prune_language_model(model, config, MagicMock(), MagicMock()) is model
        (given,), keywords = self.mtp.prune.call_args
        assert given is model
        assert set(keywords) == {"mode", "constraints", "dummy_input", "config"}
        assert keywords["mode"] == "mcore_minitron"
        assert keywords["constraints"] == {"export_config": targets}
        assert keywords["dummy_input"] is None
        assert set(keywords["config"]) == {"forward_loop"}

    @pytest.mark.parametrize("mock_class", [Mock, MagicMock])
    def test_a_mock_of_the_configuration(self, mock_class):
        config = mock_class(spec=PruningConfig, **{**NOTHING, "target_hidden_size": 128})
        prune_language_model(MagicMock(), config, MagicMock(), MagicMock())
        assert self.mtp.prune.call_args.kwargs["constraints"] == {"export_config": {"hidden_size": 128}}

    def test_a_mock_without_a_spec(self):
        prune_language_model(MagicMock(), Mock(**{**NOTHING, "target_num_layers": 3}), MagicMock(), MagicMock())
        export_config = self.mtp.prune.call_args.kwargs["constraints"]["export_config"]
        assert export_config["num_layers"] == 3

    @pytest.mark.parametrize("trainer", [MagicMock(), SimpleNamespace(), object()])
    @pytest.mark.parametrize(
        "model", [MagicMock(spec=llm.GPTModel), MagicMock(spec=llm.MambaModel), Mock(), torch.nn.Linear(2, 2)]
    )
    def test_the_forward_loop_validates(self, model, trainer):
        data = MagicMock()
        prune_language_model(model, PruningConfig(target_hidden_size=8), data, trainer)
        loop = self.mtp.prune.call_args.kwargs["config"]["forward_loop"]
        assert isinstance(loop, partial)
        assert loop.func is self.validate and loop.args == ()
        assert loop.keywords == {"data": data, "trainer": trainer, "tokenizer": "model"}
        loop("the model of modelopt")
        self.validate.assert_called_once_with("the model of modelopt", data=data, trainer=trainer, tokenizer="model")

    @pytest.mark.parametrize("data_class", [Mock, MagicMock])
    def test_validation_reads_the_training_data(self, data_class):
        data, seen = data_class(), []
        self.mtp.prune.side_effect = lambda *_, **__: seen.append(data.val_dataloader is data.train_dataloader)
        prune_language_model(MagicMock(), PruningConfig(target_hidden_size=8), data, MagicMock())
        assert seen == [True]
        assert data.val_dataloader is data.train_dataloader

    def test_a_namespace_of_data(self):
        data = SimpleNamespace(train_dataloader=lambda: "train", val_dataloader=lambda: "val")
        prune_language_model(MagicMock(), PruningConfig(target_hidden_size=8), data, MagicMock())
        assert data.val_dataloader() == "train"

    def test_no_layers_to_drop_prune_by_importance(self):
        prune_language_model(MagicMock(), settings(drop_layers=[], target_num_layers=2), MagicMock(), MagicMock())
        self.mtp.prune.assert_called_once()
        self.mtp.plugins.drop_mcore_language_model_layers.assert_not_called()

    @pytest.mark.parametrize(
        "config", [PruningConfig(target_hidden_size=8), settings(target_hidden_size=8), settings()]
    )
    def test_data_is_required(self, config):
        with pytest.raises(AssertionError, match=r"^data_module is required to prune the model\."):
            prune_language_model(MagicMock(), config)
        with pytest.raises(AssertionError, match=r"^data_module is required to prune the model\."):
            prune_language_model(MagicMock(), config, trainer=MagicMock())
        self.mtp.prune.assert_not_called()

    def test_data_is_asked_for_before_emptiness(self):
        with pytest.raises(AssertionError, match=r"^data_module is required to prune the model\."):
            prune_language_model(MagicMock(), PruningConfig())

    @pytest.mark.parametrize("config", [PruningConfig(target_hidden_size=8), settings(target_num_layers=8)])
    def test_a_trainer_is_required(self, config):
        data = MagicMock()
        own = data.val_dataloader
        with pytest.raises(AssertionError, match=r"^trainer is required to prune the model\."):
            prune_language_model(MagicMock(), config, data_module=data)
        assert data.val_dataloader is own

    def test_it_is_logged(self):
        with patch(f"{MODULE}.logging") as logging:
            prune_language_model(MagicMock(), PruningConfig(target_hidden_size=8), MagicMock(), MagicMock())
        logging.info.assert_called_once_with("Pruning model...")

    def test_other_sets_of_hparams(self):
        config = SimpleNamespace(drop_layers=None, target_hidden_size=8, target_num_layers=None)
        with patch.object(pruner, "SUPPORTED_PRUNING_HPARAMS", {"hidden_size", "num_layers"}):
            prune_language_model(MagicMock(), config, MagicMock(), MagicMock())
        assert self.mtp.prune.call_args.kwargs["constraints"] == {"export_config": {"hidden_size": 8}}

    def test_an_error_of_modelopt_is_not_swallowed(self):
        self.mtp.prune.side_effect = RuntimeError("TP must be 1")
        with pytest.raises(RuntimeError, match="^TP must be 1$"):
            prune_language_model(MagicMock(), PruningConfig(target_hidden_size=8), MagicMock(), MagicMock())


@pytest.mark.drop_in
class TestSave:
    @pytest.fixture(autouse=True)
    def places(self, tmp_path):
        self.weights = MagicMock()
        with (
            patch(f"{MODULE}.dist_checkpointing") as self.checkpointing,
            patch(f"{MODULE}.ckpt_to_weights_subdir", return_value=self.weights) as self.weights_dir,
            patch(f"{MODULE}.ckpt_to_context_subdir", return_value="/fake/context") as self.context_dir,
            patch(f"{MODULE}.TrainerContext") as self.context,
            patch(f"{MODULE}.is_global_rank_zero", return_value=True) as self.rank_zero,
        ):
            yield

    def trainer(self):
        sizes = {name: place for place, name in enumerate((*HPARAMS, "kv_channels"), start=1)}
        model = SimpleNamespace(
            config=SimpleNamespace(**sizes), __io__=SimpleNamespace(config=SimpleNamespace()), module=object()
        )
        return SimpleNamespace(model=model, strategy=MagicMock())

    @pytest.mark.parametrize("path", ["/fake/pruned", Path("/fake/pruned")])
    def test_places_are_those_of_the_checkpoint(self, path):
        assert save_pruned_model(self.trainer(), path) is None
        self.weights_dir.assert_called_once_with(path, is_saving=True)
        self.context_dir.assert_called_once_with(path)
        self.weights.mkdir.assert_called_once_with(parents=True, exist_ok=True)

    def test_weights_are_written_by_megatron(self):
        trainer = self.trainer()
        save_pruned_model(trainer, "/fake/pruned")
        self.checkpointing.save.assert_called_once_with(
            trainer.strategy.megatron_parallel.sharded_state_dict.return_value,
            self.weights,
            content_metadata=trainer.strategy.sharded_state_dict_metadata,
        )

    def test_the_context_is_written(self):
        trainer = self.trainer()
        save_pruned_model(trainer, "/fake/pruned")
        self.context.from_trainer.assert_called_once_with(trainer)
        self.context.from_trainer.return_value.io_dump.assert_called_once_with("/fake/context", yaml_attrs=["model"])

    def test_other_ranks_write_no_context(self):
        self.rank_zero.return_value = False
        save_pruned_model(self.trainer(), "/fake/pruned")
        self.checkpointing.save.assert_called_once()
        self.context.from_trainer.assert_not_called()

    @pytest.mark.parametrize("name", [*HPARAMS, "kv_channels"])
    def test_each_size_is_recorded(self, name):
        trainer = self.trainer()
        save_pruned_model(trainer, "/fake/pruned")
        assert getattr(trainer.model.__io__.config, name) == getattr(trainer.model.config, name)

    @pytest.mark.parametrize("trainer_class", [MagicMock])
    def test_a_mock_of_the_trainer(self, trainer_class):
        trainer = trainer_class()
        trainer.model.__io__ = MagicMock()
        save_pruned_model(trainer, "/fake/pruned")
        assert trainer.model.__io__.config.hidden_size is trainer.model.config.hidden_size

    def test_sizes_are_recorded_before_anything_is_written(self):
        trainer, order = self.trainer(), []
        self.checkpointing.save.side_effect = lambda *_, **__: order.append(trainer.model.__io__.config.hidden_size)
        save_pruned_model(trainer, "/fake/pruned")
        assert order == [trainer.model.config.hidden_size]

    def test_it_is_logged(self):
        with patch(f"{MODULE}.logging") as logging:
            save_pruned_model(self.trainer(), "/fake/pruned")
        assert logging.info.call_args_list == [
            call("Saving pruned model to /fake/pruned..."),
            call("Pruned model saved to /fake/pruned\n"),
        ]

    def test_an_error_while_writing_is_not_swallowed(self):
        self.checkpointing.save.side_effect = OSError("disk full")
        with pytest.raises(OSError, match="^disk full$"):
            save_pruned_model(self.trainer(), "/fake/pruned")
        self.context.from_trainer.assert_not_called()

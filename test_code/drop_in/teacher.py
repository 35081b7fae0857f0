"""``teacher_provider``, on stand-ins."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, call, patch

import pytest
import torch
from megatron.core.dist_checkpointing.validation import StrictHandling

from nemo.collections import llm
from nemo.collections.llm.modelopt.distill.utils import teacher_provider

MODULE = "nemo.collections.llm.modelopt.distill.utils"
PATH = "/fake/teacher"


def pieces(strict=True, keys=("module.decoder.weight",), model=None):
    """Return a configuration, a trainer and the model that the configuration builds."""
    config = MagicMock(spec=llm.GPTConfig)
    config.configure_model = Mock(return_value=MagicMock() if model is None else model)
    trainer = MagicMock()
    trainer.strategy.ckpt_load_strictness = strict
    trainer.strategy.checkpoint_io.load_checkpoint.return_value = {
        "state_dict": {key: torch.full((2, 2), float(place)) for place, key in enumerate(keys)}
    }
    return config, trainer, config.configure_model.return_value


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.full((2, 2), -1.0))
        self.b = torch.nn.Parameter(torch.full((2, 2), -1.0))
        self.asked = []

    def sharded_state_dict(self, prefix="", metadata=None):
        self.asked.append((prefix, metadata))
        return {f"{prefix}{name}": value for name, value in self.named_parameters()}


class TeacherCase:
    @pytest.fixture(autouse=True)
    def places(self):
        with patch(f"{MODULE}.torch.cuda.empty_cache") as self.empty_cache:
            yield


@pytest.mark.drop_in
class TestTeacher(TeacherCase):
    def test_the_model_is_the_configurations(self):
        config, trainer, model = pieces()
        assert teacher_provider(config, PATH, "tokenizer", trainer) is model
        config.configure_model.assert_called_once_with("tokenizer")

    @pytest.mark.parametrize("form", ["positional", "keywords"])
    def test_arguments_as_modelopt_passes_them(self, form):
        config, trainer, model = pieces()
        if form == "positional":
            assert teacher_provider(config, PATH, None, trainer) is model
        else:
            assert teacher_provider(config, PATH, tokenizer=None, trainer=trainer) is model

    def test_the_metadata_of_the_checkpoint(self):
        config, trainer, model = pieces()
        teacher_provider(config, PATH, None, trainer)
        load = trainer.strategy.unwrapped_checkpoint_io.load_content_metadata
        load.assert_called_once_with(PATH)
        model.sharded_state_dict.assert_called_once_with(prefix="module.", metadata=load.return_value)

    @pytest.mark.parametrize("strict", [True, False, None, StrictHandling.LOG_ALL, "raise_all"])
    def test_the_checkpoint_is_read(self, strict):
        config, trainer, model = pieces(strict)
        teacher_provider(config, PATH, None, trainer)
        trainer.strategy.checkpoint_io.load_checkpoint.assert_called_once_with(
            PATH, {"state_dict": model.sharded_state_dict.return_value}, strict=strict
        )

    @pytest.mark.parametrize(
        ("key", "loaded"),
        [
            ("module.decoder.weight", "decoder.weight"),
            ("module.module.decoder.weight", "decoder.weight"),
            ("decoder.weight", "decoder.weight"),
            ("module.embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
            ("module.output_layer._extra_state", "output_layer._extra_state"),
        ],
    )
    def test_names(self, key, loaded):
        config, trainer, model = pieces(keys=(key,))
        teacher_provider(config, PATH, None, trainer)
        (weights,), _ = model.load_state_dict.call_args
        assert list(weights) == [loaded]

    def test_values_are_passed_as_they_are(self):
        config, trainer, model = pieces()
        value = object()
        trainer.strategy.checkpoint_io.load_checkpoint.return_value = {"state_dict": {"module.x": value}}
        teacher_provider(config, PATH, None, trainer)
        assert model.load_state_dict.call_args.args[0] == {"x": value}

    def test_no_weights_at_all(self):
        config, trainer, model = pieces(keys=())
        assert teacher_provider(config, PATH, None, trainer) is model
        model.load_state_dict.assert_called_once_with({}, strict=True)

    def test_the_cache_is_emptied_once(self):
        config, trainer, model = pieces()
        model.load_state_dict.side_effect = lambda *_, **__: self.empty_cache.assert_not_called()
        teacher_provider(config, PATH, None, trainer)
        self.empty_cache.assert_called_once_with()

    def test_the_order_of_things(self):
        config, trainer, model = pieces()
        order = []
        config.configure_model.side_effect = lambda *_: order.append("build") or model
        io = trainer.strategy
        io.unwrapped_checkpoint_io.load_content_metadata.side_effect = lambda *_: order.append("metadata")
        model.sharded_state_dict.side_effect = lambda **_: order.append("shards") or {}
        io.checkpoint_io.load_checkpoint.side_effect = lambda *_, **__: order.append("read") or {"state_dict": {}}
        model.load_state_dict.side_effect = lambda *_, **__: order.append("load")
        teacher_provider(config, PATH, None, trainer)
        assert order == ["build", "metadata", "shards", "read", "load"]

    def test_what_is_logged(self):
        config, trainer, _ = pieces()
        with patch(f"{MODULE}.logging") as logging:
            teacher_provider(config, PATH, None, trainer)
        assert logging.info.call_args_list == [
            call("Distillation: Loading teacher weights..."),
            call("Distillation: teacher weights loaded."),
        ]

    @pytest.mark.parametrize("path", ["/fake/teacher", "nemo://teacher", MagicMock()])
    def test_paths_that_are_not_there(self, path):
        config, trainer, _ = pieces()
        teacher_provider(config, path, None, trainer)
        assert trainer.strategy.checkpoint_io.load_checkpoint.call_args.args[0] is path


@pytest.mark.drop_in
class TestStrictness(TeacherCase):
    @pytest.mark.parametrize("strict", [True, False, None])
    def test_flags_are_passed_on(self, strict):
        config, trainer, model = pieces(strict)
        with patch(f"{MODULE}.parse_strict_flag") as parse:
            teacher_provider(config, PATH, None, trainer)
        parse.assert_not_called()
        assert model.load_state_dict.call_args.kwargs == {"strict": strict}

    @pytest.mark.parametrize("as_text", [True, False])
    @pytest.mark.parametrize(
        ("handling", "flag"),
        [
            (StrictHandling.ASSUME_OK_UNEXPECTED, True),
            (StrictHandling.RAISE_UNEXPECTED, True),
            (StrictHandling.RAISE_ALL, True),
            (StrictHandling.LOG_UNEXPECTED, False),
            (StrictHandling.LOG_ALL, False),
            (StrictHandling.RETURN_UNEXPECTED, False),
            (StrictHandling.RETURN_ALL, False),
            (StrictHandling.IGNORE_ALL, False),
        ],
    )
    def test_megatrons_handling_becomes_a_flag(self, handling, flag, as_text):
        config, trainer, model = pieces(handling.value if as_text else handling)
        teacher_provider(config, PATH, None, trainer)
        assert model.load_state_dict.call_args.kwargs == {"strict": flag}

    @pytest.mark.parametrize(("parsed", "flag"), [(StrictHandling.RAISE_ALL, True), (StrictHandling.LOG_ALL, False)])
    def test_the_parser_can_be_replaced(self, parsed, flag):
        config, trainer, model = pieces("anything")
        with patch(f"{MODULE}.parse_strict_flag", return_value=parsed) as parse:
            teacher_provider(config, PATH, None, trainer)
        parse.assert_called_once_with("anything")
        assert model.load_state_dict.call_args.kwargs == {"strict": flag}

    @pytest.mark.parametrize("strict", ["lenient", "", 3])
    def test_what_megatron_does_not_know(self, strict):
        config, trainer, _ = pieces(strict)
        with pytest.raises(ValueError, match="^Invalid strict flag: "):
            teacher_provider(config, PATH, None, trainer)


@pytest.mark.drop_in
class TestNetworks(TeacherCase):
    @pytest.mark.parametrize("strict", [True, False, None, "assume_ok_unexpected", StrictHandling.LOG_ALL])
    def test_weights_are_loaded(self, strict):
        config, trainer, model = pieces(strict, ("module.a", "module.b"), Network())
        assert teacher_provider(config, PATH, None, trainer) is model
        assert model.a.tolist() == [[0.0] * 2] * 2 and model.b.tolist() == [[1.0] * 2] * 2

    def test_shards_are_asked_for_once(self):
        config, trainer, model = pieces(True, ("module.a", "module.b"), Network())
        teacher_provider(config, PATH, None, trainer)
        metadata = trainer.strategy.unwrapped_checkpoint_io.load_content_metadata.return_value
        assert model.asked == [("module.", metadata)]

    def test_unknown_weights_when_strict(self):
        config, trainer, _ = pieces(True, ("module.a", "module.b", "module.c"), Network())
        with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"c\""):
            teacher_provider(config, PATH, None, trainer)

    def test_missing_weights_when_strict(self):
        config, trainer, _ = pieces(True, ("module.a",), Network())
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"b\""):
            teacher_provider(config, PATH, None, trainer)

    @pytest.mark.parametrize("strict", [False, StrictHandling.LOG_ALL])
    def test_missing_weights_when_not_strict(self, strict):
        config, trainer, model = pieces(strict, ("module.a",), Network())
        teacher_provider(config, PATH, None, trainer)
        assert model.b.tolist() == [[-1.0] * 2] * 2

    def test_a_namespace_of_the_trainer(self):
        io = SimpleNamespace(
            load_content_metadata=lambda path: {"kind": "x"},
            load_checkpoint=lambda path, shards, strict: {"state_dict": dict(shards["state_dict"])},
        )
        strategy = SimpleNamespace(ckpt_load_strictness=None, unwrapped_checkpoint_io=io, checkpoint_io=io)
        model = Network()
        config = SimpleNamespace(configure_model=lambda tokenizer: model)
        assert teacher_provider(config, PATH, None, SimpleNamespace(strategy=strategy)) is model
        assert model.asked == [("module.", {"kind": "x"})]

    @pytest.mark.parametrize("spec", [torch.nn.Module, llm.GPTModel])
    @pytest.mark.parametrize("mock_class", [Mock, MagicMock])
    def test_mocks_of_networks(self, spec, mock_class):
        model = mock_class(spec=spec)
        model.sharded_state_dict = Mock(return_value={})
        config, trainer, _ = pieces(True, model=model)
        assert teacher_provider(config, PATH, None, trainer) is model
        model.load_state_dict.assert_called_once()

    def test_an_error_of_the_checkpoint_is_not_swallowed(self):
        config, trainer, model = pieces()
        trainer.strategy.checkpoint_io.load_checkpoint.side_effect = OSError("no checkpoint")
        with pytest.raises(OSError, match="^no checkpoint$"):
            teacher_provider(config, PATH, None, trainer)
        model.load_state_dict.assert_not_called()

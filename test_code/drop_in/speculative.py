"""``apply_speculative_decoding``, on stand-ins."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, patch

import pytest
import torch

from nemo.collections import llm
from nemo.collections.llm.modelopt.speculative import model_transform
from nemo.collections.llm.modelopt.speculative.model_transform import apply_speculative_decoding

MODULE = "nemo.collections.llm.modelopt.speculative.model_transform"


def core_of(**given):
    return SimpleNamespace(
        vocab_size=512,
        config=SimpleNamespace(
            **{
                "virtual_pipeline_model_parallel_size": None,
                "hidden_size": 64,
                "ffn_hidden_size": 128,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                **given,
            }
        ),
    )


@pytest.mark.drop_in
class TestSpeculativeDecoding:
    @pytest.fixture(autouse=True)
    def places(self):
        presets = copy.deepcopy(model_transform.ALGORITHMS)
        with (
            patch(f"{MODULE}.unwrap_model", return_value=core_of()) as self.unwrap,
            patch(f"{MODULE}.mto") as self.mto,
            patch(f"{MODULE}.mtsp.convert") as self.convert,
            patch.dict(model_transform.ALGORITHMS, presets),
        ):
            self.mto.modelopt_state.return_value = {"modelopt_state_dict": []}
            yield

    @pytest.mark.parametrize("model_class", [llm.GPTModel, llm.LlamaModel])
    @pytest.mark.parametrize("mock_class", [Mock, MagicMock])
    def test_the_model_is_converted_in_place(self, model_class, mock_class):
        model = mock_class(spec=model_class)
        assert apply_speculative_decoding(model) is model
        self.unwrap.assert_called_once_with(model)
        core, [(mode, _)] = self.convert.call_args.args
        assert core is self.unwrap.return_value and mode == "eagle"

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("hidden_size", 64),
            ("vocab_size", 512),
            ("draft_vocab_size", 512),
            ("intermediate_size", 128),
            ("num_attention_heads", 4),
            ("num_key_value_heads", 2),
        ],
    )
    def test_the_draft_has_the_models_sizes(self, name, value):
        apply_speculative_decoding(MagicMock(spec=llm.GPTModel), "eagle3")
        _, [(_, settings)] = self.convert.call_args.args
        assert settings["eagle_architecture_config"][name] == value

    def test_a_preset_without_an_architecture(self):
        with patch.dict(model_transform.ALGORITHMS, {"own": {"algorithm": "eagle", "config": {"a": 1}}}):
            apply_speculative_decoding(MagicMock(spec=llm.GPTModel), "own")
        assert self.convert.call_args.args[1] == [("eagle", {"a": 1})]

    @pytest.mark.parametrize("algorithm", ["eagle", "", None])
    def test_an_unknown_algorithm(self, algorithm):
        with pytest.raises(AssertionError, match=f"^Invalid algorithm: {algorithm}. "):
            apply_speculative_decoding(MagicMock(spec=llm.GPTModel), algorithm)

    @pytest.mark.parametrize("model", [object(), MagicMock(), torch.nn.Linear(2, 2)])
    def test_another_model(self, model):
        with pytest.raises(AssertionError, match="^Speculative Decoding currently only supported for GPT models"):
            apply_speculative_decoding(model)

    def test_a_core_without_a_configuration(self):
        self.unwrap.return_value = object()
        with pytest.raises(AssertionError, match=r"^Model must have a config attached\."):
            apply_speculative_decoding(MagicMock(spec=llm.GPTModel))

    @pytest.mark.parametrize("size", [1, 2])
    def test_virtual_stages(self, size):
        self.unwrap.return_value = core_of(virtual_pipeline_model_parallel_size=size)
        message = r"^Speculative decoding is incompatible with virtual pipeline parallelism\."
        with pytest.raises(ValueError, match=message):
            apply_speculative_decoding(MagicMock(spec=llm.GPTModel))
        self.convert.assert_not_called()

    def test_a_model_that_is_converted(self):
        self.mto.modelopt_state.return_value = {"modelopt_state_dict": [("quantize", {}), ("eagle", {})]}
        model = MagicMock(spec=llm.GPTModel)
        with patch(f"{MODULE}.logging") as logging:
            assert apply_speculative_decoding(model) is model
        logging.info.assert_called_once_with(
            "Model has already been transformed with Speculative Decoding. Skipping transformation."
        )
        self.convert.assert_not_called()

    def test_a_model_that_is_converted_otherwise(self):
        self.mto.modelopt_state.return_value = {"modelopt_state_dict": [("medusa", {})]}
        with pytest.raises(ValueError, match="^Model has already been transformed with Speculative Decoding, but"):
            apply_speculative_decoding(MagicMock(spec=llm.GPTModel))

    def test_other_modes_do_not_count(self):
        self.mto.modelopt_state.return_value = {"modelopt_state_dict": [("quantize", {})]}
        apply_speculative_decoding(MagicMock(spec=llm.GPTModel))
        self.convert.assert_called_once()

    def test_a_small_network(self):
        self.unwrap.return_value = torch.nn.Linear(2, 2)
        self.unwrap.return_value.config, self.unwrap.return_value.vocab_size = core_of().config, 512
        apply_speculative_decoding(MagicMock(spec=llm.GPTModel))
        self.convert.assert_called_once()

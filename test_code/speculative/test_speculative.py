"""Speculative decoding: draft heads are added once, errors come before the model is touched."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch

from test_code.drop_in.speculative import TestSpeculativeDecoding  # noqa: F401
from test_code.support import jobs_prune as jobs

MODULE = "nemo.collections.llm.modelopt.speculative.model_transform"


def medusa():
    """Add Medusa heads to a real model; return the number of heads, whether logits stay, and the errors that follow."""
    from nemo.collections.llm.modelopt.speculative import apply_speculative_decoding
    from test_code.support import tiny

    model, _, _ = jobs.build()
    before = jobs.logits(model)
    with torch.no_grad():
        assert apply_speculative_decoding(model, "medusa") is model
        apply_speculative_decoding(model, "medusa")
    errors = []
    try:
        apply_speculative_decoding(model, "eagle3")
    except ValueError as error:
        errors.append(str(error))
    return len(tiny.core(model).medusa_heads), torch.allclose(before, jobs.logits(model)), errors


def eagle_without_transformer_engine() -> str:
    from nemo.collections.llm.modelopt.speculative import apply_speculative_decoding

    model, _, _ = jobs.build()
    try:
        apply_speculative_decoding(model, "eagle3")
    except ValueError as error:
        return str(error)
    return "converted"


@pytest.fixture
def transform(cpu_backend):
    import nemo.collections.llm.modelopt.speculative.model_transform as module

    return module


@pytest.fixture
def stand_in(transform):
    """A mock that passes for a GPTModel, around a mock of Megatron's."""
    core = SimpleNamespace(
        vocab_size=512,
        config=SimpleNamespace(
            virtual_pipeline_model_parallel_size=None,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
        ),
    )
    with (
        patch(f"{MODULE}.unwrap_model", return_value=core),
        patch(f"{MODULE}.mto.modelopt_state", return_value={"modelopt_state_dict": []}) as state,
        patch(f"{MODULE}.mtsp.convert") as convert,
    ):
        yield SimpleNamespace(model=MagicMock(spec=transform.GPTModel), core=core, state=state, convert=convert)


def test_the_draft_takes_the_base_models_sizes_and_the_preset_stays(transform, stand_in):
    preset = copy.deepcopy(transform.ALGORITHMS["eagle3"])
    assert transform.apply_speculative_decoding(stand_in.model) is stand_in.model
    core, [(mode, settings)] = stand_in.convert.call_args.args
    assert core is stand_in.core
    assert mode == "eagle"
    draft = settings["eagle_architecture_config"]
    assert {name: draft[name] for name in ("hidden_size", "vocab_size", "draft_vocab_size", "intermediate_size")} == {
        "hidden_size": 64,
        "vocab_size": 512,
        "draft_vocab_size": 512,
        "intermediate_size": 128,
    }
    assert (draft["num_attention_heads"], draft["num_key_value_heads"]) == (4, 2)
    assert transform.ALGORITHMS["eagle3"] == preset


def test_a_transformed_model_is_left_alone(transform, stand_in):
    stand_in.state.return_value = {"modelopt_state_dict": [("eagle", {})]}
    assert transform.apply_speculative_decoding(stand_in.model) is stand_in.model
    stand_in.convert.assert_not_called()


def test_other_modes_of_modelopt_do_not_count(transform, stand_in):
    stand_in.state.return_value = {"modelopt_state_dict": [("quantize", {})]}
    transform.apply_speculative_decoding(stand_in.model)
    stand_in.convert.assert_called_once()


def test_another_method_is_refused(transform, stand_in):
    stand_in.state.return_value = {"modelopt_state_dict": [("medusa", {})]}
    with pytest.raises(ValueError, match="with a different mode: 'medusa', now 'eagle'"):
        transform.apply_speculative_decoding(stand_in.model)


def test_virtual_pipeline_stages_are_refused(transform, stand_in):
    stand_in.core.config.virtual_pipeline_model_parallel_size = 2
    with pytest.raises(ValueError, match="incompatible with virtual pipeline parallelism"):
        transform.apply_speculative_decoding(stand_in.model)


def test_a_model_without_config_is_refused(transform, stand_in):
    del stand_in.core.config
    with pytest.raises(AssertionError, match="must have a config attached"):
        transform.apply_speculative_decoding(stand_in.model)


@pytest.mark.parametrize(
    ("model", "algorithm", "message"),
    [
        (
            MagicMock(),
            "eagle",
            r"^Invalid algorithm: eagle. algorithm='eagle' is not supported; allowed.*eagle3.*Did you mean 'eagle3'",
        ),
        (MagicMock(), "eagle3", r"^Speculative Decoding currently only supported for GPT models. .*not a MagicMock"),
    ],
)
def test_refused(transform, model, algorithm, message):
    with pytest.raises(AssertionError, match=message):
        transform.apply_speculative_decoding(model, algorithm)


def test_an_algorithm_that_modelopt_lacks(transform):
    with (
        patch.dict(transform.ALGORITHMS, {"eagle3": None}),
        pytest.raises(ValueError, match="not in the installed modelopt; available: .*medusa"),
    ):
        transform.apply_speculative_decoding(MagicMock(spec=transform.GPTModel))


def test_medusa_heads_on_a_real_model(ranks):
    heads, same_logits, errors = ranks(1).run(medusa)[0]
    assert heads == 2
    assert same_logits
    assert "different mode: 'medusa'" in errors[0]


def test_eagle_without_transformer_engine_is_refused_clearly(ranks):
    message = ranks(1).run(eagle_without_transformer_engine)[0]
    assert "Transformer Engine" in message

"""`teacher_provider`: its calls, the formats of checkpoints, and its errors."""

from __future__ import annotations

import os
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.validation import StrictHandling

from nemo.collections.llm.modelopt import _saved_keys
from nemo.collections.llm.modelopt.distill import _teacher, utils
from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from test_code.drop_in.teacher import TestNetworks, TestStrictness, TestTeacher  # noqa: F401
from test_code.support import jobs_distill as jobs
from test_code.support import tiny

PATH = "/models/teacher"


# --- teacher and pipeline ---
def load_teacher(path, where="", after_fit=False):
    """Save a teacher on one rank each, load it with TP=2, and return (prefix in the file, differences, left random)."""
    from nemo.collections.llm.modelopt import _saved_keys
    from nemo.collections.llm.modelopt.distill.utils import teacher_provider

    own = os.path.join(jobs.teacher(path, after_fit), where)
    trainer = tiny.trainer(tp=2)
    holder = tiny.model(perform_initialization=False)
    trainer.strategy.connect(holder)
    trainer.strategy._lightning_module = holder
    trainer.strategy.trainer = trainer
    tiny.init_parallel(tp=2)
    config = tiny.config(tensor_model_parallel_size=2, perform_initialization=False)
    model = teacher_provider(config, own, tiny.tokenizer(), trainer)
    again = teacher_provider(tiny.config(tensor_model_parallel_size=2), own, tiny.tokenizer(), trainer)
    pairs = zip(model.named_parameters(), again.parameters(), strict=True)
    differences = {name: float((a - b).abs().max()) for (name, a), b in pairs}
    unset = [name for name, a in model.named_parameters() if not a.isfinite().all()]
    return _saved_keys.saved_prefix(_saved_keys.saved_keys(own)), differences, unset


def stand_ins(strict=True, keys=("module.decoder.weight",), model=None):
    """Return a configuration and a trainer that answer as NeMo's would, without any checkpoint."""
    model = mock.MagicMock() if model is None else model
    config = mock.MagicMock()
    config.configure_model.return_value = model
    trainer = mock.MagicMock()
    trainer.strategy.ckpt_load_strictness = strict
    trainer.strategy.checkpoint_io.load_checkpoint.return_value = {
        "state_dict": {key: torch.full((2,), float(i)) for i, key in enumerate(keys)}
    }
    return config, trainer, model


@pytest.fixture
def empty_cache():
    with mock.patch("torch.cuda.empty_cache") as empty:
        yield empty


def test_calls_in_order(empty_cache):
    config, trainer, model = stand_ins()
    result = utils.teacher_provider(config, PATH, "tokenizer", trainer)
    assert result is model
    config.configure_model.assert_called_once_with("tokenizer")
    trainer.strategy.unwrapped_checkpoint_io.load_content_metadata.assert_called_once_with(PATH)
    metadata = trainer.strategy.unwrapped_checkpoint_io.load_content_metadata.return_value
    model.sharded_state_dict.assert_called_once_with(prefix="module.", metadata=metadata)
    (path, request), kwargs = trainer.strategy.checkpoint_io.load_checkpoint.call_args
    assert path == PATH and request == {"state_dict": model.sharded_state_dict.return_value}
    assert kwargs == {"strict": True}
    empty_cache.assert_called_once_with()


@pytest.mark.parametrize(
    "saved, loaded",
    [
        ("module.decoder.weight", "decoder.weight"),
        ("module.module.decoder.weight", "decoder.weight"),
        ("decoder.weight", "decoder.weight"),
        # Inside a key the word belongs to the model.
        ("module.decoder.submodule.weight", "decoder.submodule.weight"),
        ("module.vision.module.weight", "vision.module.weight"),
    ],
)
def test_module_is_stripped_as_a_prefix_only(empty_cache, saved, loaded):
    config, trainer, model = stand_ins(keys=(saved,))
    utils.teacher_provider(config, PATH, None, trainer)
    assert list(model.load_state_dict.call_args.args[0]) == [loaded]


@pytest.mark.parametrize(
    "strict, flag",
    [
        (True, True),
        (False, False),
        (None, None),
        ("log_all", False),
        ("assume_ok_unexpected", True),
        ("raise_all", True),
        (StrictHandling.RAISE_UNEXPECTED, True),
        (StrictHandling.LOG_UNEXPECTED, False),
        (StrictHandling.IGNORE_ALL, False),
    ],
)
def test_every_strictness(empty_cache, strict, flag):
    config, trainer, model = stand_ins(strict)
    utils.teacher_provider(config, PATH, None, trainer)
    assert trainer.strategy.checkpoint_io.load_checkpoint.call_args.kwargs["strict"] == strict
    assert model.load_state_dict.call_args.kwargs == {"strict": flag}


@pytest.mark.parametrize("strict", ["lenient", 3, "STRICT"])
def test_unknown_strictness_is_refused_before_the_model_is_built(empty_cache, strict):
    config, trainer, _ = stand_ins(strict)
    with pytest.raises(ModelOptConfigError, match="ckpt_load_strictness=.*allowed.*log_all"):
        utils.teacher_provider(config, PATH, None, trainer)
    config.configure_model.assert_not_called()


class Teacher(torch.nn.Module):
    """Two weights and, optionally, the extra state of Transformer Engine's layers."""

    def __init__(self, extra=False):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.full((2,), -1.0)) for _ in range(2))
        if extra:
            self.norm = WithExtraState()

    def sharded_state_dict(self, prefix, metadata):
        return {prefix + key: SimpleNamespace(key=prefix + key) for key in self.state_dict()}


class WithExtraState(torch.nn.Module):
    def get_extra_state(self):
        return torch.zeros(1)

    def set_extra_state(self, state):
        self.state = state


@pytest.mark.parametrize("strict", [True, None, "assume_ok_unexpected"])
@pytest.mark.parametrize("extra", [False, True])
def test_extra_state_may_be_missing(empty_cache, strict, extra):
    config, trainer, model = stand_ins(strict, ("module.a", "module.b"), Teacher(extra))
    utils.teacher_provider(config, PATH, None, trainer)
    assert model.a.tolist() == [0.0, 0.0] and model.b.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("strict", [None, "assume_ok_unexpected"])
def test_missing_weights_never_stay_random(empty_cache, strict):
    config, trainer, _ = stand_ins(strict, ("module.a",), Teacher(extra=True))
    with pytest.raises(ModelOptConfigError, match=r"1 weights are missing \(first \['b'\]\)"):
        utils.teacher_provider(config, PATH, None, trainer)


def test_missing_weights_are_let_pass_where_asked(empty_cache):
    config, trainer, model = stand_ins(False, ("module.a",), Teacher())
    utils.teacher_provider(config, PATH, None, trainer)
    assert model.a.tolist() == [0.0, 0.0] and model.b.tolist() == [-1.0, -1.0]


def test_what_loading_took_is_released(empty_cache):
    loaded = []

    def load_checkpoint(path, request, strict):
        weights = {f"module.{name}": torch.zeros(2) for name in "ab"}
        loaded.extend(weakref.ref(weight) for weight in weights.values())
        return {"state_dict": weights}

    io = SimpleNamespace(load_content_metadata=lambda path: {}, load_checkpoint=load_checkpoint)
    strategy = SimpleNamespace(ckpt_load_strictness=None, unwrapped_checkpoint_io=io, checkpoint_io=io)
    config = SimpleNamespace(configure_model=lambda tokenizer: Teacher())
    empty_cache.side_effect = lambda: loaded.append([reference() for reference in loaded])
    utils.teacher_provider(config, PATH, None, SimpleNamespace(strategy=strategy))
    # They are gone when the allocator's cache is emptied.
    assert loaded[-1] == [None, None]


@pytest.mark.parametrize(
    "keys, prefix",
    [
        ([], "module."),
        (["module.decoder.a", "optimizer.state.module.module.a"], "module."),
        (["module.module.decoder.a", "module.module.b", "optimizer.state.x"], "module.module."),
        (["decoder.a", "embedding.b"], ""),
    ],
)
def test_prefix_is_read_from_the_checkpoint(keys, prefix):
    assert _saved_keys.saved_prefix(keys) == prefix


def config_of(**kwargs):
    base = {
        "num_layers": 4,
        "pipeline_model_parallel_size": 1,
        "tensor_model_parallel_size": 1,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "recompute_granularity": None,
        "params_dtype": torch.float32,
        "expert_model_parallel_size": 1,
    }
    return SimpleNamespace(**{**base, **kwargs})


def test_the_teacher_follows_the_student():
    student = config_of(
        tensor_model_parallel_size=4,
        expert_model_parallel_size=2,
        params_dtype=torch.bfloat16,
        num_layers_in_first_pipeline_stage=1,
        pipeline_model_parallel_size=2,
    )
    teacher = config_of(recompute_granularity="full", num_layers=4)
    derived = _teacher.derive_teacher_config(student, teacher)
    assert derived.tensor_model_parallel_size == 4 and derived.expert_model_parallel_size == 2
    assert derived.params_dtype is torch.bfloat16 and derived.recompute_granularity is None
    # Equally deep: split as the student.
    assert derived.num_layers_in_first_pipeline_stage == 1
    # The user's own configuration is left as it was.
    assert teacher.tensor_model_parallel_size == 1 and teacher.recompute_granularity == "full"


@pytest.mark.parametrize(
    "layers, stages, first, last",
    [(8, 2, None, None), (7, 2, 3, 4), (10, 4, 3, 3), (9, 4, 2, 3), (5, 3, 2, 2)],
)
def test_uneven_teachers_are_split(layers, stages, first, last):
    student = config_of(num_layers=4, pipeline_model_parallel_size=stages)
    derived = _teacher.derive_teacher_config(student, config_of(num_layers=layers))
    assert (derived.num_layers_in_first_pipeline_stage, derived.num_layers_in_last_pipeline_stage) == (first, last)
    if first:
        assert (layers - first - last) == (stages - 2) * (layers // stages)


def test_too_few_layers_for_the_pipeline_are_refused():
    with pytest.raises(ModelOptConfigError, match="teacher's 3 layers.*pipeline_model_parallel_size=4"):
        _teacher.derive_teacher_config(config_of(num_layers=8, pipeline_model_parallel_size=4), config_of(num_layers=3))


@pytest.mark.parametrize("after_fit", [False, True])
@pytest.mark.parametrize("where", ["", "weights"])
def test_real_checkpoints(ranks, tmp_path, after_fit, where):
    results = ranks(2).run(load_teacher, str(tmp_path / "teacher"), where, after_fit)
    for prefix, differences, frozen_random in results:
        assert prefix == ("module.module." if after_fit else "module.")
        assert max(differences.values()) == 0.0 and len(differences) > 10
        assert not frozen_random

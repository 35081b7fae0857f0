"""`adjust_distillation_model_for_mcore` and the settings of a distillation, on stand-ins and on real tensors."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from nemo.collections.llm.modelopt.distill import _config, utils
from nemo.collections.llm.modelopt.distill.utils import DistillationConfig, load_distillation_config
from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from test_code.drop_in.distill_adjust import (  # noqa: F401
    TestForward,
    TestInputs,
    TestLanguageModelLoss,
    TestShardedStateDict,
    TestState,
)
from test_code.drop_in.distill_config import (  # noqa: F401
    TestDistillationConfig,
    TestLayerNames,
    TestLoad,
    TestLoadForReal,
    TestLoadInAPipeline,
)
from test_code.drop_in.distill_model import (  # noqa: F401
    TestBalancer,
    TestDistillationModel,
    TestDistillationModelForReal,
    TestLosses,
    TestProjection,
    TestReduction,
)


class Core(torch.nn.Module):
    """A model with the methods of Megatron's that distillation adapts."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.received = None

    def sharded_state_dict(self, prefix=""):
        return {prefix + name: value for name, value in self.state_dict().items()}

    def compute_language_model_loss(self, labels, logits):
        logits -= 1.0  # as Megatron's cross entropy does
        return torch.ones_like(labels, dtype=logits.dtype)

    def set_input_tensor(self, tensors):
        self.received = tensors

    def forward(self, x):
        return self.linear(x)


class Distilled(Core):
    """What ``mtd.convert`` makes of it, as far as the adaptation looks."""

    def __init__(self):
        super().__init__()
        self._teacher_model = Core()
        self._layers_to_loss = {(self.linear, self._teacher_model.linear): None}
        self.linear._intermediate_output = self._teacher_model.linear._intermediate_output = None
        self.linear.register_forward_hook(capture)
        self._teacher_model.linear.register_forward_hook(capture)
        self.student_only = False

    @property
    def teacher_model(self):
        return self._teacher_model

    @contextlib.contextmanager
    def hide_teacher_model(self):
        teacher, self._teacher_model = self._teacher_model, torch.nn.Module()
        yield
        self._teacher_model = teacher

    @contextlib.contextmanager
    def only_student_forward(self):
        self.student_only = True
        yield
        self.student_only = False

    def forward(self, x):
        assert self.student_only, "modelopt would run the teacher once more"
        return super().forward(x)


def capture(module, inputs, output):
    module._intermediate_output = output


def adjusted(skip_lm_loss=True, last_stage=True, state=(("kd_loss", {}),)):
    model = Distilled()
    with mock.patch.object(utils.mto, "ModeloptStateManager") as manager:
        manager.return_value.state_dict.return_value = list(state)
        utils.adjust_distillation_model_for_mcore(model, DistillationConfig(skip_lm_loss=skip_lm_loss))
        manager.remove_state.assert_called_once_with(model)
    return model


@pytest.fixture
def stage():
    """Whether this is the last pipeline stage."""
    with mock.patch.object(utils, "parallel_state") as state:
        state.is_pipeline_last_stage.return_value = True
        state.get_pipeline_model_parallel_rank.return_value = 0
        yield state.is_pipeline_last_stage


@pytest.mark.parametrize("state", [(), (("quantize", {}),), (("quantize", {}), ("kd_loss", {}))])
def test_another_modelopt_state_is_refused(state):
    with pytest.raises(ModelOptConfigError, match="expected \\['kd_loss'\\] alone"):
        adjusted(state=state)
    with pytest.raises(AssertionError):  # what stock raised
        adjusted(state=state)


def test_checkpoints_hold_the_student_alone():
    model = adjusted()
    assert set(model.sharded_state_dict(prefix="module.")) == {"module.linear.weight", "module.linear.bias"}
    assert isinstance(model.teacher_model, Core)


@pytest.mark.parametrize(
    "skip, training, computed", [(True, True, 0.0), (True, False, 1.0), (False, True, 1.0), (False, False, 1.0)]
)
def test_lm_loss_is_skipped_in_training_where_configured(skip, training, computed):
    model = adjusted(skip).train(training)
    loss = model.compute_language_model_loss(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3, 2, 8))
    assert loss.shape == (2, 3) and (loss == computed).all() and loss.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_lm_loss_is_always_skipped_for_the_teacher(skip, training):
    model = adjusted(skip).train(training)
    logits = torch.zeros(3, 2, 8, dtype=torch.bfloat16)
    loss = model.teacher_model.compute_language_model_loss(torch.zeros(2, 3, dtype=torch.long), logits)
    assert loss.dtype == torch.bfloat16 and (loss == 0).all() and (logits == 0).all()


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None)])
def test_the_cross_entropy_cannot_overwrite_captured_logits(wrap):
    model = adjusted(skip_lm_loss=False)
    logits = torch.zeros(3, 2, 8, requires_grad=True) + 0.0
    model.linear._intermediate_output = wrap(logits)
    model.compute_language_model_loss(torch.zeros(2, 3, dtype=torch.long), logits)
    kept = model.linear._intermediate_output
    kept = kept[0] if isinstance(kept, tuple) else kept
    assert (logits == -1).all() and (kept == 0).all() and kept.requires_grad


def test_training_runs_both_and_freezes_the_teacher(stage):
    model = adjusted().train()
    x = torch.randn(4, 3)
    out = model.forward(x)
    torch.testing.assert_close(out, model.linear(x))
    assert not model.teacher_model.training and model.training
    assert not model.teacher_model.linear._intermediate_output.requires_grad
    out.sum().backward()
    assert model.linear.weight.grad is not None and model.teacher_model.linear.weight.grad is None


def test_stages_before_the_last_send_both_outputs(stage):
    stage.return_value = False
    model = adjusted().train()
    x = torch.randn(4, 3)
    out = model.forward(x)
    torch.testing.assert_close(out, torch.cat([model.linear(x), model.teacher_model.linear(x)], -1))


@pytest.mark.parametrize("last", [True, False])
def test_evaluation_runs_the_student_alone_and_keeps_nothing(stage, last):
    stage.return_value = last
    model = adjusted().eval()
    assert model.forward(torch.randn(4, 3)).shape == (4, 3)
    assert model.linear._intermediate_output is None
    assert model.teacher_model.linear._intermediate_output is None


def test_messages_are_split_between_the_models():
    model = adjusted()
    model.set_student_input_tensor_shape([(4, 2, 5)])
    joined = torch.randn(4, 2, 12)
    model.set_input_tensor([joined])
    torch.testing.assert_close(model.received[0], joined[..., :5])
    torch.testing.assert_close(model.teacher_model.received[0], joined[..., 5:])
    model.set_input_tensor([None])
    assert model.received == [None] and model.teacher_model.received == [None]


def test_before_the_first_training_step_messages_are_the_students():
    model = adjusted()
    alone = torch.randn(4, 2, 5)
    model.set_input_tensor([alone])
    torch.testing.assert_close(model.received[0], alone)
    assert model.teacher_model.received[0].numel() == 0


# --- settings ---


def model_config(**overrides):
    base = {
        "num_layers": 12,
        "hidden_size": 8,
        "pipeline_model_parallel_size": 1,
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
        "recompute_granularity": None,
        "init_method": torch.nn.init.normal_,
    }
    return SimpleNamespace(**{**base, **overrides})


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "kd.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def one_rank(stage):
    stage.return_value = True
    with mock.patch.object(utils.TransformerLayer, "_get_layer_offset", side_effect=lambda config: 0):
        yield


def test_defaults_distil_the_logits(one_rank):
    config = load_distillation_config(None, model_config(), model_config())
    assert list(config.criterion) == [("output_layer", "output_layer")]
    assert config.skip_lm_loss and isinstance(config.loss_balancer, utils.LogitsAndIntermediatesLossBalancer)


def test_everything_is_reachable_from_yaml(one_rank, write):
    path = write(
        """
        logit_layers: [output_layer, output_layer]
        intermediate_layer_pairs:
          - [decoder.layers.1.input_layernorm, decoder.layers.11.input_layernorm]
          - [decoder.layers.11, decoder.layers.11, mse]
        skip_lm_loss: false
        kd_loss_scale: 1e-1
        logit_kl_temperature: 2
        logit_kl_direction: reverse
        logit_kl_temperature_squared: false
        """
    )
    config = load_distillation_config(path, model_config(), model_config(hidden_size=16))
    logits, cosine, mse = config.criterion.values()
    assert (logits._temperature, logits._direction, logits._factor) == (2.0, "reverse", 1.0)
    assert type(cosine).__name__ == "HiddenStateCosineLoss" and type(mse).__name__ == "MSELoss"
    assert cosine._projection is mse._projection and cosine._projection._fit.weight.shape == (16, 8)
    assert config.loss_balancer._kd_loss_scale == 0.1 and not config.loss_balancer._skip_original_loss


def test_the_newer_objectives_are_reachable_from_yaml(one_rank, write):
    path = write(
        """
        skip_lm_loss: false
        logit_kl_direction: jsd
        logit_kl_beta: 1e-1
        logit_kl_topk: 20
        loss_weights: {kd_logits: 0.5, lm: 2}
        """
    )
    config = load_distillation_config(path, model_config(), model_config())
    (logits,) = config.criterion.values()
    assert (logits._direction, logits._beta, logits._topk, logits._in_place) == ("jsd", 0.1, 20, False)
    parts = {"LogitsKLLoss_0": torch.tensor(3.0), "MSELoss_1": torch.tensor(5.0), "student_loss": torch.tensor(7.0)}
    assert config.loss_balancer(parts)["kd_loss"].item() == 0.5 * 3 + 5 + 2 * 7
    in_place = load_distillation_config(write("logit_kl_in_place: true"), model_config(), model_config())
    assert next(iter(in_place.criterion.values()))._in_place


def test_earlier_stages_have_no_losses(stage):
    stage.return_value = False
    config = load_distillation_config(
        None, model_config(pipeline_model_parallel_size=2), model_config(pipeline_model_parallel_size=2)
    )
    assert config.criterion == {}


@pytest.mark.parametrize(
    "text, match",
    [
        ("logit_layers: [output_layer]", "logit_layers=.*must hold 2 names"),
        ("logit_layers: output_layer", "^self.logit_layers='output_layer': .* must hold 2"),
        ("intermediate_layer_pairs: [[a]]", "intermediate_layer_pairs=.*2 or 3 names"),
        ("intermediate_layer_pairs: decoder", "must be a list"),
        ("intermediate_layer_pairs: [[a, b, huber]]", "huber.*not supported.*cosine"),
        ("intermediate_layer_pairs: [[a, 3]]", "must hold"),
        ("intermediate_layer_pairs: [[a, b], [a, b]]", "more than once"),
        ("intermediate_layer_pairs: [[output_layer, output_layer]]", "more than once"),
        ("kd_loss_scale: 0", "kd_loss_scale=0 must be a positive number"),
        ("kd_loss_scale: -1.0", "kd_loss_scale=-1.0"),
        ("kd_loss_scale: much", "kd_loss_scale='much'"),
        ("kd_loss_scale: true", "kd_loss_scale=True"),
        ("logit_kl_temperature: 0", "logit_kl_temperature=0"),
        ("logit_kl_temperature: .inf", "logit_kl_temperature=inf"),
        ("logit_kl_direction: backward", "logit_kl_direction='backward'"),
        ("logit_kl_direction: jsd\nlogit_kl_beta: 1.5", "logit_kl_beta=1.5 must be a number between 0 and 1"),
        ("logit_kl_direction: jsd\nlogit_kl_beta: half", "logit_kl_beta='half' must be a number"),
        ("logit_kl_direction: jsd\nlogit_kl_beta: true", "logit_kl_beta=True must be a number"),
        ("logit_kl_beta: 0.5", "logit_kl_beta=0.5 belongs to logit_kl_direction='jsd'.*'forward'"),
        ("logit_kl_topk: 0", "logit_kl_topk=0 must be a positive integer"),
        ("logit_kl_topk: 2.5", "logit_kl_topk=2.5 must be"),
        ("logit_kl_topk: true", "logit_kl_topk=True must be"),
        ("logit_kl_in_place: true\nskip_lm_loss: false", "overwrites the logits"),
        ("loss_weights: [1, 2]", r"loss_weights=\[1, 2\] must map some of"),
        ("loss_weights: {logits: 1}", "loss_weights=.*'kd_logits', 'intermediate', 'lm'"),
        ("loss_weights: {kd_logits: -1}", r"loss_weights\['kd_logits'\]=-1 must be a positive number"),
        ("loss_weights: {kd_logits: much}", r"loss_weights\['kd_logits'\]='much'"),
        ("loss_weights: {lm: 1}", "skip_lm_loss is true, which leaves it out"),
        ("loss_weights: {kd_logits: 1}\nkd_loss_scale: 2", "set only one of them"),
        ("skip_lm_loss: 'no'", "skip_lm_loss='no' must be true or false"),
        ("skip_lm_los: true", "no setting 'skip_lm_los'.*Did you mean 'skip_lm_loss'"),
        ("- a\n- b", "holds a list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_settings_are_refused(write, text, match):
    with pytest.raises(ModelOptConfigError, match=match):
        _config.read_distillation_config(write(text))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ModelOptConfigError, match="kd.yaml' is not a file"):
        _config.read_distillation_config(tmp_path / "kd.yaml")


def test_an_empty_file_means_the_defaults(write):
    assert _config.read_distillation_config(write("")) == DistillationConfig()


@pytest.mark.parametrize(
    "name, offset, renamed",
    [
        ("decoder.layers.11.input_layernorm", 10, "decoder.layers.1.input_layernorm"),
        ("decoder.layers.11", 10, "decoder.layers.1"),
        ("decoder.layers.1.mlp.experts.1.linear_fc1", 1, "decoder.layers.0.mlp.experts.1.linear_fc1"),
        # The number alone is exchanged, not other digits like it.
        ("decoder.layers.1.linear_fc1", 1, "decoder.layers.0.linear_fc1"),
        ("decoder.layers.12.mlp.linear_fc12", 8, "decoder.layers.4.mlp.linear_fc12"),
        ("output_layer", 10, "output_layer"),
        ("decoder.final_layernorm", 10, "decoder.final_layernorm"),
    ],
)
def test_layers_are_renamed_by_position(name, offset, renamed):
    with mock.patch.object(utils.TransformerLayer, "_get_layer_offset", return_value=offset):
        assert utils._adjust_layer_index_for_pp(name, None) == renamed


def test_a_layer_of_an_earlier_stage_cannot_be_renamed():
    with (
        mock.patch.object(utils.TransformerLayer, "_get_layer_offset", return_value=6),
        pytest.raises(
            ModelOptConfigError, match="decoder.layers.5.mlp does not fall on final PP rank. It is not on this stage"
        ),
    ):
        utils._adjust_layer_index_for_pp("decoder.layers.5.mlp", None)


@pytest.mark.parametrize("index, ok", [(5, False), (6, True), (11, True), (12, False)])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_stages_are_checked_on_every_rank(stage, index, ok, whose):
    stage.return_value = False
    names = [f"decoder.layers.{i}.mlp" for i in ((index, 6) if whose == "student" else (6, index))]
    config = DistillationConfig(intermediate_layer_pairs=[tuple(names)])
    models = [model_config(pipeline_model_parallel_size=2) for _ in range(2)]
    if ok:
        load_distillation_config(config, *models)
    else:
        with pytest.raises(ModelOptConfigError, match="does not (exist|fall on one)"):
            load_distillation_config(config, *models)


def test_pairs_live_on_the_stage_of_their_layers(stage):
    stage.return_value = False
    pairs = [("decoder.layers.2", "decoder.layers.4", "mse"), ("decoder.final_layernorm", "decoder.final_layernorm")]
    config = DistillationConfig(intermediate_layer_pairs=pairs)
    models = [model_config(pipeline_model_parallel_size=2) for _ in range(2)]
    with mock.patch.object(utils.TransformerLayer, "_get_layer_offset", side_effect=lambda config: 0):
        criterion = load_distillation_config(config, *models).criterion
    assert [(*pair, type(loss).__name__) for pair, loss in criterion.items()] == [
        ("decoder.layers.2", "decoder.layers.4", "MSELoss")
    ]
    assert _config.pairs_of_stages(config, models[0]) == [0]


@pytest.mark.parametrize(
    "overrides, first",
    [
        ({}, [0, 3, 6, 9]),
        ({"num_layers_in_last_pipeline_stage": 3}, [0, 3, 6, 9]),
        ({"num_layers_in_first_pipeline_stage": 6}, [0, 6, 8, 10]),
        ({"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 5}, [0, 1, 4, 7]),
        ({"account_for_loss_in_pipeline_split": True, "num_layers": 11}, [0, 3, 6, 9]),
        ({"account_for_embedding_in_pipeline_split": True, "num_layers": 11}, [0, 2, 5, 8]),
        ({"pipeline_model_parallel_size": 1}, [0]),
        ({"pipeline_model_parallel_layout": object()}, None),
    ],
)
def test_first_layers_of_the_stages(overrides, first):
    config = model_config(**{"pipeline_model_parallel_size": 4, **overrides})
    assert _config.first_layers(config) == first


@pytest.mark.parametrize(
    "layer, recompute, refused",
    [
        ("decoder.layers.3", {"recompute_granularity": "full", "recompute_method": "uniform"}, "full"),
        ("decoder.layers.3.mlp", {"recompute_granularity": "full", "recompute_method": "uniform"}, "full"),
        ("decoder.final_layernorm", {"recompute_granularity": "full", "recompute_method": "uniform"}, None),
        (
            "decoder.layers.3",
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 4},
            "full",
        ),
        (
            "decoder.layers.4",
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 4},
            None,
        ),
        ("decoder.layers.4.mlp", {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, "'mlp'"),
        ("decoder.layers.4", {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, None),
        (
            "decoder.layers.4.input_layernorm",
            {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
            "'layernorm'",
        ),
        (
            "decoder.layers.4.self_attention.core_attention",
            {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
            "'core_attn'",
        ),
        ("decoder.layers.4", {}, None),
    ],
)
def test_pairs_inside_of_recomputation_are_refused(stage, layer, recompute, refused):
    config = DistillationConfig(intermediate_layer_pairs=[(layer, "decoder.layers.2")])
    student = model_config(**recompute)
    if refused is None:
        _config.check_models(config, student, model_config())
    else:
        with pytest.raises(ModelOptConfigError, match=f"pair \\('{layer}'.*cannot be trained.*{refused}"):
            _config.check_models(config, student, model_config())

"""``adjust_distillation_model_for_mcore``, on stand-ins."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, patch

import pytest
import torch

from nemo.collections.llm.modelopt.distill.utils import DistillationConfig, adjust_distillation_model_for_mcore

MODULE = "nemo.collections.llm.modelopt.distill.utils"


class Teacher:
    """A teacher of which only two things are used."""

    def __init__(self):
        self.eval = Mock()
        self.received = None

    def __call__(self, *args, **kwargs):
        self.called = args, kwargs
        return torch.full((2, 1, 3), 2.0, requires_grad=False)


class Plain:
    """A student that is no network, with what stock reads."""

    training = True

    def __init__(self):
        self._teacher_model = self.teacher_model = Teacher()
        self.hidden = self.alone = False
        self.events = []

    @contextlib.contextmanager
    def hide_teacher_model(self):
        self.hidden = True
        yield
        self.hidden = False

    @contextlib.contextmanager
    def only_student_forward(self):
        self.alone = True
        yield
        self.alone = False

    def sharded_state_dict(self, *args, **kwargs):
        return {"hidden": self.hidden, "args": args, "kwargs": kwargs}

    def compute_language_model_loss(self, labels, logits):
        return "student loss", labels, logits

    def set_input_tensor(self, tensors):
        self.received = tensors

    def forward(self, *args, **kwargs):
        assert self.alone
        self.called = args, kwargs
        return torch.ones(2, 1, 4)


class Network(torch.nn.Module):
    """The same as a network."""

    def __init__(self):
        super().__init__()
        self._teacher_model = torch.nn.Linear(3, 3)
        self.linear = torch.nn.Linear(3, 5)
        self.received = []

    @property
    def teacher_model(self):
        return self._teacher_model

    @contextlib.contextmanager
    def hide_teacher_model(self):
        yield

    @contextlib.contextmanager
    def only_student_forward(self):
        yield

    def sharded_state_dict(self, prefix=""):
        return {prefix + "x": 1}

    def compute_language_model_loss(self, labels, logits):
        return torch.ones_like(labels, dtype=logits.dtype)

    def set_input_tensor(self, tensors):
        self.received = tensors

    def forward(self, x):
        return self.linear(x)


SETTINGS = {
    "namespace": SimpleNamespace(skip_lm_loss=True),
    "mock": Mock(skip_lm_loss=True),
    "magic": MagicMock(skip_lm_loss=True),
    "config": DistillationConfig(),
}


class AdjustCase:
    @pytest.fixture(autouse=True)
    def places(self):
        with patch(f"{MODULE}.mto") as self.mto, patch(f"{MODULE}.parallel_state") as self.state:
            self.manager = self.mto.ModeloptStateManager
            self.manager.return_value.state_dict.return_value = [("kd_loss", {})]
            self.state.is_pipeline_last_stage.return_value = True
            yield

    def adjusted(self, model=None, **settings):
        model = Plain() if model is None else model
        adjust_distillation_model_for_mcore(model, SimpleNamespace(**{"skip_lm_loss": True, **settings}))
        return model


@pytest.mark.drop_in
class TestState(AdjustCase):
    @pytest.mark.parametrize("kind", SETTINGS)
    @pytest.mark.parametrize("model_class", [Plain, Network, MagicMock, Mock])
    def test_modelopts_state_goes(self, model_class, kind):
        model = model_class()
        assert adjust_distillation_model_for_mcore(model, SETTINGS[kind]) is None
        self.manager.assert_called_once_with(model)
        self.manager.remove_state.assert_called_once_with(model)

    @pytest.mark.parametrize(
        "state", [[], [("quantize", {})], [("kd_loss", {}), ("quantize", {})], [("kd_loss", {}), ("kd_loss", {})]]
    )
    def test_other_states(self, state):
        self.manager.return_value.state_dict.return_value = state
        with pytest.raises(AssertionError, match="^existing_state="):
            self.adjusted()
        self.manager.remove_state.assert_not_called()

    def test_the_class_is_left_alone(self):
        own = Plain.forward
        model = self.adjusted()
        assert Plain.forward is own
        assert model.forward.__self__ is model

    @pytest.mark.parametrize(
        "name",
        [
            "sharded_state_dict",
            "compute_language_model_loss",
            "set_student_input_tensor_shape",
            "set_input_tensor",
            "forward",
        ],
    )
    @pytest.mark.parametrize("model_class", [Plain, Network, MagicMock, Mock])
    def test_methods_are_bound_to_the_model(self, model_class, name):
        model = self.adjusted(model_class())
        assert getattr(model, name).__self__ is model

    @pytest.mark.parametrize("model_class", [Plain, Network, MagicMock])
    def test_the_teachers_method_is_bound_to_the_teacher(self, model_class):
        model = self.adjusted(model_class())
        assert model.teacher_model.compute_language_model_loss.__self__ is model.teacher_model


@pytest.mark.drop_in
class TestShardedStateDict(AdjustCase):
    def test_the_teacher_is_hidden(self):
        model = self.adjusted()
        found = model.sharded_state_dict("module.", metadata={"a": 1})
        assert found == {"hidden": True, "args": ("module.",), "kwargs": {"metadata": {"a": 1}}}
        assert not model.hidden

    def test_of_a_network(self):
        assert self.adjusted(Network()).sharded_state_dict(prefix="p.") == {"p.x": 1}


@pytest.mark.drop_in
class TestLanguageModelLoss(AdjustCase):
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_skipped_in_training(self, dtype):
        labels, logits = torch.ones(2, 3, dtype=torch.long), torch.ones(3, 2, 7, dtype=dtype)
        loss = self.adjusted().compute_language_model_loss(labels, logits)
        assert loss.shape == (2, 3) and loss.dtype is dtype and not loss.any()

    def test_computed_in_evaluation(self):
        model = self.adjusted()
        model.training = False
        assert model.compute_language_model_loss("labels", "logits") == ("student loss", "labels", "logits")

    @pytest.mark.parametrize("training", [True, False])
    def test_computed_when_wanted(self, training):
        model = self.adjusted(skip_lm_loss=False)
        model.training = training
        assert model.compute_language_model_loss("labels", "logits") == ("student loss", "labels", "logits")

    def test_computed_when_wanted_whatever_the_mode(self):
        class Modeless(Plain):
            training = property(lambda self: (_ for _ in ()).throw(AttributeError("training")))

        model = self.adjusted(Modeless(), skip_lm_loss=False)
        assert model.compute_language_model_loss(1, 2) == ("student loss", 1, 2)

    def test_the_setting_is_read_when_the_loss_is_computed(self):
        model, settings = Plain(), SimpleNamespace(skip_lm_loss=True)
        adjust_distillation_model_for_mcore(model, settings)
        settings.skip_lm_loss = False
        assert model.compute_language_model_loss(1, 2) == ("student loss", 1, 2)

    @pytest.mark.parametrize("skip", [True, False])
    @pytest.mark.parametrize("mode", [True, False])
    def test_of_a_network(self, skip, mode):
        model = self.adjusted(Network(), skip_lm_loss=skip).train(mode)
        loss = model.compute_language_model_loss(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3, 2, 4))
        assert bool((loss == 0).all()) is (skip and mode)

    @pytest.mark.parametrize("skip", [True, False])
    @pytest.mark.parametrize("mode", [True, False])
    def test_always_skipped_for_the_teacher(self, skip, mode):
        model = self.adjusted(Network(), skip_lm_loss=skip).train(mode)
        labels, logits = torch.ones(2, 3, dtype=torch.long), torch.ones(3, 2, 4, dtype=torch.bfloat16)
        loss = model.teacher_model.compute_language_model_loss(labels, logits)
        assert loss.dtype is torch.bfloat16 and loss.shape == (2, 3) and not loss.any()


@pytest.mark.drop_in
class TestInputs(AdjustCase):
    def test_the_students_width_is_remembered(self):
        model = self.adjusted()
        model.set_student_input_tensor_shape([(4, 2, 6), (1, 1, 1)])
        assert model._tensor_split_idx == 6

    @pytest.mark.parametrize("width", [1, 3, 4])
    def test_each_model_gets_its_part(self, width):
        class Received(Plain):
            def set_input_tensor(self, tensors):
                self.received = tensors

        model, whole = self.adjusted(Received()), torch.arange(10.0).view(2, 1, 5)
        model.set_student_input_tensor_shape([(2, 1, width)])
        model.set_input_tensor([whole])
        assert torch.equal(model.received[0], whole[..., :width])
        assert torch.equal(model.teacher_model.received[0], whole[..., width:])

    @pytest.mark.parametrize("tensors", [[None], [None, None]])
    def test_the_first_stage_receives_nothing(self, tensors):
        model = self.adjusted()
        model.set_student_input_tensor_shape([(2, 1, 3)])
        model.set_input_tensor(tensors)
        assert model.received == tensors
        assert model.teacher_model.received == tensors

    def test_some_of_them(self):
        model, whole = self.adjusted(), torch.ones(2, 1, 5)
        model.set_student_input_tensor_shape([(2, 1, 2)])
        model.set_input_tensor([None, whole])
        assert model.received[0] is None and model.received[1].shape == (2, 1, 2)
        assert model.teacher_model.received[1].shape == (2, 1, 3)

    def test_of_a_network(self):
        model = self.adjusted(Network())
        model._teacher_model = Network()
        model.set_student_input_tensor_shape([(2, 1, 2)])
        model.set_input_tensor([torch.ones(2, 1, 5)])
        assert model.received[0].shape == (2, 1, 2)
        assert model.teacher_model.received[0].shape == (2, 1, 3)


@pytest.mark.drop_in
class TestForward(AdjustCase):
    def test_in_evaluation_the_student_runs_alone(self):
        model = self.adjusted()
        model.training = False
        assert torch.equal(model.forward("x", labels="y"), torch.ones(2, 1, 4))
        assert model.called == (("x",), {"labels": "y"})
        assert not hasattr(model.teacher_model, "called")
        assert not model.alone

    def test_in_training_both_run(self):
        model = self.adjusted()
        assert torch.equal(model.forward("x", labels="y"), torch.ones(2, 1, 4))
        assert model.called == model.teacher_model.called == (("x",), {"labels": "y"})
        model.teacher_model.eval.assert_called_once_with()

    def test_the_teacher_runs_without_gradients(self):
        model, modes = self.adjusted(), []
        model._teacher_model = MagicMock(side_effect=lambda x: modes.append(torch.is_grad_enabled()))
        with torch.enable_grad():
            model.forward("x")
        assert modes == [False]

    def test_before_the_last_stage_outputs_are_joined(self):
        self.state.is_pipeline_last_stage.return_value = False
        output = self.adjusted().forward("x")
        assert output.shape == (2, 1, 7)
        assert torch.equal(output[..., :4], torch.ones(2, 1, 4))
        assert torch.equal(output[..., 4:], torch.full((2, 1, 3), 2.0))

    def test_in_evaluation_stages_are_not_asked_for(self):
        model = self.adjusted()
        model.training = False
        model.forward("x")
        self.state.is_pipeline_last_stage.assert_not_called()

    @pytest.mark.parametrize("last", [True, False])
    def test_of_a_network(self, last):
        self.state.is_pipeline_last_stage.return_value = last
        model = self.adjusted(Network()).train()
        output = model(torch.ones(2, 3))
        assert output.shape == (2, 5 if last else 8)
        assert not model._teacher_model.training and model.linear.training
        assert output.requires_grad

    def test_of_a_network_in_evaluation(self):
        model = self.adjusted(Network()).eval()
        model._teacher_model = MagicMock(spec=torch.nn.Linear)
        assert torch.equal(model(torch.ones(2, 3)), model.linear(torch.ones(2, 3)))
        model._teacher_model.assert_not_called()

    @pytest.mark.parametrize("kind", SETTINGS)
    def test_with_any_settings(self, kind):
        model = Plain()
        adjust_distillation_model_for_mcore(model, SETTINGS[kind])
        assert model.forward("x").shape == (2, 1, 4)
        model.training = False
        assert model.forward("x").shape == (2, 1, 4)

    def test_an_error_of_the_student_is_not_swallowed(self):
        class Failing(Plain):
            def forward(self, *args, **kwargs):
                raise RuntimeError("student failed")

        with pytest.raises(RuntimeError, match="^student failed$"):
            self.adjusted(Failing()).forward("x")

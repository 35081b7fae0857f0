"""``get_tensor_shapes_adjust_fn_for_distillation``, on stand-ins."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, patch

import pytest
import torch

from nemo.collections.llm.modelopt.distill import utils
from nemo.collections.llm.modelopt.distill.utils import get_tensor_shapes_adjust_fn_for_distillation as adjust_fn

MODULE = "nemo.collections.llm.modelopt.distill.utils"


class Distilled:
    """Takes the place of modelopt's class."""

    def __init__(self):
        self.teacher_model = object()
        self.set_student_input_tensor_shape = Mock()


class Module(torch.nn.Module):
    """A network that takes the place of modelopt's class."""

    def __init__(self):
        super().__init__()
        self.teacher_model = torch.nn.Linear(2, 2)
        self.seen = []

    def set_student_input_tensor_shape(self, shapes):
        self.seen.append([tuple(shape) for shape in shapes])


class ShapesCase:
    @pytest.fixture(autouse=True)
    def places(self):
        with (
            patch(f"{MODULE}.parallel_state") as self.state,
            patch(f"{MODULE}.get_tensor_shapes", return_value=[(16, 2, 32)]) as self.shapes,
            patch(f"{MODULE}.get_model_config") as self.config,
        ):
            self.state.get_pipeline_model_parallel_world_size.return_value = 2
            self.state.get_virtual_pipeline_model_parallel_world_size.return_value = None
            yield


@pytest.mark.drop_in
class TestWhetherToAdjust(ShapesCase):
    @pytest.fixture(autouse=True)
    def model_class(self, places):
        with patch(f"{MODULE}.DistillationModel", Distilled):
            yield

    def test_in_training_of_a_pipeline(self):
        assert callable(adjust_fn(Distilled(), 16, 2))

    def test_not_in_a_forward_pass_alone(self):
        assert adjust_fn(Distilled(), 16, 2, forward_only=True) is None

    def test_a_forward_pass_alone_asks_nothing(self):
        adjust_fn(Distilled(), 16, 2, None, True)
        self.state.get_pipeline_model_parallel_world_size.assert_not_called()

    @pytest.mark.parametrize("model", [Distilled(), [Distilled()], object(), None])
    def test_not_without_a_pipeline(self, model):
        self.state.get_pipeline_model_parallel_world_size.return_value = 1
        assert adjust_fn(model, 16, 2) is None

    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_not_in_an_interleaved_pipeline(self, size):
        self.state.get_virtual_pipeline_model_parallel_world_size.return_value = size
        assert adjust_fn(Distilled(), 16, 2) is None

    @pytest.mark.parametrize("size", [2, 3, 8])
    def test_in_pipelines_of_any_depth(self, size):
        self.state.get_pipeline_model_parallel_world_size.return_value = size
        assert callable(adjust_fn(Distilled(), 16, 2))

    @pytest.mark.parametrize(
        "model",
        [object(), [object()], SimpleNamespace(module=object()), torch.nn.Linear(2, 2), [torch.nn.Linear(2, 2)]],
    )
    def test_not_for_other_models(self, model):
        assert adjust_fn(model, 16, 2) is None

    @pytest.mark.parametrize("depth", [0, 1, 2, 4])
    @pytest.mark.parametrize("listed", [True, False])
    def test_through_wrappers(self, depth, listed):
        model = Distilled()
        for _ in range(depth):
            model = SimpleNamespace(module=model)
        assert callable(adjust_fn([model] if listed else model, 16, 2))

    def test_the_first_of_a_list(self):
        assert callable(adjust_fn([Distilled(), object()], 16, 2))
        assert adjust_fn([object(), Distilled()], 16, 2) is None


@pytest.mark.drop_in
class TestAdjusting(ShapesCase):
    @pytest.fixture(autouse=True)
    def model_class(self, places):
        with patch(f"{MODULE}.DistillationModel", Distilled):
            yield

    @pytest.mark.parametrize(
        ("recv", "send", "wide_recv", "wide_send"),
        [
            ([(16, 2, 64)], [(16, 2, 64)], [(16, 2, 96)], [(16, 2, 96)]),
            ([], [(16, 2, 64)], [], [(16, 2, 96)]),
            ([(16, 2, 64)], [], [(16, 2, 96)], []),
            ([(16, 2, 8), (4, 2, 1)], [(16, 2, 3)], [(16, 2, 40), (4, 2, 33)], [(16, 2, 35)]),
            ([[16, 2, 64]], [torch.Size([16, 2, 64])], [(16, 2, 96)], [(16, 2, 96)]),
        ],
    )
    def test_the_teachers_width_is_added(self, recv, send, wide_recv, wide_send):
        assert adjust_fn(Distilled(), 16, 2)(recv, send) == (wide_recv, wide_send)
        assert all(type(shape) is tuple for shape in (*recv, *send))

    def test_the_lists_are_changed_in_place(self):
        recv, send = [(16, 2, 64)], [(16, 2, 64)]
        found = adjust_fn(Distilled(), 16, 2)(recv, send)
        assert found[0] is recv and found[1] is send

    def test_receiving_and_sending_may_differ(self):
        self.shapes.side_effect = [[(16, 2, 10)], [(16, 2, 20)]]
        assert adjust_fn(Distilled(), 16, 2)([(1, 1, 1)], [(1, 1, 1)]) == ([(1, 1, 11)], [(1, 1, 21)])

    def test_the_student_is_told_its_shapes_before_they_are_widened(self):
        model, seen = Distilled(), []
        model.set_student_input_tensor_shape.side_effect = lambda shapes: seen.append(list(shapes))
        adjust_fn(model, 16, 2)([(16, 2, 64)], [(16, 2, 64)])
        assert seen == [[(16, 2, 64)]]

    def test_the_student_is_told_the_list_itself(self):
        model, recv = Distilled(), [(16, 2, 64)]
        adjust_fn(model, 16, 2)(recv, [])
        assert model.set_student_input_tensor_shape.call_args.args[0] is recv

    @pytest.mark.parametrize("decoder", [None, 24])
    def test_what_megatron_is_asked(self, decoder):
        adjust_fn(Distilled(), 64, 3, decoder)([(1, 1, 1)], [(1, 1, 1)])
        assert self.shapes.call_count == 2
        for asked in self.shapes.call_args_list:
            assert asked.args == ()
            assert asked.kwargs == {
                "seq_length": 64,
                "micro_batch_size": 3,
                "decoder_seq_length": decoder,
                "config": self.config.return_value,
                "tp_group": self.state.get_tensor_model_parallel_group.return_value,
                "cp_group": self.state.get_context_parallel_group.return_value,
            }

    def test_each_is_asked_once(self):
        model = Distilled()
        adjust_fn(model, 16, 2)([(1, 1, 1)], [(1, 1, 1)])
        self.config.assert_called_once_with(model.teacher_model)
        self.state.get_tensor_model_parallel_group.assert_called_once_with()
        self.state.get_context_parallel_group.assert_called_once_with()

    def test_nothing_is_asked_before_it_is_called(self):
        adjust_fn(Distilled(), 16, 2)
        self.config.assert_not_called()
        self.shapes.assert_not_called()

    def test_twice(self):
        adjust = adjust_fn(Distilled(), 16, 2)
        assert adjust([(1, 1, 1)], [])[0] == [(1, 1, 33)]
        assert adjust([(1, 1, 2)], [])[0] == [(1, 1, 34)]

    def test_an_error_of_megatron_leaves_the_shapes(self):
        self.shapes.side_effect = RuntimeError("no shapes")
        recv = [(1, 1, 1)]
        with pytest.raises(RuntimeError, match="^no shapes$"):
            adjust_fn(Distilled(), 16, 2)(recv, [])
        assert recv == [(1, 1, 1)]


@pytest.mark.drop_in
class TestOtherStandIns(ShapesCase):
    @pytest.mark.parametrize("mock_class", [Mock, MagicMock])
    def test_a_mock_of_the_model(self, mock_class):
        model = mock_class(spec=["teacher_model", "set_student_input_tensor_shape"])
        with patch(f"{MODULE}.DistillationModel", mock_class):
            found = adjust_fn(model, 16, 2)([(16, 2, 64)], [(16, 2, 64)])
        assert found == ([(16, 2, 96)], [(16, 2, 96)])
        model.set_student_input_tensor_shape.assert_called_once()

    @pytest.mark.parametrize("mock_class", [Mock, MagicMock])
    def test_a_mock_without_a_wrapped_model(self, mock_class):
        model = mock_class()
        del model.module
        with patch(f"{MODULE}.DistillationModel", mock_class):
            assert adjust_fn(model, 16, 2)([(1, 1, 1)], []) == ([(1, 1, 33)], [])

    def test_a_mock_of_modelopts_class(self):
        model = MagicMock(spec=utils.DistillationModel)
        model.set_student_input_tensor_shape = Mock()
        model.teacher_model = object()
        assert adjust_fn(model, 16, 2)([(1, 1, 1)], []) == ([(1, 1, 33)], [])

    def test_a_network(self):
        model = Module()
        with patch(f"{MODULE}.DistillationModel", Module):
            assert adjust_fn([model], 16, 2)([(16, 2, 8)], [(16, 2, 8)]) == ([(16, 2, 40)], [(16, 2, 40)])
        assert model.seen == [[(16, 2, 8)]]
        self.config.assert_called_once_with(model.teacher_model)

    def test_a_mock_of_the_shapes(self):
        self.shapes.return_value = MagicMock()
        self.shapes.return_value[0].__getitem__.return_value = 5
        with patch(f"{MODULE}.DistillationModel", Distilled):
            assert adjust_fn(Distilled(), 16, 2)([(1, 1, 1)], [(1, 1, 2)]) == ([(1, 1, 6)], [(1, 1, 7)])

    def test_a_class_with_slots(self):
        class Slotted:
            __slots__ = ("set_student_input_tensor_shape", "teacher_model")

        model = Slotted()
        model.teacher_model, model.set_student_input_tensor_shape = object(), Mock()
        with patch(f"{MODULE}.DistillationModel", Slotted):
            assert adjust_fn(model, 16, 2)([(1, 1, 1)], []) == ([(1, 1, 33)], [])

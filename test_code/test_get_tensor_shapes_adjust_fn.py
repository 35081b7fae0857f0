"""`get_tensor_shapes_adjust_fn_for_distillation`: when messages are widened, and by how much."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest

from nemo.collections.llm.modelopt.distill import utils
from test_code.drop_in.shapes import TestAdjusting, TestOtherStandIns, TestWhetherToAdjust  # noqa: F401
from test_code.support import tiny


def pipeline_shapes():
    """Return Megatron's shapes after the adjustment at PP=2, and the width of the student's part."""
    import modelopt.torch.distill as mtd
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_tensor_shapes

    from nemo.collections.llm.modelopt.distill.utils import (
        DistillationConfig,
        adjust_distillation_model_for_mcore,
        get_tensor_shapes_adjust_fn_for_distillation,
        load_distillation_config,
    )

    tiny.init_parallel(pp=2)
    student_config, teacher_config = (
        tiny.config(hidden_size=hidden, pipeline_model_parallel_size=2) for hidden in (32, 64)
    )
    student, teacher_model = (c.configure_model(tiny.tokenizer()) for c in (student_config, teacher_config))
    settings = load_distillation_config(DistillationConfig(), student_config, teacher_config)
    kd = {"teacher_model": teacher_model, "criterion": settings.criterion, "loss_balancer": settings.loss_balancer}
    model = mtd.convert(student, mode=[("kd_loss", kd)])
    adjust_distillation_model_for_mcore(model, settings)
    own = get_tensor_shapes(
        seq_length=32,
        micro_batch_size=2,
        decoder_seq_length=None,
        config=student_config,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
    )
    recv, send = get_tensor_shapes_adjust_fn_for_distillation([model], 32, 2, None, False)(list(own), list(own))
    return recv, send, model._tensor_split_idx


class Distilled:
    """Stands in for modelopt's ``DistillationModel``: a teacher, and memory of the student's shapes."""

    def __init__(self, teacher_hidden=96):
        self.teacher_model = SimpleNamespace(hidden=teacher_hidden)
        self.student_shapes = None

    def set_student_input_tensor_shape(self, shapes):
        self.student_shapes = list(shapes)


@pytest.fixture
def megatron():
    """Megatron's groups as a pipeline of two stages would have them."""
    with (
        mock.patch.object(utils, "parallel_state") as state,
        mock.patch.object(utils, "get_model_config", side_effect=lambda teacher: teacher),
        mock.patch.object(utils, "get_tensor_shapes") as shapes,
        mock.patch.object(utils, "DistillationModel", Distilled),
    ):
        state.get_pipeline_model_parallel_world_size.return_value = 2
        state.get_virtual_pipeline_model_parallel_world_size.return_value = None
        shapes.side_effect = lambda *, seq_length, micro_batch_size, decoder_seq_length, config, **groups: [
            (decoder_seq_length or seq_length, micro_batch_size, config.hidden)
        ]
        yield SimpleNamespace(state=state, shapes=shapes)


def adjust_fn(model, **kwargs):
    return utils.get_tensor_shapes_adjust_fn_for_distillation(
        model, **{"seq_length": 32, "micro_batch_size": 2} | kwargs
    )


def test_no_pipeline_no_change(megatron):
    megatron.state.get_pipeline_model_parallel_world_size.return_value = 1
    assert adjust_fn(Distilled()) is None


def test_a_forward_pass_alone_sends_the_student_alone(megatron):
    assert adjust_fn(Distilled(), forward_only=True) is None


@pytest.mark.parametrize("size", [1, 2])
def test_interleaved_schedules_are_left_alone(megatron, size):
    megatron.state.get_virtual_pipeline_model_parallel_world_size.return_value = size
    assert adjust_fn(Distilled()) is None


@pytest.mark.parametrize("model", [object(), [object()], SimpleNamespace(module=object())])
def test_a_model_without_a_teacher_is_left_alone(megatron, model):
    assert adjust_fn(model) is None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        lambda m: [m],
        lambda m: SimpleNamespace(module=m),
        lambda m: [SimpleNamespace(module=SimpleNamespace(module=m))],
    ],
)
def test_messages_hold_student_and_teacher(megatron, wrap):
    model = Distilled(teacher_hidden=96)
    recv, send = [(32, 2, 64)], [(32, 2, 64), (32, 2, 48)]
    result = adjust_fn(wrap(model))(recv, send)
    assert result == ([(32, 2, 160)], [(32, 2, 160), (32, 2, 144)])
    # Megatron uses the lists that it passed.
    assert result[0] is recv and result[1] is send
    assert model.student_shapes == [(32, 2, 64)]


def test_shapes_are_asked_with_what_the_step_has(megatron):
    adjust_fn(Distilled(), seq_length=64, micro_batch_size=3, decoder_seq_length=48)([(1, 1, 1)], [(1, 1, 1)])
    for call in megatron.shapes.call_args_list:
        assert call.kwargs["seq_length"] == 64
        assert call.kwargs["micro_batch_size"] == 3
        assert call.kwargs["decoder_seq_length"] == 48
        assert call.kwargs["tp_group"] is megatron.state.get_tensor_model_parallel_group.return_value
        assert call.kwargs["cp_group"] is megatron.state.get_context_parallel_group.return_value


def test_arguments_are_positional_as_nemo_calls_it(megatron):
    assert utils.get_tensor_shapes_adjust_fn_for_distillation(Distilled(), 32, 2, None, True) is None
    assert callable(utils.get_tensor_shapes_adjust_fn_for_distillation(Distilled(), 32, 2, None, False))


def test_real_shapes_at_pp2(ranks):
    """Student of hidden size 32, teacher of 64, s=32 and b=2."""
    for recv, send, split in ranks(2).run(pipeline_shapes):
        assert recv == send == [(32, 2, 96)]
        assert split == 32

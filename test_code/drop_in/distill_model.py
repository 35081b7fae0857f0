"""Losses, the balancer, their reduction and ``DistillationGPTModel``, on stand-ins."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, patch

import modelopt.torch.distill as mtd
import pytest
import torch
import torch.nn.functional as F

from nemo.collections import llm
from nemo.collections.llm.modelopt.distill import loss as losses
from nemo.collections.llm.modelopt.distill import model as models
from nemo.collections.llm.modelopt.distill.loss import (
    HiddenStateCosineLoss,
    LogitsAndIntermediatesLossBalancer,
    LogitsKLLoss,
    MSELoss,
    ProjectionLayer,
)
from nemo.collections.llm.modelopt.distill.model import DistillationGPTModel

LOSSES = "nemo.collections.llm.modelopt.distill.loss"
MODELS = "nemo.collections.llm.modelopt.distill.model"
STUDENT = mtd.loss_balancers.STUDENT_LOSS_KEY


def config(**given):
    return SimpleNamespace(**{"tensor_model_parallel_size": 1, "sequence_parallel": False, **given})


def activations(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.drop_in
class TestLosses:
    @pytest.mark.parametrize("given", [None, SimpleNamespace(), Mock(sequence_parallel=False), config()])
    def test_mse(self, given):
        student, teacher = activations(3, 2, 4), activations(3, 2, 4, seed=1)
        value, tp_reduce, is_sequence_parallel = MSELoss(given)(student, teacher)
        torch.testing.assert_close(value, ((student - teacher) ** 2).sum(-1).transpose(0, 1))
        assert (tp_reduce, is_sequence_parallel) == (False, False)

    @pytest.mark.parametrize("loss_class", [MSELoss, HiddenStateCosineLoss])
    def test_equal_activations_have_no_loss(self, loss_class):
        same = activations(3, 2, 4)
        value, *_ = loss_class(config())(same, same.clone())
        torch.testing.assert_close(value, torch.zeros(2, 3), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("loss_class", [MSELoss, HiddenStateCosineLoss])
    def test_outputs_with_a_bias(self, loss_class):
        student, teacher = activations(3, 2, 4), activations(3, 2, 4, seed=1)
        plain = loss_class(config())(student, teacher)[0]
        assert torch.equal(loss_class(config())((student, None), (teacher, None))[0], plain)

    @pytest.mark.parametrize("loss_class", [MSELoss, HiddenStateCosineLoss])
    def test_the_students_activations_are_projected(self, loss_class):
        projection = Mock(side_effect=lambda x: x * 2.0)
        student, teacher = activations(3, 2, 4), activations(3, 2, 4, seed=1)
        found = loss_class(config(), projection_layer=projection)(student, teacher)[0]
        projection.assert_called_once_with(student)
        torch.testing.assert_close(found, loss_class(config())(student * 2.0, teacher)[0])

    @pytest.mark.parametrize("loss_class", [MSELoss, HiddenStateCosineLoss, LogitsKLLoss])
    def test_the_teacher_gets_no_gradient(self, loss_class):
        student, teacher = (activations(3, 2, 4, seed=seed).requires_grad_() for seed in (0, 1))
        loss_class(config())(student, teacher)[0].sum().backward()
        assert student.grad is not None and teacher.grad is None

    @pytest.mark.parametrize("loss_class", [MSELoss, HiddenStateCosineLoss, LogitsKLLoss])
    def test_shape(self, loss_class):
        value, *_ = loss_class(config())(activations(5, 2, 4), activations(5, 2, 4, seed=1))
        assert value.shape == (2, 5) and value.is_contiguous()

    def test_cosine(self):
        student, teacher = activations(3, 2, 4), activations(3, 2, 4, seed=1)
        value, *_ = HiddenStateCosineLoss(config())(student, teacher)
        torch.testing.assert_close(value, 1 - F.cosine_similarity(student, teacher, dim=-1).transpose(0, 1))

    @pytest.mark.parametrize("split", [True, False])
    def test_cosine_says_whether_the_sequence_is_split(self, split):
        found = HiddenStateCosineLoss(config(sequence_parallel=split))(activations(3, 2, 4), activations(3, 2, 4))
        assert found[1:] == (False, split)

    @pytest.mark.parametrize(
        ("size", "split", "warned"), [(1, False, False), (1, True, False), (2, True, False), (2, False, True)]
    )
    def test_cosine_warns_about_tensor_parallelism(self, size, split, warned):
        with patch(f"{LOSSES}.logging") as logging:
            HiddenStateCosineLoss(config(tensor_model_parallel_size=size, sequence_parallel=split))
        assert logging.warning.called is warned

    @pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
    @pytest.mark.parametrize("reverse", [False, True])
    def test_kl(self, temperature, reverse):
        student, teacher = activations(3, 2, 7), activations(3, 2, 7, seed=1)
        found = LogitsKLLoss(config(), temperature=temperature, reverse=reverse)(student, teacher)[0]
        first, second = (student, teacher) if reverse else (teacher, student)
        first, second = (F.log_softmax(x / temperature, dim=-1) for x in (first, second))
        expected = (first.exp() * (first - second)).sum(-1).transpose(0, 1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_kl_of_bf16_is_fp32(self):
        found = LogitsKLLoss(config())(activations(3, 2, 7).bfloat16(), activations(3, 2, 7, seed=1).bfloat16())
        assert found[0].dtype is torch.float32

    @pytest.mark.parametrize(("temperature", "reverse"), [(1.0, False), (2.5, True)])
    def test_kl_remembers_its_settings(self, temperature, reverse):
        found = LogitsKLLoss(None, temperature, reverse)
        assert (found._temperature, found._reverse) == (temperature, reverse)

    @pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True)])
    def test_what_comes_after(self, flags):
        value, *found = losses.BaseLoss.post_forward(None, torch.ones(3, 2), *flags)
        assert value.shape == (2, 3) and tuple(found) == flags

    def test_the_sum_over_ranks_has_a_gradient(self):
        tensor, group = torch.ones(2, requires_grad=True), object()
        with patch("torch.distributed.all_reduce") as reduce:
            losses.all_reduce_autograd(tensor, group=group).sum().backward()
        assert reduce.call_count == 2
        assert all(asked.kwargs["group"] is group for asked in reduce.call_args_list)
        assert all(asked.kwargs["op"] is torch.distributed.ReduceOp.SUM for asked in reduce.call_args_list)
        assert tensor.grad.tolist() == [1.0, 1.0]


@pytest.mark.drop_in
class TestProjection:
    def sizes(self, student, teacher):
        return config(hidden_size=student, init_method=Mock(side_effect=torch.nn.init.ones_)), config(
            hidden_size=teacher
        )

    def test_equal_sizes(self):
        student, teacher = self.sizes(4, 4)
        layer, x = ProjectionLayer(student, teacher), torch.ones(1, 4)
        assert isinstance(layer._fit, torch.nn.Identity)
        assert layer(x) is x
        student.init_method.assert_not_called()

    @pytest.mark.parametrize(("small", "large"), [(4, 8), (8, 4)])
    def test_other_sizes(self, small, large):
        student, teacher = self.sizes(small, large)
        layer = ProjectionLayer(student, teacher)
        assert layer(torch.ones(2, small)).tolist() == [[float(small)] * large] * 2
        student.init_method.assert_called_once()
        assert not layer._fit.bias.any()

    @pytest.mark.parametrize("split", [True, False])
    def test_parameters_are_marked(self, split):
        student, teacher = self.sizes(4, 8)
        student.sequence_parallel = split
        layer = ProjectionLayer(student, teacher)
        assert layer._fit.weight.sequence_parallel is split and layer._fit.bias.sequence_parallel is split


@pytest.mark.drop_in
class TestBalancer:
    def given(self, student=4.0, logits=2.0, **intermediate):
        values = {STUDENT: student, "LogitsKLLoss_0": logits, **intermediate}
        return {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}

    def test_logits_alone(self):
        found = LogitsAndIntermediatesLossBalancer(skip_original_loss=True)(self.given())
        assert {name: value.item() for name, value in found.items()} == {
            "kd_loss": 2.0,
            "logits_loss": 2.0,
            "intermediate_loss": 0.0,
        }

    @pytest.mark.parametrize(("scale", "total"), [(1.0, 8.0), (0.5, 6.0), (2.0, 12.0)])
    def test_beside_a_language_model_loss(self, scale, total):
        found = LogitsAndIntermediatesLossBalancer(kd_loss_scale=scale)(self.given())
        assert found["kd_loss"].item() == pytest.approx(total)

    @pytest.mark.parametrize(
        "more", [{"HiddenStateCosineLoss_0": 0.5}, {"HiddenStateCosineLoss_0": 0.2, "MSELoss_1": 0.8}]
    )
    def test_intermediate_losses_are_averaged_and_scaled_to_the_logits(self, more):
        found = LogitsAndIntermediatesLossBalancer(skip_original_loss=True)(self.given(**more))
        assert found["intermediate_loss"].item() == pytest.approx(0.5)
        assert found["kd_loss"].item() == pytest.approx(4.0)

    def test_all_of_them(self):
        found = LogitsAndIntermediatesLossBalancer(kd_loss_scale=3.0)(self.given(HiddenStateCosineLoss_0=0.5))
        assert found["kd_loss"].item() == pytest.approx(4.0 + 3.0 * 4.0)

    def test_intermediate_losses_of_zero(self):
        found = LogitsAndIntermediatesLossBalancer(skip_original_loss=True)(self.given(HiddenStateCosineLoss_0=0.0))
        assert found["kd_loss"].item() == 2.0 and found["intermediate_loss"].item() == 0.0

    def test_gradients(self):
        given = self.given(HiddenStateCosineLoss_0=0.5)
        leaves = dict(given)
        LogitsAndIntermediatesLossBalancer(skip_original_loss=True)(given)["kd_loss"].backward()
        assert leaves["LogitsKLLoss_0"].grad.item() == pytest.approx(1.0)
        assert leaves["HiddenStateCosineLoss_0"].grad.item() == pytest.approx(4.0)
        assert leaves[STUDENT].grad is None

    def test_settings_are_kept(self):
        balancer = LogitsAndIntermediatesLossBalancer(2.0, True)
        assert (balancer._kd_loss_scale, balancer._skip_original_loss) == (2.0, True)
        assert isinstance(balancer, losses.DistillationLossBalancer)


@pytest.mark.drop_in
class TestReduction:
    @pytest.fixture(autouse=True)
    def places(self):
        with (
            patch(f"{MODELS}.parallel_state") as self.state,
            patch("torch.distributed.all_reduce") as self.all_reduce,
            patch(f"{MODELS}.average_losses_across_data_parallel_group", side_effect=torch.stack),
        ):
            self.state.get_context_parallel_world_size.return_value = 1
            self.state.get_tensor_model_parallel_world_size.return_value = 1
            yield

    def made(self, function=None):
        return models._DistillationLossReduction(function or Mock())

    @pytest.mark.parametrize(
        ("mask", "mean"), [([1.0, 1.0, 1.0, 1.0], 2.5), ([1.0, 0.0, 0.0, 1.0], 2.5), ([1.0, 1.0, 0.0, 0.0], 1.5)]
    )
    def test_the_mean_of_tokens_that_count(self, mask, mean):
        found = self.made()._masked_token_loss(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([mask]))
        assert found.item() == mean
        self.all_reduce.assert_not_called()

    def test_a_loss_that_says_nothing_of_ranks(self):
        loss, mask = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2)
        assert self.made()._masked_token_loss((loss, False, False), mask).item() == 2.0
        self.all_reduce.assert_not_called()

    @pytest.mark.parametrize("flags", [(True, False), (False, True), (True, True)])
    def test_a_loss_that_is_split_over_ranks(self, flags):
        self.state.get_tensor_model_parallel_rank.return_value = 0
        loss = self.made()._masked_token_loss((torch.tensor([[1.0, 3.0]]), *flags), torch.ones(1, 2))
        assert loss.item() == 2.0
        self.all_reduce.assert_called_once()
        assert self.all_reduce.call_args.kwargs == {"group": self.state.get_tensor_model_parallel_group.return_value}

    def test_a_sequence_that_is_split_over_ranks(self):
        self.state.get_tensor_model_parallel_world_size.return_value = 2
        self.state.get_tensor_model_parallel_rank.return_value = 1
        mask = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
        loss = self.made()._masked_token_loss((torch.tensor([[5.0, 7.0]]), False, True), mask)
        assert loss.item() == pytest.approx(7.0 / 3.0)

    def test_the_distillation_loss_is_asked(self):
        function = Mock(
            return_value={
                "kd_loss": torch.tensor(7.0),
                "logits_loss": torch.tensor(5.0),
                "intermediate_loss": torch.tensor(2.0),
            }
        )
        total, report = self.made(function).forward({"loss_mask": torch.ones(1, 2)}, torch.tensor([[1.0, 3.0]]))
        assert total.item() == 7.0 and isinstance(report, dict)
        function.assert_called_once()
        assert set(function.call_args.kwargs) == {"student_loss", "loss_reduction_fn"}
        assert function.call_args.kwargs["student_loss"].item() == 2.0
        reduce = function.call_args.kwargs["loss_reduction_fn"]
        assert reduce((torch.tensor([[2.0, 6.0]]), False, False)).item() == 4.0

    def test_a_model_that_returns_its_mask(self):
        function = Mock(
            return_value={
                "kd_loss": torch.tensor(1.0),
                "logits_loss": torch.tensor(1.0),
                "intermediate_loss": torch.tensor(0.0),
            }
        )
        batch = {"loss_mask": None}
        self.made(function).forward(batch, (torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])))
        assert batch["loss_mask"].tolist() == [[0.0, 1.0]]
        assert function.call_args.kwargs["student_loss"].item() == 3.0


@pytest.mark.drop_in
class TestDistillationModel:
    @pytest.fixture(autouse=True)
    def places(self):
        with (
            patch(f"{MODELS}.load_distillation_config") as self.load,
            patch(f"{MODELS}.adjust_distillation_model_for_mcore") as self.adjust,
            patch(f"{MODELS}.mtd.convert") as self.convert,
        ):
            yield

    def owner(self, **given):
        """Return what ``configure_model`` reads of the model itself."""
        shared = {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 4,
            "context_parallel_size": 8,
            "sequence_parallel": True,
            "pipeline_dtype": torch.bfloat16,
        }
        return SimpleNamespace(
            **{
                "config": SimpleNamespace(**shared, configure_model=Mock(return_value="student")),
                "_teacher_config": SimpleNamespace(hidden_size=16),
                "_teacher_ckpt_path": "/fake/teacher",
                "_distillation_config_path": "/fake/kd.yaml",
                "tokenizer": "tokenizer",
                "trainer": MagicMock(),
                **given,
            }
        )

    def test_two_models_become_one(self):
        owner = self.owner()
        DistillationGPTModel.configure_model(owner)
        owner.config.configure_model.assert_called_once_with("tokenizer")
        self.load.assert_called_once_with("/fake/kd.yaml", owner.config, owner._teacher_config)
        self.convert.assert_called_once()
        assert self.convert.call_args.args == ("student",)
        ((name, settings),) = self.convert.call_args.kwargs["mode"]
        assert name == "kd_loss"
        assert settings["teacher_model"] == (
            models.teacher_provider,
            [owner._teacher_config, "/fake/teacher"],
            {"tokenizer": "tokenizer", "trainer": owner.trainer},
        )
        assert settings["criterion"] is self.load.return_value.criterion
        assert settings["loss_balancer"] is self.load.return_value.loss_balancer
        self.adjust.assert_called_once_with(self.convert.return_value, distill_cfg=self.load.return_value)
        assert owner.module is self.convert.return_value

    @pytest.mark.parametrize(
        "name",
        [
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "sequence_parallel",
            "pipeline_dtype",
        ],
    )
    def test_the_teacher_follows_the_student(self, name):
        owner = self.owner()
        teacher = owner._teacher_config
        DistillationGPTModel.configure_model(owner)
        assert getattr(teacher, name) == getattr(owner.config, name)

    @pytest.mark.parametrize("mock_class", [Mock, MagicMock])
    def test_mocks_of_configurations(self, mock_class):
        owner = self.owner(config=mock_class(), _teacher_config=mock_class())
        DistillationGPTModel.configure_model(owner)
        assert self.convert.call_args.args == (owner.config.configure_model.return_value,)
        assert owner._teacher_config.sequence_parallel is owner.config.sequence_parallel

    def test_once_only(self):
        owner = self.owner(module="there already")
        assert DistillationGPTModel.configure_model(owner) is None
        self.convert.assert_not_called()
        assert owner.module == "there already"

    def test_the_core_is_unwrapped(self):
        with patch(f"{MODELS}.unwrap_model") as unwrap:
            found = DistillationGPTModel.core_module.fget(SimpleNamespace(module="wrapped"))
        unwrap.assert_called_once_with("wrapped")
        assert found is unwrap.return_value

    @pytest.mark.parametrize(
        ("key", "loaded"), [("module.a", "a"), ("a", "a"), ("module.module.decoder.w", "decoder.w")]
    )
    def test_weights_go_to_the_core(self, key, loaded):
        owner = SimpleNamespace(core_module=Mock())
        found = DistillationGPTModel.load_state_dict(owner, {key: 1}, strict=False)
        owner.core_module.load_state_dict.assert_called_once_with({loaded: 1}, strict=False)
        assert found is owner.core_module.load_state_dict.return_value

    def test_no_text_is_generated(self):
        with pytest.raises(
            NotImplementedError, match="^Please restore a checkpoint of this model to its original class"
        ):
            DistillationGPTModel.get_inference_wrapper(Mock())

    def test_the_reduction_is_made_once(self):
        owner = SimpleNamespace(_training_loss_reduction=None, core_module=Mock())
        with patch(f"{MODELS}._DistillationLossReduction") as reduction:
            first = DistillationGPTModel.training_loss_reduction.fget(owner)
            assert DistillationGPTModel.training_loss_reduction.fget(owner) is first
        reduction.assert_called_once_with(distillation_loss_fn=owner.core_module.compute_kd_loss)

    def test_a_made_reduction_is_kept(self):
        owner = SimpleNamespace(_training_loss_reduction="made")
        assert DistillationGPTModel.training_loss_reduction.fget(owner) == "made"


def gpt_config(**given):
    return llm.GPTConfig(num_layers=2, hidden_size=32, num_attention_heads=2, **given)


@pytest.mark.drop_in
class TestDistillationModelForReal:
    def test_what_it_keeps(self):
        student, teacher = gpt_config(), gpt_config()
        model = DistillationGPTModel(student, teacher, "/fake/teacher", "/fake/kd.yaml", tokenizer=MagicMock())
        assert model.config is student
        assert model._teacher_config is teacher
        assert model._teacher_ckpt_path == "/fake/teacher"
        assert model._distillation_config_path == "/fake/kd.yaml"
        assert isinstance(model, llm.GPTModel)

    def test_interleaved_pipelines(self):
        student = gpt_config()
        student.virtual_pipeline_model_parallel_size = 2
        message = "^ModelOpt Distillation incompatible with interleaved pipeline schedule"
        with pytest.raises(ValueError, match=message):
            DistillationGPTModel(student, gpt_config(), "/fake/teacher", tokenizer=MagicMock())

    @pytest.mark.parametrize("whose", ["student", "teacher"])
    def test_other_configurations_are_warned_about(self, whose):
        other = SimpleNamespace(virtual_pipeline_model_parallel_size=None)
        pair = (other, gpt_config()) if whose == "student" else (gpt_config(), other)
        with patch(f"{MODELS}.logging") as logging:
            DistillationGPTModel(*pair, "/fake/teacher", tokenizer=MagicMock())
        logging.warning.assert_called_once()
        assert logging.warning.call_args.args[0].startswith(
            "Student and Teacher configs should both inherit from llm.GPTConfig."
        )

    def test_two_models_become_one_with_a_mock_of_the_trainer(self):
        student, teacher = gpt_config(), gpt_config()
        model = DistillationGPTModel(student, teacher, "/fake/teacher", "/fake/kd.yaml", tokenizer=MagicMock())
        model.trainer = MagicMock()
        with (
            patch.object(llm.GPTConfig, "configure_model") as build,
            patch(f"{MODELS}.load_distillation_config") as load,
            patch(f"{MODELS}.adjust_distillation_model_for_mcore") as adjust,
            patch(f"{MODELS}.mtd.convert", return_value=torch.nn.Linear(2, 2)) as convert,
        ):
            model.configure_model()
        load.assert_called_once_with("/fake/kd.yaml", student, teacher)
        assert convert.call_args.args == (build.return_value,)
        adjust.assert_called_once_with(convert.return_value, distill_cfg=load.return_value)
        assert model.module is convert.return_value

    def test_the_mode_reaches_the_parts_however_it_is_set(self):
        model = DistillationGPTModel(gpt_config(), gpt_config(), "/fake/teacher", tokenizer=MagicMock())
        model.module = torch.nn.Linear(2, 2)
        for mode in (False, True):
            model.train(mode)
            assert model.training is mode and model.module.training is mode
        model.training = False
        assert model.training is False and model.module.training is False

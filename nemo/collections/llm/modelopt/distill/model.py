"""A NeMo GPT model that trains a student against a teacher."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import fiddle as fdl
import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from nemo.collections.common.tokenizers.tokenizer_spec import TokenizerSpec
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction
from nemo.lightning.pytorch.optim import OptimizerModule
from nemo.utils import logging
from nemo.utils.model_utils import unwrap_model
from torch import Tensor, nn

import modelopt.torch.distill as mtd
from nemo.collections import llm
from nemo_modelopt_dropin import moved

from .._batches import Shown
from .._parallel import gather_over_stages
from .._saved_keys import strip_module_prefix
from ._aligned import is_aligned
from ._aligned import see as see_aligned
from ._completed import completed
from ._config import DistillationConfig
from ._deferred_logits import SummedLoss, sums_tokens
from ._finite import LossWatch
from ._fusion import sample_length
from ._pipeline_checks import check_student_layers, refuse_virtual_pipeline
from ._plan import make_plan
from ._reduction import DistillationValidation, Metrics, not_logged, sums_of_last_stage, without_ignored
from ._state import state_of
from ._update_check import check_updates
from .loss import sum_value_over
from .recorded.teacher import RecordedTeacher, is_recorded, recorded_teacher
from .utils import adjust_distillation_model_for_mcore, load_distillation_config, teacher_provider

# A name of the stock module.
average_losses_across_data_parallel_group = moved.find("average_losses_across_data_parallel_group")

# Arguments of the constructor that a plain model has as well.
_OF_STUDENT = ("config", "optim", "tokenizer", "model_transform")


class _DistillationLossReduction(MaskedTokenLossReduction):
    """Masks and reduces the losses of a training micro-batch.

    The loss of a micro-batch is the mean over its unmasked tokens on all context-parallel ranks, or zero if all tokens
    are masked. Metrics are means over the tokens of the global batch, as in NeMo's logs. The gradient follows
    Megatron's ``calculate_per_token_loss``: that of the mean over the tokens of the global batch if it is set, and
    that of the mean of the micro-batches' means otherwise.
    """

    def __init__(self, distillation_loss_fn, *args, per_token_loss: bool = False, pairs=(), **kwargs):
        """Store the loss function and the settings.

        Args:
            distillation_loss_fn: ``DistillationModel.compute_kd_loss``.
            *args: passed to NeMo's reduction.
            per_token_loss: Megatron's ``calculate_per_token_loss``.
            pairs: intermediate layer pairs, each of which has a metric.
            **kwargs: passed to NeMo's reduction.
        """
        super().__init__(*args, **kwargs)
        self._distillation_loss_fn = distillation_loss_fn
        self._per_token_loss = per_token_loss
        self._metrics = Metrics(pairs)
        self._cp_size = parallel_state.get_context_parallel_world_size()
        self._tp_size = parallel_state.get_tensor_model_parallel_world_size()
        self._sums: Tensor | None = None
        # The last micro-batch's mask and its tokens on all context-parallel ranks: its losses share one reduction.
        self._counted: tuple[Tensor | None, Tensor] = None, torch.zeros(())

    def forward(self, batch: dict[str, Tensor], forward_out: Tensor):
        """Return the loss of a micro-batch and the report that `reduce` reads.

        Args:
            batch: contains ``loss_mask`` [b, s].
            forward_out: language-model loss [b, s], or (loss, loss mask) from multimodal models.

        Returns:
            (loss, report), or (loss sum, number of tokens, report) for Megatron's per-token loss.
        """
        if isinstance(forward_out, tuple):
            forward_out, batch["loss_mask"] = forward_out
        mask = without_ignored(batch["loss_mask"], batch.get("labels"))
        tokens = mask.sum().float()
        of_sequence = self._tokens_of_sequence(tokens)
        self._counted = mask, of_sequence
        lm_loss = self._masked_token_loss(forward_out, mask)
        losses = self._distillation_loss_fn(
            student_loss=lm_loss, loss_reduction_fn=partial(self._masked_token_loss, mask=mask)
        )
        if isinstance(losses, Tensor):  # a balancer that returns the total alone
            losses = {"kd_loss": losses}
        total = losses["kd_loss"]
        state_of(getattr(self._distillation_loss_fn, "__self__", None)).finite.see_loss(losses, mask)

        report = {
            "loss_sum_and_ub_size": torch.stack([total.detach().float() * tokens, tokens]),
            "kd_sums": self._metrics.sums({"lm_loss": lm_loss, **losses}, mask),
        }
        if not self._per_token_loss:
            return total, report
        return total * of_sequence, tokens.to(torch.int), report

    def reduce(self, losses_reduced_per_micro_batch) -> Tensor:
        """Return the mean loss over the tokens of the global batch, and keep the metrics for `take_sums`."""
        if not losses_reduced_per_micro_batch:
            return super().reduce(losses_reduced_per_micro_batch)
        sums = sum(report["kd_sums"] for report in losses_reduced_per_micro_batch)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(sums, group=group)
        self._sums = sums
        return self._metrics.means(sums)["kd_loss"]

    def take_sums(self) -> Tensor | None:
        """Return the sums of the last global batch's metrics and reset them; None on ranks that compute no loss."""
        sums, self._sums = self._sums, None
        return sums

    @sums_tokens
    def _masked_token_loss(self, loss_output: Tensor, mask: Tensor):
        """Return the mean of a token loss over the unmasked tokens, a scalar with the same value on all ranks.

        Args:
            loss_output: [b, s] or a `SummedLoss`, alone or as (loss, tp_reduce, is_sequence_parallel).
            mask: [b, s], zero for masked tokens.
        """
        tp_reduce = is_sequence_parallel = False
        if isinstance(loss_output, tuple):
            loss_output, tp_reduce, is_sequence_parallel = loss_output
        counted, tokens = self._counted
        if counted is not mask:
            tokens = self._tokens_of_sequence(mask.sum().float())
        tokens = tokens.clamp(min=1.0)
        if is_sequence_parallel:
            rank = parallel_state.get_tensor_model_parallel_rank()
            mask = mask.tensor_split(self._tp_size, dim=1)[rank]
        if isinstance(loss_output, SummedLoss):
            loss = loss_output.masked_sum(mask) / tokens
        else:
            loss = (loss_output.reshape(-1).float() * mask.reshape(-1).float()).sum() / tokens
        if self._cp_size > 1:
            loss = sum_value_over(loss, parallel_state.get_context_parallel_group())
        if tp_reduce or is_sequence_parallel:
            loss = sum_value_over(loss, parallel_state.get_tensor_model_parallel_group())
        return loss

    def _tokens_of_sequence(self, tokens: Tensor) -> Tensor:
        """Return a number of tokens summed over the ranks that share the sequences."""
        if self._cp_size == 1:
            return tokens
        tokens = tokens.clone()
        torch.distributed.all_reduce(tokens, group=parallel_state.get_context_parallel_group())
        return tokens


class DistillationGPTModel(llm.GPTModel):
    """GPT model that trains a student to match a frozen teacher.

    Its checkpoints contain only the student, and their context names the student's own class.
    """

    def io_init(self, **kwargs) -> fdl.Config:
        """Return the configuration that a checkpoint's context stores: the student as a plain model.

        (NeMo calls this method for the context of a model. By default the result depends on what else the process has
        built: a context of this class, or, once any ``GPTModel`` exists, one without the teacher, which cannot be
        loaded.)

        Args:
            **kwargs: arguments of a constructor.
        """
        return fdl.Config(llm.GPTModel, **{name: value for name, value in kwargs.items() if name in _OF_STUDENT})

    def __init__(
        self,
        config: TransformerConfig,
        teacher_config: TransformerConfig,
        teacher_ckpt_path: str,
        distillation_config_path: str | None = None,
        optim: OptimizerModule | None = None,
        tokenizer: TokenizerSpec | None = None,
        model_transform: Callable[[nn.Module], nn.Module] | None = None,
    ):
        """Store the arguments; `configure_model` checks the settings and builds the models.

        (After a constructor has raised an error, NeMo's telemetry rejects every later model of the process.)

        Args:
            config: configuration of the student.
            teacher_config: configuration of the teacher.
            teacher_ckpt_path: NeMo checkpoint of the teacher, or a recorded teacher written by `dump_teacher_topk`.
            distillation_config_path: YAML file with a ``DistillationConfig``; by default only the logits are compared.
            optim: optimizer.
            tokenizer: tokenizer.
            model_transform: applied to the model during setup.

        Raises:
            ModelOptConfigError: If the configuration sets an interleaved pipeline.
        """
        super().__init__(config, optim, tokenizer, model_transform)
        self._training_loss_reduction: _DistillationLossReduction | None = None
        self._teacher_config = teacher_config
        self._teacher_ckpt_path = teacher_ckpt_path
        self._distillation_config_path = distillation_config_path
        self._settings = DistillationConfig()
        self._fused_logits: bool | None = None
        self._started = 0.0
        self._watch = LossWatch()
        self._validation: DistillationValidation | None = None
        if not all(isinstance(c, llm.GPTConfig) for c in (config, teacher_config)):
            logging.warning(
                "Student and Teacher configs should both inherit from llm.GPTConfig. They are "
                f"{type(config).__name__} (student) and {type(teacher_config).__name__} (teacher)."
            )
        refuse_virtual_pipeline(config)

    def configure_model(self):
        """Build the student, load the teacher and combine them in one model; later calls do nothing.

        Raises:
            ModelOptConfigError: If student, teacher and settings do not fit together, before anything is built.
        """
        if hasattr(self, "module"):
            return
        plan = make_plan(self)
        student = self.config.configure_model(self.tokenizer)
        if plan.is_real:
            student = completed(student, self.config)
        settings = load_distillation_config(plan.settings, self.config, plan.teacher_config)
        if plan.is_real:
            check_student_layers(student, settings.criterion or {})
        if plan.entries is not None:
            logits_loss: Any = (settings.criterion or {}).get(settings.logit_pair)
            if logits_loss is not None:
                logits_loss.entries = plan.entries
        kd_config = {
            "teacher_model": (recorded_teacher, [plan.teacher_config, self._teacher_ckpt_path], {})
            if plan.recorded
            else (
                teacher_provider,
                [plan.teacher_config, self._teacher_ckpt_path],
                {"tokenizer": self.tokenizer, "trainer": self.trainer},
            ),
            "criterion": settings.criterion,
            "loss_balancer": settings.loss_balancer,
        }
        if plan.is_real:
            settings.sample_length = sample_length(getattr(self.trainer, "datamodule", None))
        distillation_model = mtd.convert(student, mode=[("kd_loss", kd_config)])
        adjust_distillation_model_for_mcore(distillation_model, distill_cfg=settings)
        self.module = distillation_model

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; ``training`` is set on the models inside as well (Lightning's sanity check assigns it)."""
        super().__setattr__(name, value)
        if name == "training":
            for child in self.children():
                child.train(value)

    def data_step(self, dataloader_iter) -> dict[str, Any]:
        """Return the next micro-batch, as a ``GPTModel`` does, and pass it to a recorded teacher."""
        teacher = getattr(self.core_module, "_teacher_model", None)
        if self.training and is_aligned(self._settings):
            state = state_of(self.core_module)
            loss = state.settings.criterion[state.settings.logit_pair]
            dataloader_iter = Shown(dataloader_iter, partial(see_aligned, state, loss))
        elif self.training and isinstance(teacher, RecordedTeacher):
            dataloader_iter = Shown(dataloader_iter, teacher.see)
        return super().data_step(dataloader_iter)

    def get_inference_wrapper(self, *args, **kwargs) -> Tensor:
        """Raise an error: a model in distillation does not generate text.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "Please restore a checkpoint of this model to its original class to call `get_inference_wrapper`: a "
            "DistillationGPTModel does not generate text."
        )

    @property
    def training_loss_reduction(self) -> _DistillationLossReduction:
        """The reduction of training losses, created on first use."""
        if not self._training_loss_reduction:
            options: dict[str, Any] = {}
            if getattr(getattr(self, "config", None), "calculate_per_token_loss", False):
                options["per_token_loss"] = True
            pairs = getattr(getattr(self, "_settings", None), "intermediate_layer_pairs", None)
            if pairs:
                options["pairs"] = pairs
            self._training_loss_reduction = _DistillationLossReduction(
                distillation_loss_fn=self.core_module.compute_kd_loss, **options
            )
        return self._training_loss_reduction

    @property
    def validation_loss_reduction(self):
        """The reduction of validation losses: NeMo's, plus the metrics if ``validation_metrics`` is set."""
        if not self._settings.validation_metrics:
            return super().validation_loss_reduction
        if self._validation is None:
            self._validation = DistillationValidation(self._metrics, self._validation_sums)
        return self._validation

    def _validation_sums(self, batch: dict[str, Tensor], forward_out: Tensor) -> Tensor:
        return self.training_loss_reduction.forward(batch, forward_out)[-1]["kd_sums"]

    @property
    def _metrics(self) -> Metrics:
        return Metrics(self._settings.intermediate_layer_pairs)

    def on_fit_start(self) -> None:
        """Warn if no checkpoint is loaded into the student: ``llm.distill`` of nemo-toolkit 2.5 does not load it."""
        super().on_fit_start()
        if not self.trainer.ckpt_path and getattr(self.trainer.strategy, "restore_config", None) is None:
            logging.warning(
                "Distillation: no checkpoint is loaded into the student. Its weights are random unless this program "
                "set them. With nemo-toolkit 2.5, pass resume=AutoResume(restore_config=RestoreConfig(path=...))."
            )

    def on_validation_start(self) -> None:
        """Enable all metrics during validation."""
        super().on_validation_start()
        state_of(self.core_module).observing = True

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation."""
        super().on_validation_epoch_end()
        means = self._validation.take_means() if self._validation is not None else {}
        left_out = {"lm_loss"} if self._settings.skip_lm_loss else set()
        for name, value in means.items():
            if name not in left_out:
                self.log(f"val_{name}", value, batch_size=1)

    @property
    def core_module(self):
        """The Megatron-Core model inside the wrappers."""
        return unwrap_model(self.module)

    def sharded_state_dict(self, prefix: str = "", *args, **kwargs) -> dict[str, Any]:
        """Return the sharded state of the student, with one ``module.`` in its keys during a training and after it.

        (During a training NeMo takes the prefix of the innermost model. Afterwards it adds one for each wrapper, and
        cannot load the checkpoints that it then saves.)

        Args:
            prefix: added to the front of every key.
            *args: passed to the student's own method.
            **kwargs: passed to the student's own method.
        """
        return self.core_module.sharded_state_dict(f"{prefix}module.", *args, **kwargs)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Load the student's weights, from keys with any number of ``module.`` prefixes.

        The core model's own method is called because it leaves out the teacher; the method of this class would not.
        """
        weights = {strip_module_prefix(key): value for key, value in state_dict.items()}
        return self.core_module.load_state_dict(weights, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remove the projections of intermediate losses from a weights-only checkpoint.

        They are not part of the student. A checkpoint to resume from keeps them, together with their optimizer state.
        """
        super().on_save_checkpoint(checkpoint)
        if "optimizer_states" in checkpoint or not len(getattr(self.core_module, "loss_modules", ())):
            return
        with self.core_module.hide_loss_modules():
            checkpoint["sharded_state_dict"] = self.trainer.strategy.megatron_parallel.sharded_state_dict()

    def on_train_batch_start(self, batch, batch_idx) -> None:
        """Compute the expensive metrics only on logging steps, and have the update of the weights checked."""
        every = getattr(self.trainer, "log_every_n_steps", 1) or 1
        state = state_of(self.core_module)
        state.step = self.trainer.global_step + 1
        state.observing = state.step % every == 0
        check_updates(self.config, self.module, self.core_module)
        self._started = time.perf_counter()

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        """Log the metrics of this global batch, with the same values on every rank, and the speed."""
        state = state_of(self.core_module)
        if self._fused_logits is None:
            # The last stage decides; all stages log.
            self._fused_logits = any(gather_over_stages(state.fused))
        left_out = not_logged(self._settings, state.observing, self._fused_logits, is_recorded(self.core_module))
        metrics = self._metrics
        sums = sums_of_last_stage(self._training_loss_reduction, metrics)
        means = metrics.means(sums)
        for name, value in means.items():
            if name not in left_out:
                self.log(name, value, batch_size=1)
        if state.observing:
            self._watch.see(float(means["kd_logits_loss"]), state.step)
        self.log("tokens_per_second", sums[-1] / (time.perf_counter() - self._started), batch_size=1)

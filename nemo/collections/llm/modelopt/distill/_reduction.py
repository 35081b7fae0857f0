"""The metrics of a distillation, summed over the micro-batches and ranks of a training step or a validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction
from torch import Tensor

from ._aligned import is_aligned
from ._kd_loss import PAIR

# Key among the losses of a micro-batch, by the name in the log.
_METRICS = {
    "kd_loss": "kd_loss",
    "kd_logits_loss": "logits_loss",
    "kd_intermediate_loss": "intermediate_loss",
    "lm_loss": "lm_loss",
    "kd_top1_agreement": "top1_agreement",
    "teacher_lm_loss": "teacher_lm_loss",
}


def without_ignored(mask: Tensor, labels: Any) -> Tensor:
    """Return the loss mask with zeros for tokens whose label is negative, such as the ignore index -100.

    Args:
        mask: [b, s].
        labels: next tokens [b, s]; anything else leaves the mask as it is.
    """
    if not isinstance(labels, Tensor) or labels.shape != mask.shape:
        return mask
    return mask * (labels >= 0)


class Metrics:
    """The names of the metrics, and one tensor that holds all of their sums, for one collective.

    Attributes:
        keys: key among the losses of a micro-batch, by the name in the log; in the order of the sums.
    """

    def __init__(self, pairs: Sequence[Sequence[str]] = ()):
        """Add a metric for each intermediate layer pair.

        Args:
            pairs: ``intermediate_layer_pairs`` of the settings.
        """
        of_pairs = {f"kd_intermediate_loss/{'-'.join(pair[:2])}": PAIR.format(i) for i, pair in enumerate(pairs)}
        self.keys = _METRICS | of_pairs

    def sums(self, losses: Mapping[str, Tensor], mask: Tensor) -> Tensor:
        """Return [metrics + 2]: each metric summed over the unmasked tokens, their number, and that of all tokens.

        Args:
            losses: means over the unmasked tokens of a micro-batch, by key; a missing metric is zero.
            mask: [b, s], zero for masked tokens.
        """
        tokens = mask.sum().float()
        means = [losses[key].detach().float() if key in losses else tokens * 0 for key in self.keys.values()]
        return torch.cat([torch.stack(means) * tokens, tokens.view(1), tokens.new_full((1,), mask.numel())])

    def no_sums(self, device: Any) -> Tensor:
        """Return the sums of no micro-batch."""
        return torch.zeros(len(self.keys) + 2, device=device)

    def means(self, sums: Tensor) -> dict[str, Tensor]:
        """Return the means over the unmasked tokens, by the name in the log."""
        *values, tokens, _ = sums
        return {name: value / tokens.clamp(min=1.0) for name, value in zip(self.keys, values, strict=True)}


def not_logged(settings: Any, observing: bool, fused: bool, recorded: bool) -> set[str]:
    """Return the metrics that a training step does not compute.

    Args:
        settings: a ``DistillationConfig``.
        observing: whether the step computes the expensive metrics.
        fused: whether the logits loss is fused, which counts the agreement itself.
        recorded: whether the teacher is recorded.
    """
    aligned = is_aligned(settings)
    left_out = {"lm_loss"} if settings.skip_lm_loss else set()
    if aligned or (not observing and not fused):
        left_out.add("kd_top1_agreement")
    if aligned or not observing or recorded:
        left_out.add("teacher_lm_loss")
    return left_out


def sums_of_last_stage(reduction: Any, metrics: Metrics) -> Tensor:
    """Return the sums of the last global batch on every pipeline stage; only the last stage computes them.

    Args:
        reduction: the reduction of training losses, None before its first use.
        metrics: the metrics.
    """
    sums = reduction.take_sums() if reduction else None
    if sums is None:
        sums = metrics.no_sums(torch.cuda.current_device())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            sums,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return sums


class DistillationValidation(MaskedTokenLossReduction):
    """NeMo's own validation loss, and the metrics of the distillation summed up on the way."""

    def __init__(self, metrics: Metrics, sums_of: Callable[[dict[str, Tensor], Tensor], Tensor]):
        """Keep the metrics and their source.

        Args:
            metrics: the metrics.
            sums_of: returns their sums for a batch and the model's output.
        """
        super().__init__(validation_step=True)
        self._metrics = metrics
        self._sums_of = sums_of
        self._sums: Tensor | None = None

    def forward(self, batch: dict[str, Tensor], forward_out: Tensor):
        """Return NeMo's validation loss of a micro-batch."""
        sums = self._sums_of(batch, forward_out)
        self._sums = sums if self._sums is None else self._sums + sums
        return super().forward(batch, forward_out)

    def take_means(self) -> dict[str, Tensor]:
        """Return the means over the unmasked tokens of the validation and reset them; empty if there were none."""
        sums, self._sums = self._sums, None
        if sums is None:
            return {}
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return self._metrics.means(sums)

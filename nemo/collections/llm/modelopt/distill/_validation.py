"""What training logs, in validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction
from torch import Tensor


class DistillationValidation(MaskedTokenLossReduction):
    """NeMo's own validation loss, and the parts of the distillation loss summed up on the way."""

    def __init__(self, parts: Callable[[dict[str, Tensor], Tensor], dict[str, Any]]):
        """Remember how parts are made.

        Args:
            parts: returns of a batch and the model's output the report with ``kd_sums``, the sums over the tokens that
                count, and ``loss_sum_and_ub_size``, whose second number counts them.
        """
        super().__init__(validation_step=True)
        self._parts = parts
        self._sums: Tensor | None = None

    def forward(self, batch: dict[str, Tensor], forward_out: Tensor):
        """Return NeMo's validation loss of a micro-batch."""
        report = self._parts(batch, forward_out)
        sums = torch.cat([report["loss_sum_and_ub_size"][1:], report["kd_sums"]])
        self._sums = sums if self._sums is None else self._sums + sums
        return super().forward(batch, forward_out)

    def take_means(self) -> Tensor | None:
        """Return the means over the tokens of the validation that count, once; None where there was none."""
        sums, self._sums = self._sums, None
        if sums is None:
            return None
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return sums[1:-1] / sums[0].clamp(min=1.0)

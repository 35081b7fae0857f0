"""Measurements on held-out data: forward passes through the pipeline, masked sums, and the KL to the original model.

Every measurement of this package follows the same rule for masks: a token counts with the weight that the loss mask
gives it, and a token of weight zero counts nothing, whatever its loss is (padding may have labels that are no tokens,
and losses that are NaN).

Source of the forward passes: ``megatron.core.pipeline_parallel.schedules``, as training uses it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from ._divergence import vocab_parallel


def run_forward(
    core: Any,
    batches: Sequence[Any],
    forward_step: Callable,
    shape: Callable[[Any], tuple[int, int]],
    iterate: Callable[[list[Any]], Iterator] = iter,
) -> list[Any]:
    """Run micro-batches through all pipeline stages without gradients, those of one shape together.

    Args:
        core: This rank's pipeline stage: a Megatron-Core model.
        batches: The micro-batches; all stages must pass the same number, with the same shapes.
        forward_step: Megatron's ``forward_step_func(iterator, model)``.
        shape: Returns the micro-batch's sizes ``(b, s)``.
        iterate: Returns an iterator over a run of micro-batches, for example one that advances a progress bar.

    Returns:
        What Megatron's schedule returns of each micro-batch: the second value of the loss function on the last stage,
        nothing on the others.
    """
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    outputs: list[Any] = []
    for same in same_shape_runs(batches, shape):
        rows, length = shape(same[0])
        with torch.no_grad():
            found = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterate(same),
                model=core,
                num_microbatches=len(same),
                seq_length=length,
                micro_batch_size=rows,
                forward_only=True,
            )
        outputs += found or []
    return outputs


def same_shape_runs(batches: Sequence[Any], shape: Callable[[Any], tuple[int, ...]]) -> Iterator[list[Any]]:
    """Yield runs of consecutive micro-batches of one shape: pipeline stages exchange tensors of a fixed shape."""
    for _, run in itertools.groupby(batches, key=shape):
        yield list(run)


def weighted_sum(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the sum of values weighted by the loss mask, in fp64; values of weight zero do not count.

    Args:
        values: Losses or divergences of tokens, of any shape.
        weights: The loss mask in the same shape; None counts every token once.
    """
    if weights is None:
        return values.double().sum()
    weights = weights.to(values.device, torch.float64)
    # The host would wait for the size of a selection; an infinite value of weight zero is left out all the same.
    return torch.where(weights > 0, values.double() * weights, 0.0).sum()


def divergence(logits: Tensor, original: Tensor) -> Tensor:
    """Return KL(original || logits) `[...]` in nats a token of fp32 logits `[..., v]`; ranks may hold parts of `v`."""
    return vocab_parallel.kl_divergence(logits, original, group=parallel_state.get_tensor_model_parallel_group())

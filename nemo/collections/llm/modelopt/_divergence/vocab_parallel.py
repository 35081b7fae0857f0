"""Compute exact divergences between two sets of logits, also with a vocabulary split over tensor-parallel ranks.

Shapes: n tokens, v vocabulary entries held by this rank (shards may be uneven), r ranks. The formulas are in
``chunk``; this module loops over chunks of tokens and combines ranks.

A whole vocabulary needs one pass, because the sums of a chunk are final at once. With a split one, three numbers per
shard determine the rest: its log-sum-exp of the teacher, that of the student, and its expectation E_k. With the weight
w_k = exp(lse_k - lse) of shard k, lse = logsumexp_k(lse_k) and E = sum_k w_k E_k. A log-sum-exp is sent as a maximum
and a logarithm, so that maxima are subtracted before anything is rounded. One all-gather of [5, n] makes
value and gradient global on every rank (JSD needs a second collective, because its expectation depends on the global
sums), and the backward pass needs no communication. Numbers of several ranks are combined in fp64.

Memory: chunks of tokens fit the cache. The gradient is computed during the forward pass in one buffer of the student
logits' dtype (chunks are accumulated in fp32), and scaled in place by the incoming gradient; neither logits nor
probabilities are saved. With ``in_place`` the student's logits are that buffer, with ``reuse_teacher`` the teacher's.

Sources: the vocab-parallel cross entropy of Megatron-LM (arXiv 1909.08053) for the reduction over shards; the gradient
in the forward pass follows Liger-Kernel (arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nemo_modelopt_dropin.preflight import loss_memory

from .._parallel import gather_tensors
from .chunk import DIRECTIONS, FORWARD, JSD, LOWEST, REVERSE, Chunk, resolved, wide, without_autocast
from .topk import topk_divergence

__all__ = ["DIRECTIONS", "FORWARD", "JSD", "REVERSE", "kl_divergence"]


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    direction: str = FORWARD,
    group=None,
    chunk_rows: int | None = None,
    *,
    topk: int | None = None,
    in_place: bool = False,
    reuse_teacher: bool = False,
    beta: float = 0.5,
) -> Tensor:
    """Return the divergence of every token, equal on all ranks of ``group``.

    Args:
        student: logits [..., v], this rank's shard of the vocabulary; gradients flow into it.
        teacher: logits of the same shape; a constant.
        temperature: divides both logits.
        direction: ``forward`` for KL(teacher || student), ``reverse`` for KL(student || teacher), ``jsd`` for the
            Jensen-Shannon divergence.
        group: process group over which the vocabulary is split; None if it is whole.
        chunk_rows: tokens of a chunk; by default chosen from the size of the cache.
        topk: compare only the teacher's top-k logits, and all others as one bucket.
        in_place: overwrite the student's logits with their gradient. Nothing else may need them.
        reuse_teacher: overwrite the teacher's logits with the gradient if they have the student's type. Nothing else
            may need them.
        beta: weight of the teacher in the mixture of ``jsd``; 0 is the forward and 1 the reverse KL.

    Returns:
        Tensor of shape [...], fp32 (fp64 for logits in fp64).
    """
    tokens = student.shape[:-1]
    flat = student.reshape(-1, student.shape[-1])
    rows = chunk_rows or default_chunk_rows(flat)
    flat_teacher = teacher.reshape(-1, teacher.shape[-1])
    spare = None
    if in_place:
        spare = flat
    elif reuse_teacher and flat_teacher.dtype == flat.dtype:
        spare = flat_teacher
    # Autocast would compute the expectations, which are products of fp32 numbers, in half precision.
    with without_autocast(flat.device):
        loss = _KLDivergence.apply(flat, flat_teacher, temperature, direction, beta, group, rows, topk, spare)
    return loss.view(tokens)


class _KLDivergence(torch.autograd.Function):
    """The divergence of [n, v] logits; the forward pass computes its gradient (see the module's docstring)."""

    @staticmethod
    def forward(ctx, student, teacher, temperature, direction, beta, group, rows, topk, spare):
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty_like(student) if spare is None else spare.detach()
        ctx.gradient = gradient
        return divergence_with_gradient(student, teacher, temperature, direction, group, rows, topk, gradient, beta)

    @staticmethod
    def backward(ctx, grad_output):
        if ctx.gradient is None:
            raise RuntimeError(
                "The gradient of the KL divergence was already used: it is scaled in place, so a second backward "
                "pass needs a second forward pass."
            )
        gradient, ctx.gradient = ctx.gradient, None
        scale_rows(gradient, grad_output)
        return gradient, None, None, None, None, None, None, None, None


def divergence_with_gradient(student, teacher, temperature, direction, group, rows, topk, gradient, beta=0.5) -> Tensor:
    """Return the divergence of each token [n] and write d/d(student) to ``gradient`` [n, v] unless it is None.

    ``gradient`` may share the memory of either model's logits: a chunk is read before it is written.
    """
    if group is not None and torch.distributed.get_world_size(group) == 1:
        group = None
    direction = resolved(direction, beta)
    if topk is not None:
        return topk_divergence(student, teacher, temperature, direction, group, rows, topk, gradient, beta)
    chunk = Chunk(min(rows, max(1, len(student))), student, temperature, beta)
    if group is None:
        return _whole_vocabulary(chunk, student, teacher, direction, rows, gradient)
    return _sharded_vocabulary(chunk, student, teacher, direction, rows, gradient, group)


def _whole_vocabulary(chunk: Chunk, student, teacher, direction, rows, gradient) -> Tensor:
    """Compute value and gradient chunk by chunk in one pass; the rows' maxima cancel."""
    loss = student.new_empty(student.shape[0], dtype=wide(student.dtype))
    for part in token_chunks(student, rows):
        chunk.load(student[part], teacher[part])
        if direction == JSD:
            mean, with_q = chunk.jsd_parts()
            loss[part] = (1.0 - chunk.beta) * mean + chunk.beta * with_q
        else:
            sign = 1.0 if direction == FORWARD else -1.0
            log_z, log_y = chunk.log_sums
            mean = loss[part] = chunk.mean_difference(direction) + sign * (log_z - log_y)
        if gradient is not None:
            chunk.write_gradient(gradient[part], direction, mean)
    return loss


def _sharded_vocabulary(chunk: Chunk, student, teacher, direction, rows, gradient, group) -> Tensor:
    """Compute statistics of every token, one all-gather, then the gradient.

    Exponentials are computed twice, which is cheaper than keeping them.
    """
    n = student.shape[0]
    maxima = student.new_empty(2, n, dtype=wide(student.dtype))
    local = torch.empty(5, n, dtype=torch.float64, device=student.device)
    for part in token_chunks(student, rows):
        chunk.load(student[part], teacher[part])
        maxima[0, part], maxima[1, part] = chunk.max_z.squeeze(-1), chunk.max_y.squeeze(-1)
        local[:4, part] = chunk.shard_statistics()
        if direction != JSD:
            local[4, part] = chunk.mean_difference(direction)
    shards = gather_tensors(local if direction != JSD else local[:4], group)
    # This shard's maxima relative to those of the whole vocabulary, bounded like the logits themselves.
    lower = (shards[:, :2] - shards[:, :2].amax(0)).clamp_(min=LOWEST)
    sums = shards[:, 2:4] + lower
    lse = sums.logsumexp(0)
    logs = (lse - lower[torch.distributed.get_rank(group)]).to(maxima.dtype)
    if direction == JSD:
        return _sharded_jsd(chunk, student, teacher, rows, gradient, group, maxima, logs)
    weighed_by, sign = (1, 1.0) if direction == FORWARD else (0, -1.0)
    means = shards[:, 4] + sign * (lower[:, 1] - lower[:, 0])
    expectation = ((sums[:, weighed_by] - lse[weighed_by]).exp() * means).sum(0)
    loss = (expectation + sign * (lse[0] - lse[1])).to(maxima.dtype)
    if gradient is not None:
        for part in token_chunks(student, rows):
            chunk.load(student[part], teacher[part], maxima[:, part], difference=direction != FORWARD)
            chunk.write_gradient(gradient[part], direction, loss[part], logs[:, part])
    return loss


def _sharded_jsd(chunk: Chunk, student, teacher, rows, gradient, group, maxima, logs) -> Tensor:
    """Compute JSD from the sums over the whole vocabulary."""
    parts = torch.empty(2, student.shape[0], dtype=torch.float64, device=student.device)
    for part in token_chunks(student, rows):
        chunk.load(student[part], teacher[part], maxima[:, part])
        parts[:, part] = chunk.jsd_parts(logs[:, part]).double()
    torch.distributed.all_reduce(parts, group=group)
    if gradient is not None:
        mean = parts[0].to(maxima.dtype)
        for part in token_chunks(student, rows):
            chunk.load(student[part], teacher[part], maxima[:, part])
            chunk.jsd_parts(logs[:, part])
            chunk.write_gradient(gradient[part], JSD, mean[part], logs[:, part])
    return ((1.0 - chunk.beta) * parts[0] + chunk.beta * parts[1]).to(maxima.dtype)


def scale_rows(tensor: Tensor, factors: Tensor) -> None:
    """Multiply the rows of [n, v] in place by [n] factors, each product computed in fp32 at least."""
    if tensor.dtype == wide(tensor.dtype) or tensor.device.type != "cpu":
        tensor.mul_(factors.unsqueeze(-1))
        return
    # On a CPU a product of two types is ten times slower than conversions in the cache.
    rows = default_chunk_rows(tensor)
    buffer = torch.empty(min(rows, max(1, len(tensor))), tensor.shape[1], dtype=torch.float32)
    for part in token_chunks(tensor, rows):
        chunk = buffer[: len(tensor[part])].copy_(tensor[part])
        tensor[part] = chunk.mul_(factors[part].unsqueeze(-1))


def token_chunks(tensor: Tensor, rows: int) -> Iterator[slice]:
    """Yield slices of ``rows`` tokens of a tensor [n, ...]."""
    for start in range(0, tensor.shape[0], rows):
        yield slice(start, start + rows)


def default_chunk_rows(flat: Tensor) -> int:
    """Return the number of tokens of a chunk of [n, v] logits."""
    return loss_memory.chunk_rows(flat.shape[0], flat.shape[1], flat.element_size(), flat.device.type)

"""Exact KL divergence between two sets of logits whose vocabulary may be split over tensor-parallel ranks.

Shapes: n tokens, v vocabulary entries held by this rank (shards may be uneven), r ranks.

With temperature T let z = student / T and y = teacher / T over the whole vocabulary, p = softmax(z), q = softmax(y)::

    forward   KL(q || p) = E_q[y - z] - lse(y) + lse(z)        d/dz = p - q
    reverse   KL(p || q) = E_p[z - y] - lse(z) + lse(y)        d/dz = p * (z - lse(z) - y + lse(y) - KL(p || q))

and d/d(student) = (d/dz) / T. A shard holds its own softmax, log-sum-exp and expectation. Three numbers a token,
(lse of the shard's y, lse of its z, its expectation), determine the rest: with w_k = exp(lse_k - lse) the weight of
shard k, lse = logsumexp_k(lse_k), E = sum_k w_k E_k, and p restricted to shard k is w_k times its softmax. So one
all-gather of [3, n] makes value and gradient global on every rank, and the backward pass needs no communication.

Memory: tokens are taken in chunks that fit the cache. The gradient is formed during the forward pass in one buffer of
the student logits' dtype (chunks are accumulated in fp32), and scaled in place by the incoming gradient; neither
logits nor probabilities are saved. The statistics are combined in fp64, after each row's maximum was taken out, so
that logits with large common offsets lose nothing.

-inf logits (masked entries) count as a very low finite number: where both models mask an entry it contributes nothing,
and where only the student does, the divergence is huge instead of infinite, so that no NaN can arise.

Sources: the vocab-parallel cross entropy of Megatron-LM (arXiv 1909.08053) for the reduction over shards; the gradient
in the forward pass follows Liger-Kernel (arXiv 2410.10989).
"""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD, REVERSE = "forward", "reverse"
DIRECTIONS = (FORWARD, REVERSE)

_LOWEST = -1.0e30
# Bytes of one fp32 chunk: near the L2 cache on a CPU; on a GPU large enough to hide the launches.
_CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    direction: str = FORWARD,
    group=None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Return the divergence of every token, equal on all ranks of ``group``.

    Args:
        student: logits [..., v], this rank's shard of the vocabulary; gradients flow into it.
        teacher: logits of the same shape; a constant.
        temperature: divides both logits.
        direction: ``forward`` for KL(teacher || student), ``reverse`` for KL(student || teacher).
        group: process group over which the vocabulary is split; None when it is whole.
        chunk_rows: tokens worked on at a time; chosen from the size of the cache by default.

    Returns:
        Tensor of shape [...], fp32.
    """
    tokens = student.shape[:-1]
    flat = student.reshape(-1, student.shape[-1])
    rows = chunk_rows or _default_chunk_rows(flat)
    loss = _KLDivergence.apply(flat, teacher.reshape(-1, teacher.shape[-1]), temperature, direction, group, rows)
    return loss.view(tokens)


class _KLDivergence(torch.autograd.Function):
    """The divergence of [n, v] logits with its gradient formed on the way (see the module's docstring)."""

    @staticmethod
    def forward(ctx, student, teacher, temperature, direction, group, rows):
        needs_grad = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student) if needs_grad else None
        if group is None or torch.distributed.get_world_size(group) == 1:
            loss = _whole_vocabulary(student, teacher, temperature, direction, rows, gradient)
        else:
            loss = _sharded_vocabulary(student, teacher, temperature, direction, rows, gradient, group)
        ctx.gradient = gradient
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        if ctx.gradient is None:
            raise RuntimeError(
                "The gradient of the KL divergence was handed out already: it is scaled in place, so a second "
                "backward pass needs a second forward pass."
            )
        gradient, ctx.gradient = ctx.gradient, None
        # In place, in the logits' dtype; the product itself is computed in the wider of the two types.
        gradient.mul_(grad_output.unsqueeze(-1))
        return gradient, None, None, None, None, None


def _whole_vocabulary(student, teacher, temperature, direction, rows, gradient) -> Tensor:
    """Value and gradient chunk by chunk in one pass: the statistics of a chunk are final at once."""
    loss = torch.empty(student.shape[0], dtype=torch.float32, device=student.device)
    chunk = _Chunk(student, rows)
    for start in range(0, student.shape[0], rows):
        part = slice(start, start + rows)
        chunk.load(student[part], teacher[part], temperature)
        stats = chunk.statistics(direction)
        value = _value(stats[0], stats[1], stats[2], direction)
        loss[part] = value
        if gradient is not None:
            shift = chunk.log_ratio_shift(stats[0], stats[1]) if direction == REVERSE else None
            chunk.write_gradient(gradient[part], None, None, shift, value, temperature, direction)
    return loss


def _sharded_vocabulary(student, teacher, temperature, direction, rows, gradient, group) -> Tensor:
    """Statistics of every token, one all-gather, then the gradient: probabilities are cheaper made twice than kept."""
    chunk = _Chunk(student, rows)
    local = torch.empty(3, student.shape[0], dtype=torch.float64, device=student.device)
    for start in range(0, student.shape[0], rows):
        part = slice(start, start + rows)
        chunk.load(student[part], teacher[part], temperature)
        local[:, part] = chunk.statistics(direction)
    shards = _all_gather(local, group)
    lse_teacher, lse_student = shards[:, 0].logsumexp(0), shards[:, 1].logsumexp(0)
    weighed_by, lse = (0, lse_teacher) if direction == FORWARD else (1, lse_student)
    expectation = ((shards[:, weighed_by] - lse).exp() * shards[:, 2]).sum(0)
    loss = _value(lse_teacher, lse_student, expectation, direction).float()
    if gradient is not None:
        weight_teacher = (local[0] - lse_teacher).exp().float()
        weight_student = (local[1] - lse_student).exp().float()
        for start in range(0, student.shape[0], rows):
            part = slice(start, start + rows)
            chunk.load(student[part], teacher[part], temperature)
            shift = chunk.log_ratio_shift(lse_teacher[part], lse_student[part]) if direction == REVERSE else None
            chunk.write_gradient(
                gradient[part], weight_teacher[part], weight_student[part], shift, loss[part], temperature, direction
            )
    return loss


class _Chunk:
    """Reused fp32 buffers of [rows, v] in which one chunk of tokens is worked on."""

    def __init__(self, like: Tensor, rows: int):
        shape = (min(rows, like.shape[0]), like.shape[1])
        self._buffers = [torch.empty(shape, dtype=torch.float32, device=like.device) for _ in range(4)]

    def load(self, student: Tensor, teacher: Tensor, temperature: float) -> None:
        """Take each row's maximum out of both logits, scale them and take their softmax over this shard."""
        self.z, self.y, self.p, self.q = (b[: student.shape[0]] for b in self._buffers)
        self.max_z, self.max_y = (
            _prepare(source, scaled, probability, temperature)
            for source, scaled, probability in ((student, self.z, self.p), (teacher, self.y, self.q))
        )

    def statistics(self, direction: str) -> Tensor:
        """Return [3, rows] in fp64: log-sum-exp of the teacher, of the student, and the shard's expectation.

        Afterwards ``y`` holds the logits' difference y - z without the rows' maxima.
        """
        # The largest softmax is exp(0) / sum: its logarithm is the log-sum-exp without another pass of exponentials.
        lse_y = self.max_y - self.q.amax(-1).log()
        lse_z = self.max_z - self.p.amax(-1).log()
        difference = self.y.sub_(self.z)
        if direction == FORWARD:
            expectation = torch.linalg.vecdot(self.q, difference) + (self.max_y - self.max_z)
        else:
            expectation = -torch.linalg.vecdot(self.p, difference) - (self.max_y - self.max_z)
        return torch.stack([lse_y, lse_z, expectation])

    def log_ratio_shift(self, lse_teacher: Tensor, lse_student: Tensor) -> Tensor:
        """Return [rows, 1] so that log p - log q = shift - (y - z without the maxima)."""
        return (lse_teacher - lse_student - self.max_y + self.max_z).float().unsqueeze(-1)

    def write_gradient(self, out, weight_teacher, weight_student, shift, value, temperature, direction) -> None:
        """Write d loss / d student of this chunk to ``out`` [rows, v], in its dtype."""
        if weight_student is not None:
            self.p.mul_(weight_student.unsqueeze(-1))
        if direction == FORWARD:
            if weight_teacher is not None:
                self.q.mul_(weight_teacher.unsqueeze(-1))
            self.p.sub_(self.q)
        else:
            # `statistics` has formed the difference where it ran on these very rows.
            difference = self.y if weight_teacher is None else self.y.sub_(self.z)
            self.p.mul_(difference.neg_().add_(shift - value.float().unsqueeze(-1)))
        torch.mul(self.p, 1.0 / temperature, out=out)


def _prepare(source: Tensor, scaled: Tensor, probability: Tensor, temperature: float) -> Tensor:
    """Fill ``scaled`` with (source - its maximum) / temperature and ``probability`` with its softmax.

    Returns:
        The maximum of each row divided by the temperature, [rows], fp64.
    """
    maximum = source.amax(-1, keepdim=True).float().clamp_(min=_LOWEST)
    torch.sub(source, maximum, out=scaled)
    scaled.clamp_(min=_LOWEST)
    if temperature != 1.0:
        scaled.div_(temperature)
    torch.softmax(scaled, dim=-1, out=probability)
    return maximum.squeeze(-1).double() / temperature


def _value(lse_teacher: Tensor, lse_student: Tensor, expectation: Tensor, direction: str) -> Tensor:
    sign = 1.0 if direction == FORWARD else -1.0
    return expectation - sign * (lse_teacher - lse_student)


def _all_gather(local: Tensor, group) -> Tensor:
    """Return [r, 3, n]: the statistics of every shard."""
    size = torch.distributed.get_world_size(group)
    gathered = local.new_empty(size * local.shape[0], local.shape[1])
    torch.distributed.all_gather_into_tensor(gathered, local, group=group)
    return gathered.view(size, *local.shape)


def _default_chunk_rows(flat: Tensor) -> int:
    bytes_of_chunk = _CHUNK_BYTES.get(flat.device.type, _CHUNK_BYTES["cuda"])
    return max(1, bytes_of_chunk // (4 * max(1, flat.shape[1])))

"""Extract the teacher's top-k logits, and compute a divergence from them without the teacher.

Shapes: n tokens, v vocabulary entries held by this rank, k entries recorded for each token, r ranks.

A record of a token is the k likeliest entries of the whole vocabulary, the teacher's logits there, and the log-sum-exp
of all its other logits divided by the temperature. A divergence over k + 1 buckets (see ``topk``) needs nothing else
from a teacher, at that temperature and for every smaller k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._parallel import gather_tensors
from .chunk import LOWEST, divergence_of_buckets, rest_and_lse, wide
from .vocab_parallel import scale_rows

# Bytes of one fp32 chunk.
_ROWS_BYTES = 1 << 23


@dataclass(frozen=True)
class RecordedLogits:
    """The recorded logits of a micro-batch.

    Attributes:
        entries: positions in the whole vocabulary [s, b, k], likeliest first.
        values: the teacher's logits there [s, b, k].
        rest: log-sum-exp of its other logits divided by the temperature [s, b], fp32.
        temperature: that temperature.
    """

    entries: Tensor
    values: Tensor
    rest: Tensor
    temperature: float


def top_entries(logits: Tensor, k: int, temperature: float, group=None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the record of each token: entries [n, k], values [n, k] in the logits' type, rest [n] in fp32.

    Args:
        logits: [n, v], this rank's shard of the vocabulary; shards are equally wide.
        k: number of entries to keep, at most the whole vocabulary.
        temperature: divides the logits in the rest.
        group: process group over which the vocabulary is split; None if it is whole.
    """
    n, v = logits.shape
    rank, size = (
        (0, 1) if group is None else (torch.distributed.get_rank(group), torch.distributed.get_world_size(group))
    )
    kept = min(k, v)
    offers, entries, rests = [], [], []
    buffer = torch.empty(min(n, _rows(v)), v, dtype=torch.float32, device=logits.device)
    for start in range(0, n, len(buffer)):
        part = logits[start : start + len(buffer)]
        values, places = part.topk(kept, dim=-1)
        offers.append(values)
        entries.append(places + rank * v)
        rests.append(rest_and_lse(buffer[: len(part)].copy_(part), places, temperature))
    values, places, rest = torch.cat(offers), torch.cat(entries), torch.cat(rests)
    if size == 1:
        return places, values, rest.float()
    values, places, rest = (torch.cat([*gather_tensors(x, group)], -1) for x in (values, places, rest.unsqueeze(-1)))
    # Stable, so that all ranks keep the same of equal logits.
    order = values.argsort(dim=-1, descending=True, stable=True)
    chosen, others = order[:, :k], order[:, k:]
    left = torch.cat([rest, values.gather(-1, others).double() / temperature], dim=-1).logsumexp(-1)
    return places.gather(-1, chosen), values.gather(-1, chosen), left.float()


def recorded_divergence(
    student: Tensor,
    teacher: RecordedLogits,
    direction: str,
    group=None,
    topk: int | None = None,
    in_place: bool = False,
    beta: float = 0.5,
) -> Tensor:
    """Return the divergence of every token [s, b] from a recorded teacher, equal on all ranks of ``group``.

    Args:
        student: logits [s, b, v], this rank's shard of the vocabulary; gradients flow into it.
        teacher: recorded logits of the whole vocabulary.
        direction: ``forward``, ``reverse`` or ``jsd``.
        group: process group over which the vocabulary is split; None if it is whole.
        topk: number of entries to compare; by default all recorded ones.
        in_place: overwrite the student's logits with their gradient.
        beta: weight of the teacher in the mixture of ``jsd``.
    """
    entries, values = teacher.entries.flatten(0, 1), teacher.values.flatten(0, 1).double() / teacher.temperature
    rest = teacher.rest.flatten().double()
    if topk is not None and topk < entries.shape[1]:
        rest = torch.cat([rest.unsqueeze(-1), values[:, topk:]], dim=-1).logsumexp(-1)
        entries, values = entries[:, :topk], values[:, :topk]
    buckets = torch.cat([values, rest.unsqueeze(-1)], dim=-1)
    flat = student.reshape(-1, student.shape[-1])
    if group is not None and torch.distributed.get_world_size(group) == 1:
        group = None
    loss = _RecordedDivergence.apply(flat, entries, buckets, teacher.temperature, direction, beta, group, in_place)
    return loss.view(student.shape[:-1])


class _RecordedDivergence(torch.autograd.Function):
    """Compute value and gradient in the forward pass, the gradient in one buffer of the logits' type."""

    @staticmethod
    def forward(ctx, student, entries, buckets, temperature, direction, beta, group, in_place):
        rank = 0 if group is None else torch.distributed.get_rank(group)
        n, v = student.shape
        places = entries - rank * v
        # Entries of other shards share one more column, which is ignored.
        places = torch.where((places >= 0) & (places < v), places, v)
        buffer = student.new_empty(min(max(n, 1), _rows(v)), v + 1, dtype=wide(student.dtype))
        own = torch.empty(n, buckets.shape[1], dtype=torch.float64, device=student.device)
        for start in range(0, n, len(buffer)):
            part = slice(start, start + len(buffer))
            own[part] = _own_buckets(student[part], places[part], temperature, buffer)
        ours = own if group is None else _of_all_shards(own, group)
        loss, gradients = divergence_of_buckets(ours, buckets, direction, beta)
        ctx.gradient = None
        if ctx.needs_input_grad[0]:
            ctx.gradient = student.detach() if in_place else torch.empty_like(student)
            for start in range(0, n, len(buffer)):
                part = slice(start, start + len(buffer))
                _write_gradient(
                    ctx.gradient[part],
                    student[part],
                    places[part],
                    temperature,
                    buffer,
                    gradients[part],
                    ours[part, -1],
                )
        return loss.to(buffer.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        if ctx.gradient is None:
            raise RuntimeError("The gradient was already used; a second backward pass needs a second forward pass.")
        gradient, ctx.gradient = ctx.gradient, None
        scale_rows(gradient, grad_output)
        return gradient, None, None, None, None, None, None, None


def _own_buckets(student, places, temperature, buffer) -> Tensor:
    """Return this shard's part of the student's buckets [c, k + 1] in fp64.

    Afterwards ``buffer`` [c, v + 1] holds the softmax of the rest.
    """
    buffer = buffer[: len(student)]
    buffer[:, :-1].copy_(student)
    buffer[:, -1] = LOWEST
    values = buffer.gather(-1, places).double().clamp_(min=LOWEST) / temperature
    return torch.cat([values, rest_and_lse(buffer, places, temperature).unsqueeze(-1)], dim=-1)


def _of_all_shards(own: Tensor, group) -> Tensor:
    """Return the student's buckets [n, k + 1] over all shards, with one collective."""
    shards = gather_tensors(own, group)
    # An entry lies on one shard and counts as lowest on the others.
    return torch.cat([shards[..., :-1].amax(0), shards[..., -1:].logsumexp(0)], dim=-1)


def _write_gradient(out, student, places, temperature, buffer, gradients, tail) -> None:
    """Write d/d(student) of a chunk [c, v].

    Args:
        out: [c, v]; may share the student's memory.
        student: logits [c, v].
        places: recorded entries on this shard, v for others [c, k].
        temperature: divides the logits.
        buffer: memory for [c, v + 1].
        gradients: gradients of the buckets [c, k + 1].
        tail: log-sum-exp of the student's rest over all shards [c].
    """
    buffer = buffer[: len(student)]
    own = _own_buckets(student, places, temperature, buffer)[:, -1]
    relative = (own - tail).clamp_(max=0.0).exp()
    buffer.mul_((gradients[:, -1] * relative / temperature).to(buffer.dtype).unsqueeze(-1))
    buffer.scatter_(-1, places, (gradients[:, :-1] / temperature).to(buffer.dtype))
    out.copy_(buffer[:, :-1])


def _rows(width: int) -> int:
    """Return the number of tokens of a chunk."""
    return max(1, _ROWS_BYTES // (4 * width))

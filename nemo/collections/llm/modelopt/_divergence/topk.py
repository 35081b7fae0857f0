"""Compute divergences over the teacher's top-k logits, with all other entries (the tail) as one more bucket.

Shapes: n tokens, v vocabulary entries held by this rank, r ranks, k entries compared.

Each model's tail has the logit lse_tail = logsumexp of its logits there, so both are distributions over k + 1 buckets
and the divergence D is that of small logits [k + 1]. Its gradient reaches the vocabulary by the chain rule: one of the
k entries gets that of its bucket, and an entry z of the tail gets exp(z - lse_tail) times that of the tail. Tail and
head are summed separately, which is more precise than 1 - sum if the tail is tiny.

With a split vocabulary every rank offers its own top k (both models' logits there) and the log-sum-exp of its rest.
After one all-gather of [2k + 2, n] each rank chooses the top k of all r * k, and adds the others to the tail.

On a CPU, selecting k of v entries costs more than their exponentials. So blocks are selected first, by their maxima:
the k blocks with the largest maxima hold k entries that no other block exceeds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._parallel import gather_tensors
from .chunk import LOWEST, divergence_of_buckets, rest_and_lse, wide

# Entries of a block in the selection of the top k, and the smallest number of blocks for each selected entry.
_BLOCK, _BLOCKS_FOR_EACH = 16, 2
# Buffers of [rows, v] that a chunk of the other divergences needs for each one here.
_LEANER = 3


def topk_divergence(student, teacher, temperature, direction, group, rows, topk, gradient, beta=0.5) -> Tensor:
    """Return the divergence of each token [n] and write d/d(student) to ``gradient`` [n, v] unless it is None.

    Args:
        student: logits [n, v].
        teacher: logits [n, v].
        temperature: divides both.
        direction: direction of the divergence.
        group: process group over which the vocabulary is split; None if it is whole.
        rows: tokens of a chunk of the other divergences.
        topk: k; the whole vocabulary if that is smaller.
        gradient: [n, v]; may share the student's memory.
        beta: weight of the teacher in the mixture of the JSD.
    """
    n, v = student.shape
    rows *= _LEANER
    loss = student.new_empty(n, dtype=wide(student.dtype))
    buffer = student.new_empty(min(rows, max(1, n)), v, dtype=loss.dtype)
    if group is not None:
        return _sharded(student, teacher, temperature, direction, group, rows, topk, gradient, beta, loss, buffer)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        offer, positions = _offer(student[part], teacher[part], temperature, topk, buffer)
        loss[part], own, tail = _choose(offer.unsqueeze(0), 0, topk, direction, beta)
        if gradient is not None:
            # The student was loaded last, so the buffer still holds the softmax of its tail.
            _write_gradient(gradient[part], buffer, positions, own, tail, offer[-1], temperature)
    return loss


def _sharded(student, teacher, temperature, direction, group, rows, topk, gradient, beta, loss, buffer) -> Tensor:
    rank = torch.distributed.get_rank(group)
    n, k = student.shape[0], topk
    kept = min(k, student.shape[1])
    # A shard with fewer than k entries offers all of them.
    local = torch.full((2 * k + 2, n), LOWEST, dtype=torch.float64, device=student.device)
    positions = torch.empty(n, kept, dtype=torch.int64, device=student.device)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        offer, positions[part] = _offer(student[part], teacher[part], temperature, topk, buffer)
        local[:kept, part], local[k : k + kept, part] = offer[:kept], offer[kept : 2 * kept]
        local[-2:, part] = offer[-2:]
    shards = gather_tensors(local, group)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        loss[part], own, tail = _choose(shards[:, :, part], rank, topk, direction, beta)
        if gradient is not None:
            chunk = buffer[: len(student[part])].copy_(student[part])
            rest = rest_and_lse(chunk, positions[part], temperature)
            _write_gradient(gradient[part], chunk, positions[part], own[:kept], tail, rest, temperature)
    return loss


def _offer(student, teacher, temperature, topk, buffer) -> tuple[Tensor, Tensor]:
    """Return [2k + 2, c] in fp64, and the k positions [c, k] of this shard.

    The numbers: the teacher's k logits and the student's there, then the log-sum-exp of the rest, teacher and student;
    all divided by the temperature. ``buffer`` holds the softmax of the student's rest afterwards.
    """
    buffer = buffer[: len(teacher)]
    # Selecting from fp32 is faster than from narrower types.
    positions = likeliest(buffer.copy_(teacher), min(topk, teacher.shape[1]))
    values, rests = [], []
    for source in (teacher, student):
        values.append((source.gather(-1, positions).double() / temperature).clamp_(min=LOWEST).t())
        if source is student:
            buffer.copy_(student)
        rests.append(rest_and_lse(buffer, positions, temperature)[None])
    return torch.cat(values + rests), positions


def likeliest(logits: Tensor, k: int) -> Tensor:
    """Return the positions [c, k] of the k highest logits [c, v] of each token, in no order.

    The choice between equal logits is undefined, as for ``torch.topk``.
    """
    c, v = logits.shape
    blocks = v // _BLOCK
    # A GPU selects by radix in one pass.
    if logits.device.type != "cpu" or blocks < _BLOCKS_FOR_EACH * k:
        return logits.topk(k, dim=-1, sorted=False).indices
    # Entries i, i + blocks, i + 2 * blocks .. are a block, so that the maxima are taken along contiguous memory.
    whole = logits[:, : blocks * _BLOCK].unflatten(-1, (_BLOCK, blocks))
    chosen = whole.amax(1).topk(k, dim=-1, sorted=False).indices
    entries = whole.gather(2, chosen.unsqueeze(1).expand(c, _BLOCK, k)).flatten(1)
    # Entries beyond the last whole block are compared directly.
    found = torch.cat([entries, logits[:, blocks * _BLOCK :]], dim=-1).topk(k, dim=-1, sorted=False).indices
    in_block = found // k * blocks + chosen.gather(1, found % k)
    return torch.where(found < entries.shape[1], in_block, found - entries.shape[1] + blocks * _BLOCK)


def _choose(shards: Tensor, rank: int, topk: int, direction: str, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the divergence [c], the gradient of this rank's own k entries [k, c], and two numbers of the tail [2, c].

    Args:
        shards: offers of all ranks [r, 2k + 2, c].
        rank: this rank.
        topk: number of entries to compare.
        direction: direction of the divergence.
        beta: weight of the teacher in the mixture of the JSD.

    Returns:
        Divergence, own gradients, (gradient of the tail's bucket, log-sum-exp of the student's tail).
    """
    size, numbers, c = shards.shape
    k = (numbers - 2) // 2
    if size == 1 and k <= topk:  # all are chosen
        student, teacher = (torch.cat([shards[0, i * k : (i + 1) * k], shards[0, 2 * k + i, None]]).t() for i in (1, 0))
        value, bucket = divergence_of_buckets(student, teacher, direction, beta)
        return value, bucket[:, :-1].t(), torch.stack([bucket[:, -1], student[:, -1]])
    teacher, student = (shards[:, i * k : (i + 1) * k].reshape(size * k, c) for i in (0, 1))
    # Stable, so that all ranks choose the same of equal logits.
    order = teacher.argsort(dim=0, descending=True, stable=True)
    chosen, others = order[:topk], order[topk:]
    tail_teacher, tail_student = (
        torch.cat([values.gather(0, others), shards[:, 2 * k + i]]).logsumexp(0)
        for i, values in enumerate((teacher, student))
    )
    value, bucket = divergence_of_buckets(
        torch.cat([student.gather(0, chosen), tail_student[None]]).t(),
        torch.cat([teacher.gather(0, chosen), tail_teacher[None]]).t(),
        direction,
        beta,
    )
    of_tail = bucket[:, -1]
    # An offered entry that was not chosen belongs to the tail.
    gradients = of_tail * (student - tail_student).exp()
    gradients.scatter_(0, chosen, bucket[:, :-1].t())
    own = gradients[rank * k : (rank + 1) * k]
    return value, own, torch.stack([of_tail, tail_student])


def _write_gradient(out, buffer, positions, own, tail, rest, temperature) -> None:
    """Write d/d(student) of a chunk [c, v].

    Args:
        out: [c, v].
        buffer: softmax of this shard's part of the student's tail; overwritten.
        positions: this shard's k entries [c, k].
        own: their gradients [k, c].
        tail: gradient of the tail's bucket, and log-sum-exp of the student's tail [2, c].
        rest: log-sum-exp of that part [c].
        temperature: divides the logits.
    """
    relative = (rest - tail[1]).clamp_(max=0.0).exp()
    out.copy_(buffer[: len(out)].mul_((tail[0] * relative / temperature).to(buffer.dtype).unsqueeze(-1)))
    out.scatter_(-1, positions, (own.t() / temperature).to(out.dtype))

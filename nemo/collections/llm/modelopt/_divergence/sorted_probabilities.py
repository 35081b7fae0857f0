"""Compare two distributions over different vocabularies: the distance of their sorted probabilities.

Shapes: n tokens of the student and m of the teacher, v entries of the student's vocabulary and w of the teacher's, a
shard of each on a tensor-parallel rank; c tokens of a chunk.

With probabilities p of the student and q of the teacher, sorted from the largest, and the shorter list filled up with
zeros, the loss of a token is sum_k |p_(k) - q_(k)|: the Wasserstein distance of order 1 if moving any entry to any
other costs the same (universal logit distillation, Boizard et al., arXiv 2402.12030). With g_i the sign of the
difference at the rank of entry i, its gradient by the student's logits is p_i (g_i - sum_j g_j p_j) / temperature.

Memory: sorting needs whole rows, so under tensor parallelism each chunk of both models' logits is gathered, and every
rank sorts it: a chunk takes about 40 bytes for each of its c * (v + w) numbers. The gradient is computed in the forward
pass, in one buffer [n, v] of the student's shard and dtype; neither logits nor probabilities are saved.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._parallel import gather_tensors
from .chunk import without_autocast

# Numbers of both models' logits in a chunk: memory stays small, and a call is long enough to keep a GPU busy.
_CHUNK_NUMBERS = 1 << 22


def sorted_distance(
    student: Tensor,
    teacher: Tensor,
    counterparts: Tensor,
    temperature: float = 1.0,
    group=None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Return the distance of the sorted probabilities of every token [n], equal on all ranks of ``group``.

    Args:
        student: logits [n, v], this rank's shard of the vocabulary; gradients flow into it.
        teacher: logits [m, w], this rank's shard of another vocabulary; a constant.
        counterparts: for each token of the student [n] the teacher's token to compare with; negative for none, whose
            loss is zero. On the host, so that choosing the tokens to compare does not wait for the device.
        temperature: divides both logits.
        group: process group over which both vocabularies are split evenly; None if they are whole.
        chunk_rows: tokens of a chunk.

    Returns:
        Tensor of shape [n], fp32 (fp64 for logits in fp64).
    """
    ranks = 1 if group is None else torch.distributed.get_world_size(group)
    rows = chunk_rows or max(1, _CHUNK_NUMBERS // (ranks * (student.shape[-1] + teacher.shape[-1])))
    with without_autocast(student.device):
        return _SortedDistance.apply(student, teacher, counterparts, temperature, group if ranks > 1 else None, rows)


class _SortedDistance(torch.autograd.Function):
    """The distance of [n, v] and [n, w] logits; the forward pass computes its gradient."""

    @staticmethod
    def forward(ctx, student, teacher, counterparts, temperature, group, rows):
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        wide = torch.promote_types(student.dtype, torch.float32)
        loss = student.new_zeros(len(student), dtype=wide)
        width = student.shape[-1]
        first = 0 if group is None else width * torch.distributed.get_rank(group)
        (compared,) = torch.nonzero(counterparts >= 0, as_tuple=True)
        matched = counterparts[compared]
        compared, matched = (places.to(student.device, non_blocking=True) for places in (compared, matched))
        for part, places in zip(compared.split(rows), matched.split(rows), strict=True):
            of_student = _probabilities(student[part].to(wide), temperature, group)
            of_teacher = _probabilities(teacher[places].to(wide), temperature, group)
            loss[part], whole = _distance(of_student, of_teacher)
            if gradient is not None:
                gradient[part] = (whole[:, first : first + width] / temperature).to(gradient.dtype)
        ctx.save_for_backward(*(() if gradient is None else (gradient,)))
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.unsqueeze(-1).to(gradient.dtype), None, None, None, None, None


def _probabilities(logits: Tensor, temperature: float, group) -> Tensor:
    """Return the probabilities of a chunk over the whole vocabulary, from this rank's shard [c, v] of its logits."""
    if group is not None:
        # [r, c, v] to [c, r * v]
        logits = gather_tensors(logits, group).transpose(0, 1).flatten(1)
    return torch.softmax(logits / temperature, -1)


def _distance(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance of each token [c], and its gradient [c, v] by the student's logits over the temperature."""
    entries = student.shape[-1]
    largest, order = student.sort(-1, descending=True)
    of_teacher = teacher.sort(-1, descending=True).values
    longest = max(entries, of_teacher.shape[-1])
    difference = F.pad(largest, (0, longest - entries)) - F.pad(of_teacher, (0, longest - of_teacher.shape[-1]))
    sign = torch.empty_like(student).scatter_(-1, order, difference[:, :entries].sign())
    return difference.abs().sum(-1), student * (sign - (sign * student).sum(-1, keepdim=True))

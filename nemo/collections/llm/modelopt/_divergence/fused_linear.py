"""Fuse output layers and distillation loss: loss and gradients without the logits of a micro-batch.

Shapes: n tokens of a micro-batch, c tokens of a chunk, h hidden size (student's and teacher's may differ), v vocabulary
entries held by this rank.

Chunk by chunk, logits z = hidden_s W_s^T and y = hidden_t W_t^T are computed, turned into loss and d/dz (in the memory
of z), and consumed: d_hidden = dz W_s, d_W += dz^T hidden_s in fp32. Only a few [c, v] buffers are held for any n.

The value is the sum over tokens weighted by constants (the loss mask), so one scalar scales all gradients in the
backward pass. With a language-model loss there are two scalars, known only in the backward pass (the dynamic balance
depends on the values): it computes the logits again, and both gradients in one sweep.

With a vocabulary split over ranks, a chunk needs the collectives of its divergence (see ``vocab_parallel``); hidden
states are whole on every rank, and their gradient is this rank's summand.

Under autocast, logits and matrix products have autocast's type, as an output layer's would. Sums and the gradients of
the inputs keep their own.

Sources: the fused linear losses of Liger-Kernel (arXiv 2410.10989), here with two models and a split vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_modelopt_dropin.preflight import loss_memory

from .._parallel import gather_tensors
from .chunk import FORWARD, HIGHEST, autocast_dtype, softmax_and_lse, wide, without_autocast
from .vocab_parallel import default_chunk_rows, divergence_with_gradient, scale_rows, token_chunks


@dataclass(frozen=True)
class Objective:
    """The divergence and its settings.

    Attributes:
        temperature: divides the logits.
        direction: direction of the divergence.
        topk: compare only the teacher's top-k logits; None for all.
        group: process group over which the vocabulary is split; None if it is whole.
        student_cap: logits are cap * tanh(logits / cap); None if they are not capped.
        teacher_cap: that of the teacher.
        main_grad: add the weight's gradient to its ``main_grad`` (Megatron's gradient accumulation fusion).
        chunk_rows: c; chosen from the size of the vocabulary by default.
        beta: weight of the teacher in the mixture of the JSD.
    """

    temperature: float = 1.0
    direction: str = FORWARD
    topk: int | None = None
    group: Any = None
    student_cap: float | None = None
    teacher_cap: float | None = None
    main_grad: bool = False
    chunk_rows: int | None = None
    beta: float = 0.5


class FusedLosses(NamedTuple):
    """Weighted sums over the tokens; scalars in fp32 (fp64 for hidden states in fp64).

    Attributes:
        divergence: distillation loss.
        lm: language-model loss; zero without labels.
        agreement: tokens for which both models have the same likeliest entry; no gradient.
    """

    divergence: Tensor
    lm: Tensor
    agreement: Tensor


def fused_linear_losses(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor,
    objective: Objective,
    labels: Tensor | None = None,
) -> FusedLosses:
    """Return the losses of a micro-batch, equal on all ranks that share the vocabulary.

    Args:
        student: last hidden states [n, h]; gradients flow into them.
        student_weight: output weight [v, h]; gradients flow into it unless it is frozen.
        teacher: last hidden states [n, h] of the teacher; constants.
        teacher_weight: its output weight [v, h].
        token_weights: weight of each token [n].
        objective: the divergence and its settings.
        labels: next tokens [n], for the language-model loss.
    """
    models = student, student_weight, teacher.detach(), teacher_weight.detach()
    dtype = autocast_dtype(student.device)
    with without_autocast(student.device):
        weights = token_weights.to(wide(student.dtype))
        return FusedLosses(*_FusedLinear.apply(*models, weights, objective, labels, dtype))


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, student_weight, teacher, teacher_weight, token_weights, objective, labels, dtype):
        ctx.objective, ctx.dtype = objective, dtype
        ctx.weight = student_weight
        wants = ctx.needs_input_grad[:2]
        # Without a second loss, the gradient is known up to a factor.
        at_once = labels is None and any(wants)
        ctx.gradients = _Gradients(student, student_weight, *wants) if at_once else None
        sums = torch.zeros(3, dtype=torch.float64, device=student.device)
        heads = _Heads(student, student_weight, teacher, teacher_weight, objective, dtype)
        for part in heads.chunks():
            z, y = heads.logits(part)
            weights = token_weights[part]
            sums[2] += (_agreement(z, y, objective.group) * weights).sum()
            if labels is not None:
                sums[1] += (cross_entropy(z, labels[part], objective.group) * weights).sum()
            slope = heads.slope(z) if at_once else None
            sums[0] += (heads.divergence(z, y, z if at_once else None) * weights).sum()
            if at_once:
                scale_rows(z, weights)
                ctx.gradients.add(part, z if slope is None else z.mul_(slope), *heads.inputs[0])
        if labels is not None:
            ctx.save_for_backward(student, student_weight, teacher, teacher_weight, token_weights, labels)
        divergence, lm, agreement = sums.to(token_weights.dtype)
        ctx.mark_non_differentiable(agreement)
        return divergence, lm, agreement

    @staticmethod
    def backward(ctx, grad_divergence, grad_lm, _):
        gradients, ctx.gradients = ctx.gradients, None
        factor = grad_divergence
        if ctx.saved_tensors:
            with without_autocast(grad_divergence.device):
                gradients, factor = _gradients_of_two(ctx, grad_divergence, grad_lm), None
        elif gradients is None:
            raise RuntimeError(
                "The gradient of the fused distillation loss was already used: it is scaled in place, so a second "
                "backward pass needs a second forward pass."
            )
        d_hidden, d_weight = gradients.hand_out(factor, ctx.weight, ctx.objective.main_grad)
        return d_hidden, d_weight, None, None, None, None, None, None


def _gradients_of_two(ctx, grad_divergence, grad_lm) -> _Gradients:
    """Compute the logits again, and the gradient of both losses weighted by the incoming gradients."""
    student, student_weight, teacher, teacher_weight, token_weights, labels = ctx.saved_tensors
    gradients = _Gradients(student, student_weight, *ctx.needs_input_grad[:2])
    heads = _Heads(student, student_weight, teacher, teacher_weight, ctx.objective, ctx.dtype)
    for part in heads.chunks():
        z, y = heads.logits(part)
        gradient = torch.empty_like(z)
        heads.divergence(z, y, gradient)
        weights = token_weights[part]
        scale_rows(gradient, weights * grad_divergence)
        cross_entropy(z, labels[part], ctx.objective.group, gradient, weights * grad_lm)
        slope = heads.slope(z)
        gradients.add(part, gradient if slope is None else gradient.mul_(slope), *heads.inputs[0])
    return gradients


class _Heads:
    """Both models' output layers, which compute the logits chunk by chunk."""

    def __init__(self, student, student_weight, teacher, teacher_weight, objective: Objective, dtype=None):
        if dtype is not None:
            student, student_weight, teacher, teacher_weight = (
                x.to(dtype) for x in (student, student_weight, teacher, teacher_weight)
            )
        self.inputs = ((student, student_weight), (teacher, teacher_weight))
        self.objective = objective
        rows = loss_memory.logits_rows(len(student), len(student_weight), student.element_size(), student.device.type)
        self.rows = min(objective.chunk_rows or rows, max(1, len(student)))
        # Reused, because a buffer of this size is expensive to allocate repeatedly.
        self.buffers = [hidden.new_empty(self.rows, weight.shape[0]) for hidden, weight in self.inputs]

    def chunks(self):
        return token_chunks(self.inputs[0][0], self.rows)

    def logits(self, part: slice) -> list[Tensor]:
        """Return the logits [c, v] of student and teacher; valid until the next call."""
        out = []
        caps = self.objective.student_cap, self.objective.teacher_cap
        for (hidden, weight), buffer, cap in zip(self.inputs, self.buffers, caps, strict=True):
            logits = torch.mm(hidden[part], weight.t(), out=buffer[: len(hidden[part])])
            if cap:
                logits.div_(cap).tanh_().mul_(cap)
            out.append(logits)
        return out

    def divergence(self, z: Tensor, y: Tensor, gradient: Tensor | None) -> Tensor:
        """Return the divergence [c], and write its gradient with respect to the logits."""
        o = self.objective
        rows = default_chunk_rows(z)
        return divergence_with_gradient(z, y, o.temperature, o.direction, o.group, rows, o.topk, gradient, o.beta)

    def slope(self, z: Tensor) -> Tensor | None:
        """Return the derivative of the capped logits [c, v] by the uncapped ones; None if they are not capped."""
        cap = self.objective.student_cap
        return 1.0 - (z / cap).square() if cap else None


class _Gradients:
    """d_hidden [n, h] in the hidden states' type, and d_weight [v, h] in fp32 (or wider)."""

    def __init__(self, hidden: Tensor, weight: Tensor, wants_hidden: bool, wants_weight: bool):
        self.hidden = torch.empty_like(hidden) if wants_hidden else None
        self.weight = torch.zeros_like(weight, dtype=wide(weight.dtype)) if wants_weight else None

    def add(self, part: slice, gradient: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Propagate the gradient of a chunk's logits [c, v] to hidden states and weight.

        Args:
            part: the chunk.
            gradient: [c, v].
            hidden: [n, h] in the type of the logits.
            weight: [v, h] in the type of the logits.
        """
        if self.hidden is not None and self.hidden.dtype == gradient.dtype:
            torch.mm(gradient, weight, out=self.hidden[part])
        elif self.hidden is not None:
            self.hidden[part] = torch.mm(gradient, weight)
        if self.weight is None:
            return
        if gradient.dtype == self.weight.dtype:
            self.weight.addmm_(gradient.t(), hidden[part])
            return
        for rows in token_chunks(weight, loss_memory.WEIGHT_ROWS):
            self.weight[rows] += torch.mm(gradient[:, rows].t(), hidden[part])

    def hand_out(self, factor: Tensor | None, weight: Tensor, main_grad: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return d_hidden and d_weight, times ``factor``; with ``main_grad`` the latter goes to ``weight.main_grad``.

        Megatron's hooks then expect any gradient of the weight's shape, and a flag.
        """
        for gradient in (self.hidden, self.weight):
            if gradient is not None and factor is not None:
                gradient.mul_(factor)
        d_weight = self.weight
        if d_weight is not None and main_grad and hasattr(weight, "main_grad"):
            weight.main_grad.add_(d_weight)
            d_weight = None
            if hasattr(weight, "grad_added_to_main_grad"):
                weight.grad_added_to_main_grad = True
                d_weight = torch.zeros_like(weight)
        elif d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        return self.hidden, d_weight


def cross_entropy(
    logits: Tensor, labels: Tensor, group=None, gradient: Tensor | None = None, factors: Tensor | None = None
) -> Tensor:
    """Return the cross entropy of each token [c] over a vocabulary that may be split.

    Args:
        logits: [c, v], this rank's shard.
        labels: indices in the whole vocabulary [c].
        group: process group over which it is split; None if it is whole.
        gradient: [c, v] to which the gradient times ``factors`` is added.
        factors: [c].
    """
    c, v = logits.shape
    first = 0
    if group is not None:
        first = torch.distributed.get_rank(group) * v
    own = (labels >= first) & (labels < first + v)
    position = (labels - first).clamp(0, v - 1).unsqueeze(-1)
    picked = logits.gather(-1, position).squeeze(-1).double()
    local = torch.empty(2, c, dtype=torch.float64, device=logits.device)
    local[1] = torch.where(own, picked, 0.0)
    rows = default_chunk_rows(logits)
    buffer = logits.new_empty(min(rows, c), v, dtype=wide(logits.dtype))
    for part in token_chunks(logits, rows):
        local[0, part] = softmax_and_lse(logits[part], 1.0, buffer[: len(logits[part])])
    lse, picked = local
    if group is not None and torch.distributed.get_world_size(group) > 1:
        shards = gather_tensors(local, group)
        lse, picked = shards[:, 0].logsumexp(0), shards[:, 1].sum(0)
    if gradient is not None:
        assert factors is not None
        for part in token_chunks(logits, rows):
            share = buffer[: len(logits[part])]
            of_whole = (softmax_and_lse(logits[part], 1.0, share) - lse[part]).exp().to(buffer.dtype)
            gradient[part] += share.mul_((factors[part] * of_whole).unsqueeze(-1))
        gradient.scatter_add_(-1, position, torch.where(own, -factors, 0.0).unsqueeze(-1).to(gradient.dtype))
    return (lse - picked).clamp_(max=HIGHEST).to(buffer.dtype)


def _agreement(z: Tensor, y: Tensor, group=None) -> Tensor:
    """Return one for each token [c] with the same likeliest entry in both models, otherwise zero."""
    maxima = torch.stack([z.amax(-1), y.amax(-1)]).float()
    both = torch.empty(z.shape[0], dtype=torch.bool, device=z.device)
    for part in token_chunks(z, default_chunk_rows(z)):
        both[part] = (
            (z[part] == maxima[0, part, None].to(z.dtype)) & (y[part] == maxima[1, part, None].to(y.dtype))
        ).any(-1)
    if group is None or torch.distributed.get_world_size(group) == 1:
        return both.float()
    shards = gather_tensors(torch.cat([maxima, both[None].float()]), group)
    highest = shards[:, :2].amax(0)
    return ((shards[:, :2] == highest).all(1) & (shards[:, 2] > 0)).any(0).float()

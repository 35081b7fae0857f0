"""Compute values and gradients of divergences between two sets of logits, a few tokens at a time.

Shapes: c tokens of a chunk, v vocabulary entries (a whole vocabulary, or the shard that this rank holds).

With temperature T let z = student / T and y = teacher / T, p = softmax(z), q = softmax(y) over the whole vocabulary and
m = beta q + (1 - beta) p, with beta = 1/2 by default::

    forward   KL(q || p)                         d/dz = p - q
    reverse   KL(p || q)                         d/dz = p * (log p - log q - KL(p || q))
    jsd       beta KL(q || m) + (1 - beta) KL(p || m)
                                                 d/dz = (1 - beta) p * (log(p / m) - KL(p || m))

(the generalized Jensen-Shannon divergence of arXiv 2306.13649, which defines its ends beta = 0 and 1 as the forward and
the reverse KL) and d/d(student) = (d/dz) / T.

Each row's maximum over the shard is subtracted first, so that logits with a large common offset keep their precision.
The rest of the vocabulary enters as two numbers per token, L_z and L_y: the logarithms of the whole vocabulary's sums
of exponentials relative to this shard's maxima. Then p = exp(z - max - L_z).

Exponentials come from PyTorch's softmax, which adds them up in the loop that computes them, by a polynomial of its own
on a CPU: 2.5 times as fast as the exponential function alone, with relative errors of up to 5e-6. The largest
share of a row is the reciprocal of its sum.

A logit more than 1e30 below its row's maximum, -inf included (a masked entry), counts as 1e30 below it. So no
difference overflows, up to the largest fp32 numbers, and no NaN can arise. An entry that both models mask contributes
nothing. If only the model that weighs less masks it, the divergence is huge instead of infinite.
"""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor

FORWARD, REVERSE, JSD = "forward", "reverse", "jsd"
DIRECTIONS = (FORWARD, REVERSE, JSD)

LOWEST = -1.0e30
HIGHEST = -LOWEST
# The sum of a row without any finite logit; its logarithm is negligible compared with LOWEST.
TINY = 1.0e-37


class Chunk:
    """Reused buffers of [c, v] for a chunk of tokens, in fp32 (fp64 for logits in fp64).

    Attributes:
        share_z: softmax of the student's logits over this shard [c, v].
        share_y: that of the teacher's.
        difference: y - z without the rows' maxima [c, v].
        log_sums: logarithms of this shard's sums of exponentials relative to its maxima, student and teacher [2, c].
        max_z: maxima of the student's rows, before the temperature [c, 1].
        max_y: those of the teacher.
    """

    def __init__(self, rows: int, logits: Tensor, temperature: float = 1.0, beta: float = 0.5):
        """Allocate the buffers.

        Args:
            rows: largest c.
            logits: [n, v] of the student.
            temperature: divides the logits.
            beta: weight of the teacher in the mixture m of the JSD, between 0 and 1.
        """
        self.temperature, self.beta = temperature, beta
        self._memory = logits.new_empty(3 * rows * logits.shape[1], dtype=wide(logits.dtype))
        self._spare: Tensor | None = None

    def load(self, student: Tensor, teacher: Tensor, maxima: Tensor | None = None, difference: bool = True) -> None:
        """Form softmax, sums of exponentials and the difference of logits [c, v] of any floating type.

        Args:
            student: logits [c, v].
            teacher: logits [c, v].
            maxima: [2, c] of the student and the teacher if they are known.
            difference: whether it is needed.
        """
        buffers = _of_shape(self._memory, 3, student)
        self.share_z, self.share_y, self.difference = buffers
        known = (None, None) if maxima is None else maxima.unsqueeze(-1)
        self.max_z = shifted(student, self.temperature, self.share_z, known[0])
        self.max_y = shifted(teacher, self.temperature, self.share_y, known[1])
        both = buffers[:2].clamp_(min=LOWEST)
        if difference:
            torch.sub(self.share_y, self.share_z, out=self.difference)
        self.log_sums = normalized(both, torch.stack([self.max_z, self.max_y]))

    def shard_statistics(self) -> Tensor:
        """Return [4, c] in fp64: this shard's maxima of student and teacher, and the logarithms of their sums."""
        maxima = torch.cat([self.max_z, self.max_y], dim=-1).t().double() / self.temperature
        return torch.cat([maxima, self.log_sums.double()])

    def mean_difference(self, direction: str) -> Tensor:
        """Return this shard's E_q[y - z] (forward) or E_p[z - y] (reverse) without the rows' maxima [c]."""
        if direction == FORWARD:
            return torch.linalg.vecdot(self.share_y, self.difference)
        return -torch.linalg.vecdot(self.share_z, self.difference)

    def jsd_parts(self, logs: Tensor | None = None) -> Tensor:
        """Return this shard's part of KL(p || m) and KL(q || m), [2, c]; ``log_ratio`` is log(p / m) afterwards.

        Args:
            logs: L_z and L_y of the module's docstring [2, c]; by default this shard is the whole vocabulary.
        """
        if self._spare is None:
            self._spare = torch.empty_like(self._memory[: len(self._memory) // 3 * 2])
        common, with_q_ratio = _of_shape(self._spare, 2, self.difference)
        log_z, log_y = self.log_sums if logs is None else logs
        log_q, log_p = math.log(self.beta), math.log1p(-self.beta)  # of the models' weights in m
        # The logarithm of the ratio of both summands of m.
        d = self.difference.add_((log_z - log_y + (log_q - log_p)).unsqueeze(-1))
        # log(p / m) = -log_p - softplus(d) and log(q / m) = -log_q - softplus(-d), each without the other's large part.
        torch.abs(d, out=common).neg_()
        torch.ops.aten.softplus.out(common, out=common).neg_().sub_(log_p)
        torch.clamp(d, max=0.0, out=with_q_ratio).add_(common)
        if log_p != log_q:
            with_q_ratio.add_(log_p - log_q)
        self.log_ratio = common.sub_(d.clamp_(min=0.0))
        with_p = torch.linalg.vecdot(self.share_z, self.log_ratio)
        with_q = torch.linalg.vecdot(self.share_y, with_q_ratio)
        parts = torch.stack([with_p, with_q])
        return parts if logs is None else parts * (self.log_sums - logs).exp()

    def write_gradient(self, out: Tensor, direction: str, mean: Tensor | None, logs: Tensor | None = None) -> None:
        """Write d loss / d student of the chunk [c, v], in the type of ``out``; overwrites the buffers.

        Args:
            out: [c, v].
            direction: which divergence.
            mean: reverse: the divergence [c]; JSD: KL(p || m) [c], after `jsd_parts`.
            logs: L_z and L_y [2, c]; by default this shard is the whole vocabulary.
        """
        scale = 1.0 / self.temperature
        weights = None if logs is None else (self.log_sums - logs).exp().unsqueeze(-1)
        if direction == FORWARD:
            if weights is None:
                difference = torch.sub(self.share_z, self.share_y, out=out if scale == 1.0 else self.share_z)
                if scale != 1.0:
                    torch.mul(difference, scale, out=out)
                return
            self.share_y.mul_(weights[1].mul_(-scale))
            torch.addcmul(self.share_y, self.share_z, weights[0].mul_(scale), out=out)
            return
        assert mean is not None
        if direction == REVERSE:
            log_z, log_y = self.log_sums if logs is None else logs
            torch.sub((log_y - log_z - mean).unsqueeze(-1), self.difference, out=self.difference)
            factor = self.difference
        else:
            factor = self.log_ratio.sub_(mean.unsqueeze(-1))
            scale *= 1.0 - self.beta
        if weights is not None:
            self.share_z.mul_(weights[0].mul_(scale))
        elif scale != 1.0:
            self.share_z.mul_(scale)
        torch.mul(self.share_z, factor, out=out)


def _of_shape(memory: Tensor, count: int, like: Tensor) -> Tensor:
    """Return the beginning of one-dimensional memory as ``count`` contiguous tensors of a shape [count, c, v]."""
    return memory[: count * like.numel()].view(count, *like.shape)


def resolved(direction: str, beta: float) -> str:
    """Return the direction in which the JSD with a ``beta`` of 0 or 1 is one of the KL divergences."""
    return {0.0: FORWARD, 1.0: REVERSE}.get(beta, JSD) if direction == JSD else direction


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which numbers of a floating type are summed: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the type in which autocast computes matrix products on a device; None if it is off."""
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context in which products of fp32 numbers are fp32 although the caller uses autocast."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def shifted(source: Tensor, temperature: float, out: Tensor, maximum: Tensor | None = None) -> Tensor:
    """Write (source - maximum) / temperature [c, v] to ``out`` in its type and return the rows' maxima [c, 1]."""
    if source.dtype != out.dtype:
        source = out.copy_(source)
    if maximum is None:
        maximum = source.amax(-1, keepdim=True).clamp_(min=LOWEST)
    torch.sub(source, maximum, out=out)
    if temperature != 1.0:
        out.mul_(1.0 / temperature)
    return maximum


def normalized(logits: Tensor, maximum: Tensor) -> Tensor:
    """Replace shifted logits [..., c, v] by their softmax; return the logarithms of the sums of exponentials [..., c].

    Args:
        logits: as `shifted` writes them, with the maximum 0, and none below `LOWEST`.
        maximum: of the logits before that [..., c, 1]. Rows without a finite logit have a negligible sum.
    """
    if logits.device.type == "cpu":
        torch.softmax(logits, dim=-1, out=logits)
    else:  # other devices may read what they have already written
        logits.copy_(logits.softmax(-1))
    return torch.where(maximum.squeeze(-1) <= LOWEST, math.log(TINY), logits.amax(-1).log_().neg_())


def softmax_and_lse(source: Tensor, temperature: float, out: Tensor) -> Tensor:
    """Write the softmax of source / temperature [c, v] to ``out`` and return their log-sum-exp [c] in fp64."""
    maximum = shifted(source, temperature, out)
    log_sum = normalized(out.clamp_(min=LOWEST), maximum).double()
    maximum = maximum.squeeze(-1)
    return torch.where(maximum <= LOWEST, LOWEST, log_sum.add_(maximum, alpha=1.0 / temperature))


def rest_and_lse(buffer: Tensor, positions: Tensor, temperature: float) -> Tensor:
    """Replace logits by the softmax of all except those at ``positions``; return the log-sum-exp [c] of these in fp64.

    Args:
        buffer: logits [c, v] in the type of the computation.
        positions: [c, k].
        temperature: divides the logits.
    """
    return softmax_and_lse(buffer.scatter_(-1, positions, -torch.inf), temperature, buffer)


def divergence_of_buckets(student: Tensor, teacher: Tensor, direction: str, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return value [c] and d/d(student) [c, k] of a divergence between two small sets of logits [c, k], in fp64.

    For small sets of logits; the formulas are those above, without buffers.
    """
    log_p, log_q = (x.double().clamp(min=LOWEST).log_softmax(-1).clamp(min=LOWEST) for x in (student, teacher))
    p, q = log_p.exp(), log_q.exp()
    direction = resolved(direction, beta)
    if direction == FORWARD:
        return (q * (log_q - log_p)).sum(-1), p - q
    if direction == REVERSE:
        value = (p * (log_p - log_q)).sum(-1)
        return value, p * (log_p - log_q - value.unsqueeze(-1))
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    with_p = (p * (log_p - log_m)).sum(-1)
    value = (1.0 - beta) * with_p + beta * (q * (log_q - log_m)).sum(-1)
    return value, (1.0 - beta) * p * (log_p - log_m - with_p.unsqueeze(-1))

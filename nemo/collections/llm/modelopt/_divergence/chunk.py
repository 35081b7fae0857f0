"""Compute values and gradients of divergences between two sets of logits, a few tokens at a time.

Shapes: c tokens of a chunk, v vocabulary entries (a whole vocabulary, or the shard that this rank holds).

With temperature T let z = student / T and y = teacher / T, p = softmax(z), q = softmax(y) over the whole vocabulary and
m = (p + q) / 2::

    forward   KL(q || p)                         d/dz = p - q
    reverse   KL(p || q)                         d/dz = p * (log p - log q - KL(p || q))
    jsd       (KL(p || m) + KL(q || m)) / 2      d/dz = p * (log(p / m) - KL(p || m)) / 2

and d/d(student) = (d/dz) / T. Each row's maximum over the shard is subtracted first, so that logits with a large common
offset keep their precision. The rest of the vocabulary enters as two numbers per token, L_z and L_y: the logarithms of
the whole vocabulary's sums of exponentials relative to this shard's maxima. Then p = exp(z - max - L_z).

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
_LOG_2 = math.log(2.0)


class Chunk:
    """Reused fp32 buffers of [c, v] for a chunk of tokens.

    Attributes:
        exp_z: student's exponentials relative to the row's maximum [c, v].
        exp_y: those of the teacher.
        difference: y - z without the rows' maxima [c, v].
        sums: sums of ``exp_z`` and ``exp_y`` over this shard [2, c].
        max_z: maxima of the student's rows, before the temperature [c, 1].
        max_y: those of the teacher.
    """

    def __init__(self, rows: int, width: int, device: torch.device, temperature: float = 1.0):
        """Allocate the buffers.

        Args:
            rows: largest c.
            width: v.
            device: device of the logits.
            temperature: divides the logits.
        """
        self.temperature = temperature
        self._buffers = torch.empty(3, rows, width, dtype=torch.float32, device=device)
        self._spare: Tensor | None = None

    def load(self, student: Tensor, teacher: Tensor, maxima: Tensor | None = None, difference: bool = True) -> None:
        """Form exponentials, their sums and the difference of logits [c, v] of any floating type.

        Args:
            student: logits [c, v].
            teacher: logits [c, v].
            maxima: [2, c] of the student and the teacher if they are known.
            difference: whether it is needed.
        """
        self.exp_z, self.exp_y, self.difference = self._buffers[:, : student.shape[0]]
        known = (None, None) if maxima is None else maxima.unsqueeze(-1)
        self.max_z = shifted(student, self.temperature, self.exp_z, known[0])
        self.max_y = shifted(teacher, self.temperature, self.exp_y, known[1])
        both = self._buffers[:2, : student.shape[0]]
        if difference:
            both.clamp_(min=LOWEST)
            torch.sub(self.exp_y, self.exp_z, out=self.difference)
        self.sums = both.exp_().sum(-1).clamp_(min=TINY)
        self.sum_z, self.sum_y = self.sums

    def shard_statistics(self) -> Tensor:
        """Return [4, c] in fp64: this shard's maxima of student and teacher, and the logarithms of their sums."""
        maxima = torch.cat([self.max_z, self.max_y], dim=-1).t().double() / self.temperature
        return torch.cat([maxima, self.sums.double().log()])

    def mean_difference(self, direction: str) -> Tensor:
        """Return this shard's E_q[y - z] (forward) or E_p[z - y] (reverse) without the rows' maxima [c]."""
        if direction == FORWARD:
            return torch.linalg.vecdot(self.exp_y, self.difference) / self.sum_y
        return -torch.linalg.vecdot(self.exp_z, self.difference) / self.sum_z

    def jsd_parts(self, log_z: Tensor, log_y: Tensor) -> Tensor:
        """Return this shard's part of KL(p || m) and KL(q || m), [2, c]; ``log_ratio`` is log(p / m) afterwards.

        Args:
            log_z: L_z of the module's docstring [c].
            log_y: L_y.
        """
        if self._spare is None:
            self._spare = torch.empty_like(self._buffers[:2])
        common, with_q_ratio = self._spare[:, : len(self.difference)]
        d = self.difference.add_((log_z - log_y).unsqueeze(-1))  # log q - log p
        # log(p / m) = log 2 - softplus(d) and log(q / m) = log 2 - softplus(-d), each without the other's large part.
        torch.abs(d, out=common).neg_()
        torch.ops.aten.softplus.out(common, out=common).neg_().add_(_LOG_2)
        torch.clamp(d, max=0.0, out=with_q_ratio).add_(common)
        self.log_ratio = common.sub_(d.clamp_(min=0.0))
        with_p = torch.linalg.vecdot(self.exp_z, self.log_ratio)
        with_q = torch.linalg.vecdot(self.exp_y, with_q_ratio)
        return torch.stack([with_p * (-log_z).exp(), with_q * (-log_y).exp()])

    def write_gradient(self, out: Tensor, direction: str, log_z: Tensor, log_y: Tensor, mean: Tensor | None) -> None:
        """Write d loss / d student of the chunk [c, v], in the type of ``out``; overwrites the buffers.

        Args:
            out: [c, v].
            direction: which divergence.
            log_z: L_z [c].
            log_y: L_y [c].
            mean: reverse: the divergence [c]; JSD: KL(p || m) [c], after `jsd_parts`.
        """
        scale = 1.0 / self.temperature
        if direction == FORWARD:
            self.exp_y.mul_((-log_y).exp().mul_(-scale).unsqueeze(-1))
            torch.addcmul(self.exp_y, self.exp_z, (-log_z).exp().mul_(scale).unsqueeze(-1), out=out)
            return
        assert mean is not None
        if direction == REVERSE:
            torch.sub((log_y - log_z - mean).unsqueeze(-1), self.difference, out=self.difference)
            factor = self.difference
        else:
            factor = self.log_ratio.sub_(mean.unsqueeze(-1))
            scale *= 0.5
        self.exp_z.mul_((-log_z).exp().mul_(scale).unsqueeze(-1))
        torch.mul(self.exp_z, factor, out=out)


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
    """Write (source - maximum) / temperature [c, v] to ``out`` in fp32 and return the rows' maxima [c, 1]."""
    if source.dtype != torch.float32:
        source = out.copy_(source)
    if maximum is None:
        maximum = source.amax(-1, keepdim=True).clamp_(min=LOWEST)
    torch.sub(source, maximum, out=out)
    if temperature != 1.0:
        out.mul_(1.0 / temperature)
    return maximum


def divergence_of_buckets(student: Tensor, teacher: Tensor, direction: str) -> tuple[Tensor, Tensor]:
    """Return value [c] and d/d(student) [c, k] of a divergence between two small sets of logits [c, k], in fp64.

    For small sets of logits; the formulas are those above, without buffers.
    """
    log_p, log_q = (x.double().clamp(min=LOWEST).log_softmax(-1).clamp(min=LOWEST) for x in (student, teacher))
    p, q = log_p.exp(), log_q.exp()
    if direction == FORWARD:
        return (q * (log_q - log_p)).sum(-1), p - q
    if direction == REVERSE:
        value = (p * (log_p - log_q)).sum(-1)
        return value, p * (log_p - log_q - value.unsqueeze(-1))
    log_m = torch.logaddexp(log_p, log_q) - _LOG_2
    with_p = (p * (log_p - log_m)).sum(-1)
    value = 0.5 * (with_p + (q * (log_q - log_m)).sum(-1))
    return value, 0.5 * p * (log_p - log_m - with_p.unsqueeze(-1))

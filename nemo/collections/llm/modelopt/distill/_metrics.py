"""Metrics of a distillation other than its losses; computed on logging steps.

Shapes: s sequence, b batch, v vocabulary entries held by this rank, c tokens of a chunk, n = s * b tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from .._divergence.chunk import LOWEST
from .._divergence.recorded_topk import RecordedLogits
from .._parallel import gather_tensors
from ._deferred_logits import DeferredLogits, softcap

# Numbers of a token on one shard: largest logit and its entry, log-sum-exp of the logits, logit of the label.
_VALUE, _PLACE, _LSE, _LABEL = range(4)
# Bytes of a chunk of logits.
_CHUNK_BYTES = 8 << 20


def observed(student: Any, teacher: Any, labels: Tensor | None, entries: int | None) -> dict[str, Tensor]:
    """Return ``top1_agreement`` and ``teacher_lm_loss`` of every token [b, s], as far as the arguments allow.

    Args:
        student: logits [s, b, v]; None if the agreement is computed elsewhere.
        teacher: logits, deferred logits or recorded logits.
        labels: next tokens [b, s].
        entries: number of vocabulary entries that both models have, if their padding differs.
    """
    found: dict[str, Tensor] = {}
    of_teacher = None
    if not isinstance(teacher, RecordedLogits):
        of_teacher = _of_all_shards(_of_shard(teacher, labels, entries))
        if labels is not None:
            found["teacher_lm_loss"] = (of_teacher[_LSE] - of_teacher[_LABEL]).view(labels.t().shape).t()
    if student is not None:
        likeliest = teacher.entries[..., 0].flatten() if of_teacher is None else of_teacher[_PLACE]
        same = _of_all_shards(_of_shard(student, None, entries))[_PLACE] == likeliest
        found["top1_agreement"] = same.view(student.shape[:2]).t()
    return {name: value.float().contiguous() for name, value in found.items()}


@torch.no_grad()
def _of_shard(logits: Tensor | DeferredLogits, labels: Tensor | None, entries: int | None) -> Tensor:
    """Return [4, n] numbers in fp64 of this rank's shard."""
    deferred = isinstance(logits, DeferredLogits)
    whole: Tensor = logits.hidden if isinstance(logits, DeferredLogits) else logits
    source = whole.flatten(0, 1)
    width = len(logits.weight) if deferred else source.shape[1]
    first = width * parallel_state.get_tensor_model_parallel_rank()
    places = None if labels is None else labels.t().reshape(-1) - first
    found = torch.full((4, len(source)), LOWEST, dtype=torch.float64, device=source.device)
    kept = width if entries is None else min(width, entries - first)
    if kept <= 0:
        return found  # only padding
    rows = max(1, _CHUNK_BYTES // (4 * width))
    for start in range(0, len(source), rows):
        part = slice(start, start + rows)
        chunk = (_logits(source[part], logits) if deferred else source[part])[:, :kept].float()
        value, place = chunk.max(-1)
        found[_VALUE, part], found[_PLACE, part] = value.double(), (place + first).double()
        found[_LSE, part] = chunk.logsumexp(-1).double()
        if places is not None:
            own = (places[part] >= 0) & (places[part] < kept)
            picked = chunk.gather(-1, torch.where(own, places[part], 0).unsqueeze(-1)).squeeze(-1)
            found[_LABEL, part] = torch.where(own, picked.double(), LOWEST)
    return found


def _logits(hidden: Tensor, deferred: DeferredLogits) -> Tensor:
    """Return the logits [c, v] of a few tokens [c, h]."""
    logits, cap = hidden @ deferred.weight.t(), softcap(deferred.layer)
    return cap * torch.tanh(logits / cap) if cap else logits


def _of_all_shards(local: Tensor) -> Tensor:
    """Return the [4, n] numbers of the whole vocabulary, with one collective."""
    group = parallel_state.get_tensor_model_parallel_group()
    if torch.distributed.get_world_size(group) == 1:
        return local
    every = gather_tensors(local, group)
    # The first of equal maxima, as on one rank.
    best = every[:, _VALUE].argmax(0, keepdim=True)
    value, place = (every[:, i].gather(0, best)[0] for i in (_VALUE, _PLACE))
    return torch.stack([value, place, every[:, _LSE].logsumexp(0), every[:, _LABEL].amax(0)])

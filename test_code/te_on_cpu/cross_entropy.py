"""A reference in PyTorch for TE's Triton kernels of the cross entropy over a sharded vocabulary.

As the kernels do, the forward pass writes the gradient into the logits, and the backward pass multiplies it there.
"""

from __future__ import annotations

import torch


def cross_entropy_forward(logits, target, label_smoothing, reduce_loss, group, ignore_idx):
    """Return the loss of each token, of the shape of ``target``, and the logits `[.., .., v]`, now their gradient."""
    if label_smoothing or reduce_loss:
        raise NotImplementedError("the cross entropy has a reference without smoothing and reduction only")
    parallel = group is not None and torch.distributed.get_world_size(group) > 1
    x = logits.detach().float()
    own = target - (torch.distributed.get_rank(group) if parallel else 0) * x.shape[-1]
    here = (own >= 0) & (own < x.shape[-1])
    own = own.clamp(0, x.shape[-1] - 1)[..., None]
    largest = x.amax(-1)
    if parallel:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    x = x - largest[..., None]
    sums = torch.stack([x.exp().sum(-1), x.gather(-1, own)[..., 0] * here])
    if parallel:
        torch.distributed.all_reduce(sums, group=group)
    total, chosen = sums
    counts = target != ignore_idx
    gradient = x.exp() / total[..., None]
    gradient.scatter_add_(-1, own, -here[..., None].to(gradient.dtype))
    logits.data.copy_(gradient * counts[..., None])
    return (total.log() - chosen) * counts, logits


def cross_entropy_backward(gradient, grad_output, is_cg_capturable=False):
    """Multiply the gradient, in place, by that of each token's loss."""
    gradient.data.mul_(grad_output[..., None])
    return gradient


KERNELS = (cross_entropy_forward, cross_entropy_backward)

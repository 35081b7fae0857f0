"""Imitate arithmetic in bf16 in a model that computes in fp32, to know how far a program in bf16 may be from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# bf16 is the upper half of fp32.
_LOWER = 1 << 16


def stochastic(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round an fp32 tensor to bf16, up or down by chance, so that the mean is the number. Numbers of bf16 stay.

    Between two numbers of bf16 that are u apart, the mean of the squared error is u^2 / 6, twice that of rounding to
    the nearest.
    """
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(0, _LOWER, x.shape, generator=generator, dtype=torch.int32)
    return ((bits + noise) & -_LOWER).view(torch.float32)


# Quantizers of computed values read numbers of bf16, and a kernel may keep more digits of what they return. The codes
# of weights are stored, and only what they are decoded to is rounded.
_COMPUTED = ("input_quantizer", "output_quantizer", "bmm_quantizer")
_STORED = "weight_quantizer"


@contextlib.contextmanager
def imitated(core: torch.nn.Module, seed: int) -> Iterator[None]:
    """Round what every module of a Megatron-Core model reads and returns with `stochastic`, inside the context.

    That includes the inputs of quantizers, which then choose other codes, decoded weights, and the logits of routers,
    which then choose other experts.

    Args:
        core: The model in fp32.
        seed: Of the choice between up and down.
    """
    generator = torch.Generator().manual_seed(seed)

    def rounded(value):
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            return stochastic(value, generator)
        return type(value)(rounded(one) for one in value) if type(value) in (tuple, list) else value

    def before(module, args, keywords):
        return rounded(args), {name: rounded(value) for name, value in keywords.items()}

    handles, routers = [], []
    for name, module in core.named_modules():
        if not name.endswith(_STORED):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if not name.endswith(_COMPUTED):
            handles.append(module.register_forward_hook(lambda module, args, output: rounded(output)))
        if hasattr(module, "gating"):
            gating = module.gating
            module.gating = lambda x, gating=gating: rounded(gating(x))
            routers.append(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for router in routers:
            del router.gating

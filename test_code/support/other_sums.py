"""Matrix products as another processor might round them, to find tests whose bounds hold by the luck of this one.

Libraries of matrix products choose the order of their sums by the processor, its vector units and the shape of the
operands. With ``TEST_OTHER_SUMS=1`` every fp32 product on the CPU moves by about the rounding error of such a
different order. The move depends on the shape of the operands and on the position in the result: the same product
gives the same numbers each time, while a product that another model, layout or library cuts differently moves
differently.
"""

from __future__ import annotations

import functools
import os
import warnings

import torch

from test_code.support import tolerances

VARIABLE = "TEST_OTHER_SUMS"
# Half a unit in the last place. Partial sums of n terms of random sign are at most about |a| |b| / sqrt(n), and n
# rounding errors of that size add up to about this number times |a| |b| (Higham, Accuracy and Stability of Numerical
# Algorithms, section 4.2): each number of the product has its own size, also among rows of very different sizes.
_UNIT = 2.0**-24

# The library's registrations live as long as this object.
_registrations: list[torch.library.Library] = []


def enable_if_asked() -> None:
    """Round products differently in this process if `VARIABLE` is set."""
    if os.environ.get(VARIABLE) and not _registrations:
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            # torch warns that its own kernels are replaced, which is the purpose.
            warnings.simplefilter("ignore")
            for name in ("mm", "bmm", "addmm", "baddbmm"):
                library.impl(name, functools.partial(_moved, getattr(torch.ops.aten, name).out), "CPU")
        _registrations.append(library)


def _moved(product, *args, **kwargs) -> torch.Tensor:
    left, right = [arg for arg in args if isinstance(arg, torch.Tensor)][-2:]
    found = torch.empty((*left.shape[:-1], right.shape[-1]), dtype=left.dtype, device=left.device)
    product(*args, **kwargs, out=found)
    if found.dtype == torch.float32 and found.numel():
        sizes = left.norm(dim=-1, keepdim=True) * right.norm(dim=-2, keepdim=True)
        found.add_(sizes * _pattern(left.shape[-1], right.shape[-1]), alpha=_UNIT)
    return found


@functools.lru_cache(maxsize=256)
def _pattern(terms: int, columns: int) -> torch.Tensor:
    """Return signs and sizes `[columns]` between -1 and 1 that depend on the shape of the product."""
    generator = torch.Generator().manual_seed(terms * 1_000_003 + columns)
    return torch.rand(columns, generator=generator) * 2 - 1


def assert_equal_but_for_sums(found: torch.Tensor, expected: torch.Tensor, limit: float | None = None) -> None:
    """Compare two fp32 results of the same computation whose sums run in different orders.

    Errors of this kind are relative to the terms of a sum and not to its value, so the largest expected number is the
    measure: entries near zero have no bound of their own. Some layers of products multiply the error of one by ten or
    more; a lost scale or a wrong row changes the first digit.

    Args:
        found: any shape.
        expected: the same shape.
        limit: largest difference as a share of the largest expected number; that of logits by default.
    """
    limit = tolerances.of(tolerances.LOGITS) if limit is None else limit
    torch.testing.assert_close(found, expected, rtol=0, atol=limit * float(expected.abs().max()))

"""What the host reads from tensors without numbers: that all is well, and what it has written itself.

Booleans are followed from ``all`` and ``isfinite``, which are true, through the operators that combine them. A tensor
that the host has copied to the device keeps its numbers until something is written to it; collectives do not count, as
if the other ranks had nothing to add. All other tensors are zero or false.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

_TRUE, _WRITTEN = "would_be_true", "written_by_host"
_aten = torch.ops.aten
_COMBINED: dict[Any, Callable[[bool, bool], bool]] = {
    _aten.mul.Tensor: operator.and_,
    _aten.bitwise_and.Tensor: operator.and_,
    _aten.logical_and.default: operator.and_,
    _aten.bitwise_or.Tensor: operator.or_,
    _aten.logical_or.default: operator.or_,
}
_NOT = (_aten.bitwise_not.default, _aten.logical_not.default)
_ALL = (_aten.all.default, _aten.all.dim)
# Their results have the numbers of their arguments.
_KEPT = (
    _aten._to_copy.default,
    _aten.cat.default,
    _aten.clone.default,
    _aten.detach.default,
    _aten.select.int,
    _aten.stack.default,
    _aten.unbind.int,
    _aten.unsqueeze.default,
    _aten.view.default,
)


def of(tensor: Any) -> torch.Tensor:
    """Return real numbers for a tensor without."""
    with unset_fake_temporarily():
        if hasattr(tensor, _WRITTEN):
            return getattr(tensor, _WRITTEN).to(tensor.dtype, copy=True)
        return torch.full(tuple(tensor.shape), int(_would_be_true(tensor)), dtype=tensor.dtype)


def number(tensor: Any) -> bool | int | float:
    """Return the real number for a tensor of one element without."""
    with unset_fake_temporarily():
        return of(tensor).item()


def _would_be_true(tensor: Any) -> bool:
    return getattr(tensor, _TRUE, False)


def write(tensor: Any, numbers: torch.Tensor) -> None:
    """Note the numbers that the host has copied to a tensor."""
    with unset_fake_temporarily():
        setattr(tensor, _WRITTEN, numbers.detach().clone())


def follow(func: Any, args: tuple, out: Any) -> None:
    """Note what is known about the result of an operator, and forget it about what the operator writes to."""
    if func.namespace == "aten" and func._schema.is_mutable and args:
        for name in (_TRUE, _WRITTEN):
            vars(args[0]).pop(name, None)
    if not _is_true(func, args):
        return
    for tensor in out if isinstance(out, (list, tuple)) else [out]:
        setattr(tensor, _TRUE, True)


def _is_true(func: Any, args: tuple) -> bool:
    if func in _ALL:
        return True
    # isfinite is (x == x) * (abs(x) != inf).
    if func is _aten.eq.Tensor:
        return args[0] is args[1]
    if func is _aten.ne.Scalar:
        return args[1] == float("inf")
    if func in _COMBINED:
        return _COMBINED[func](_would_be_true(args[0]), _would_be_true(args[1]))
    if func in _NOT:
        return not _would_be_true(args[0])
    if func in _KEPT:
        tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
        return bool(tensors) and all(map(_would_be_true, tensors))
    return False

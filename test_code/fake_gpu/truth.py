"""What a tensor of booleans without numbers would say if all were well: numbers finite, conditions fulfilled.

It is followed from ``all`` and ``isfinite`` through the operators that combine them. All other tensors are false.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

_NAME = "would_be_true"
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


def of(tensor: Any) -> bool:
    """Return what a tensor would say."""
    return getattr(tensor, _NAME, False)


def follow(func: Any, args: tuple, out: Any) -> None:
    """Note what the result of an operator would say if that is not false."""
    if not _is_true(func, args):
        return
    for tensor in out if isinstance(out, (list, tuple)) else [out]:
        setattr(tensor, _NAME, True)


def _is_true(func: Any, args: tuple) -> bool:
    if func in _ALL:
        return True
    # isfinite is (x == x) * (abs(x) != inf).
    if func is _aten.eq.Tensor:
        return args[0] is args[1]
    if func is _aten.ne.Scalar:
        return args[1] == float("inf")
    if func in _COMBINED:
        return _COMBINED[func](of(args[0]), of(args[1]))
    if func in _NOT:
        return not of(args[0])
    if func in _KEPT:
        tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
        return bool(tensors) and all(map(of, tensors))
    return False

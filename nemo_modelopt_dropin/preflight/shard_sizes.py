"""Parse sizes of weight files: ``5GB``, ``500MB``, ``4GiB``. Standard library only."""

from __future__ import annotations

import re
from typing import Any

_UNITS = {
    unit: base**power
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    for unit, base in ((f"{prefix}b", 1000), (f"{prefix}ib", 1024))
    if unit != "ib"
}
_WRITTEN = re.compile(r"(\d+(?:\.\d*)?)\s*([kmgt]i?b|b)")


def parse(value: Any) -> int:
    """Return a size in bytes.

    Args:
        value: A text such as ``"5GB"`` (powers of 1000) or ``"4GiB"`` (powers of 1024).

    Raises:
        ValueError: If it is not a size; the message says what to use.
    """
    found = _WRITTEN.fullmatch(value.strip().lower()) if isinstance(value, str) else None
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise ValueError("is not a size of a file; use a number and a unit, such as '5GB', '500MB' or '4GiB'")
    return size


def problem(name: str, value: Any) -> list[str]:
    """Return what is wrong with a size, in a list that is empty for a valid one."""
    try:
        parse(value)
    except ValueError as error:
        return [f"{name} {value} {error}"]
    return []

"""Parse parameter budgets: ``70%``, ``0.7``, ``5.6e9``, ``5.6B``. Standard library only."""

from __future__ import annotations

import math
import re
from typing import Any

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12, "%": 0.01}
_WRITTEN = re.compile(r"(\d+(?:\.\d*)?(?:e\d+)?)\s*([%kmbt]?)")
# No model has so few parameters: a number up to here is meant as per cent.
_PER_CENT = 100


def parse(value: Any) -> float:
    """Return a budget as a fraction of the original model (below 1) or a number of parameters.

    Args:
        value: A text such as ``"70%"`` or ``"5.6B"``, or a number.

    Raises:
        ValueError: If it is neither; the message says what to use.
    """
    number, unit = value, ""
    if isinstance(value, str):
        found = _WRITTEN.fullmatch(value.strip().lower())
        number, unit = (float(found[1]) * _UNITS[found[2]], found[2]) if found else (None, "")
    legal = isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < math.inf
    if not legal or number == 1 or (unit == "%" and number > 1):
        raise ValueError(
            "is not a valid parameter budget; use a fraction of the original model ('70%' or 0.7) or a count (5.6e9 or "
            "'5.6B')"
        )
    if 1 < number <= _PER_CENT and not unit:
        raise ValueError(
            f"means {number:g} parameters; for a fraction of the original model use '{number:g}%' or {number / 100:g}"
        )
    return float(number)


def problem(name: str, value: Any) -> list[str]:
    """Return what is wrong with a budget, in a list that is empty for a valid budget and for None."""
    try:
        if value is not None:
            parse(value)
    except ValueError as error:
        return [f"{name} {value} {error}"]
    return []

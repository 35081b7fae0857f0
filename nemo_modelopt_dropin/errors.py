"""Error types, and suggestions for misspelled names, for code that must not import NeMo. Standard library only."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ModelOptConfigError(ValueError, AssertionError):
    """A setting or combination of settings that cannot work.

    It is a ``ValueError``, and an ``AssertionError`` too because the stock subpackage asserted its checks and callers
    may catch that. The message contains what was given, what is allowed and what to do.
    """


class InUseError(RuntimeError):
    """Another run is writing to the same output."""


def nearest(name: Any, known: Iterable[Any], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return the known names that are most similar to a name, the most similar first.

    Args:
        name: The name, which is not among the known ones.
        known: Names to choose from.
        count: Number of names to return at most.
        cutoff: Similarity below which a name is left out: 0 for any name, 1 for the name itself.
    """
    return difflib.get_close_matches(str(name), [str(one) for one in known], n=count, cutoff=cutoff)


def did_you_mean(name: Any, known: Iterable[Any]) -> str:
    """Return ``; did you mean ...?`` with the most similar known name, or an empty string if none is similar."""
    return "".join(f"; did you mean {one}?" for one in nearest(name, known))


def suggestion(name: Any, known: Iterable[Any]) -> str:
    """Return the same as `did_you_mean` as a sentence to append to another one: `` Did you mean '...'?``."""
    return "".join(f" Did you mean {one!r}?" for one in nearest(name, known))


def one_of(name: str, value: object, allowed: Iterable[Any]) -> None:
    """Raise an error unless a value is among the allowed ones.

    Args:
        name: Name of the setting.
        value: Its value.
        allowed: The allowed values.

    Raises:
        ModelOptConfigError: With the setting, the value, the allowed values and the most similar one.
    """
    allowed = list(allowed)
    if value not in allowed:
        raise ModelOptConfigError(f"{name}={value!r} is not supported; allowed: {allowed}.{suggestion(value, allowed)}")

"""The error types of this package, for code that must not import NeMo. Standard library only."""

from __future__ import annotations


class ModelOptConfigError(ValueError, AssertionError):
    """A setting or combination of settings that cannot work.

    It is a ``ValueError``, and an ``AssertionError`` too because the stock subpackage asserted its checks and callers
    may catch that. The message says what was given, what is allowed and what to do.
    """


class InUseError(RuntimeError):
    """Another run writes to the same output at this moment."""

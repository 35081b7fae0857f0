"""Whether the CPU backend is enabled in this process, for code that must not import the patches."""

from __future__ import annotations

_state = {"enabled": False}


class CpuBackendError(RuntimeError):
    """The CPU backend cannot run here, or not with this model."""


def is_enabled() -> bool:
    """Return whether `cpu_backend.enable` has been called in this process."""
    return _state["enabled"]


def set_enabled() -> None:
    """Record that all patches are in place."""
    _state["enabled"] = True

"""Import hook: the real package ``transformer_engine`` becomes importable on a machine without CUDA.

Nothing is imported before something asks for the package, so that processes that do not need it start as fast as ever.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from unittest import mock

_PACKAGE = "transformer_engine"
_EXTENSION = "transformer_engine_torch"
_TRITON = ("triton", "triton.language", "triton.language.core", "triton.language.standard", "triton.runtime")


def install() -> None:
    """Answer imports of ``transformer_engine`` from now on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Find the package with the usual finders and wrap its loader."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Execute the package with the extension module in place, then adapt it."""

    def __init__(self, inner):
        self.inner = inner

    def create_module(self, spec):
        return self.inner.create_module(spec)

    def exec_module(self, module):
        from test_code.te_on_cpu import extension

        _import_before_mocks()
        sys.modules[_EXTENSION] = extension.module(_EXTENSION)
        common = importlib.import_module(f"{_PACKAGE}.common")
        common.load_framework_extension = lambda name: None
        with _imported_as_mocks():
            self.inner.exec_module(module)
        from test_code.te_on_cpu import adaptations

        adaptations.apply()

    def __getattr__(self, name):
        return getattr(self.inner, name)


def _import_before_mocks() -> None:
    """Import what looks for Triton once: torch must not believe that it is installed."""
    import torch._dynamo
    import torch._inductor.runtime.hints
    import torch._inductor.standalone_compile
    import torch._inductor.utils  # noqa: F401


@contextlib.contextmanager
def _imported_as_mocks() -> Iterator[None]:
    """Replace Triton and ONNX export by mocks while the package is imported; no test calls either."""
    names = [name for name in _TRITON if name not in sys.modules]
    for name in names:
        sys.modules[name] = mock.MagicMock(name=name)
    sys.modules[f"{_PACKAGE}.pytorch.onnx_extensions"] = mock.MagicMock(name="onnx_extensions")
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]

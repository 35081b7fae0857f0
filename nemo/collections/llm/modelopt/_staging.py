"""Write a folder on all ranks, completely or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from nemo.collections.llm.utils import barrier
from nemo.utils.get_rank import is_global_rank_zero

from nemo_modelopt_dropin import files, locks

from . import _parallel


class ExportError(AssertionError):
    """An export failed, or what it wrote is wrong. Stock raises an ``AssertionError`` here.

    It is not a ``RuntimeError``: NeMo's ``export_ckpt`` catches that and writes a checkpoint that is not quantized.
    """


@contextlib.contextmanager
def staged(target: Path, kind: str) -> Iterator[Path]:
    """Yield the path of a new folder, which replaces the target if all ranks end without an error.

    The target is locked until the context ends. Files that a user added to it are kept.

    Args:
        target: The folder to write.
        kind: The kind of content, see ``files.mark``.

    Raises:
        ModelOptConfigError: If the target contains files that this package did not write.
        InUseError: If another process is writing to the target.
        ExportError: On the ranks that succeeded, when another rank failed.
    """
    target, writes = Path(target), is_global_rank_zero()
    with contextlib.ExitStack() as stack:
        staging = files.staging_path(target)
        with fail_together(f"The preparation of {target}"):
            if writes:
                stack.enter_context(locks.lock(target))
                files.staging(target, kind)
        failed = True
        try:
            yield staging
            failed = False
        finally:
            elsewhere = any(_parallel.any_rank([failed]))
            if writes and (failed or elsewhere):
                files.discard(staging, kind)
            barrier()
        if elsewhere:
            raise ExportError(f"The export to {target} failed on another rank, see its log. Nothing was written there.")
        with fail_together(f"Moving {target} into place"):
            if writes:
                files.publish(staging, target, kind)


@contextlib.contextmanager
def fail_together(what: str) -> Iterator[None]:
    """Raise an error on all ranks if the context fails on one of them, so that no rank waits for it.

    Args:
        what: The action, for the message on the ranks that did not fail.

    Raises:
        ExportError: On the ranks that succeeded, when another rank failed.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        elsewhere = any(_parallel.any_rank([failed]))
    if elsewhere:
        raise ExportError(f"{what} failed on another rank, see its log.")

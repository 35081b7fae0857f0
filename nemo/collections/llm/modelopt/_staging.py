"""Folders that all ranks write together, completely or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from nemo.collections.llm.utils import barrier
from nemo.utils.get_rank import is_global_rank_zero

from nemo_modelopt_dropin import files, locks

from . import _parallel


class ExportError(AssertionError):
    """An export failed or wrote something wrong; stock asserted it.

    Not a ``RuntimeError``: NeMo's ``export_ckpt`` takes that as "not a quantized model" and would write a plain one.
    """


@contextlib.contextmanager
def staged(target: Path, kind: str) -> Iterator[Path]:
    """Yield a path to write a folder to; its content replaces the target if all ranks end without an error.

    The output is locked meanwhile. What a user added to a target of ours stays.

    Args:
        target: The folder to write.
        kind: Its kind of content, see ``files.mark``.

    Raises:
        ModelOptConfigError: If the target holds something that this package did not write.
        InUseError: If another process writes there.
        ExportError: On the ranks that succeeded, when another rank failed.
    """
    target, writes = Path(target), is_global_rank_zero()
    with contextlib.ExitStack() as stack:
        staging = files.staging_path(target)
        with together(f"The preparation of {target}"):
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
            raise ExportError(f"The export to {target} failed on another rank, see its log; nothing was left there.")
        with together(f"Moving {target} into place"):
            if writes:
                files.publish(staging, target, kind)


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Let an error of one rank inside of the context end it on all ranks, before they wait for each other.

    Args:
        what: What failed, for the ranks that did not.

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

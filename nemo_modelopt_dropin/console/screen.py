"""The screen of the commands: progress bars, results and important warnings; the output of libraries goes to a log.

Nothing changes for programs that use the library directly: without `quiet`, bars go to standard error and nothing is
relayed. Importing this module is cheap.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from nemo_modelopt_dropin import finder, ranks

if TYPE_CHECKING:
    from tqdm import tqdm

_screen: ContextVar[TextIO | None] = ContextVar("nemo_modelopt_screen", default=None)
# Warnings that were withheld in an earlier context, which a later one reports.
_carried = [0]
_logging_results: ContextVar[bool] = ContextVar("nemo_modelopt_logging_results", default=False)
# Folders of this distribution, all of whose warnings a user can act on.
_PACKAGES = Path(__file__).parents[2]
_OURS = tuple(
    f"{folder}{os.sep}"
    for folder in (_PACKAGES / "nemo_modelopt_dropin", _PACKAGES / "nemo_modelopt_cli", finder.package_dir())
)
# Libraries whose warnings a user can act on; the warnings of all others stay in the log and are counted.
_HEEDED = ("/modelopt/", "megatron/core/dist_checkpointing", "pytorch/callbacks/model_checkpoint")
_NEMO_LOGGING = "/nemo_logging.py"
# Warnings without use: modelopt blocks a feature that is off, and telemetry that nobody enabled ends when interrupted.
_UNHEEDED = (
    "DEPRECATED",
    "Model-Optimizer library in use. Async checkpoint saving is blocked",
    "The parent of span",
)


@contextlib.contextmanager
def results() -> Iterator[None]:
    """Show on the screen what is logged inside the context: it is a result that the user waits for.

    The mark does not change the call that logs, because users' tests replace ``logging`` and compare its arguments.
    """
    token = _logging_results.set(True)
    try:
        yield
    finally:
        _logging_results.reset(token)


@contextlib.contextmanager
def quiet(log: Path | None, carry: bool = False) -> Iterator[TextIO]:
    """Redirect file descriptors 1 and 2 to a log and yield a stream to the original standard error.

    Descriptors are redirected instead of ``sys.stdout`` because NeMo, Megatron and their C++ parts write at import,
    through their own handlers, and from child processes.

    Args:
        log: The file; None redirects nothing.
        carry: Whether the next context, of this process or one that it forks, reports the number of withheld warnings.
    """
    if log is None:
        yield sys.stderr
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    # Line buffered: every line is on the screen even if the process is killed.
    stream = os.fdopen(os.dup(kept[1]), "w", buffering=1, encoding="utf-8")
    token = _screen.set(stream)
    try:
        with _relayed(stream, carry):
            yield stream
    finally:
        _screen.reset(token)
        # The disk of the log may be full, and the reader of the screen closed.
        for output in (sys.stdout.flush, sys.stderr.flush, stream.close):
            with contextlib.suppress(OSError):
                output()
        for number, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, number)
            os.close(saved)


def is_quiet() -> bool:
    """Return whether the output of libraries goes to a log, so that only our own bars are visible."""
    return _screen.get() is not None


def bar(items: Iterable[Any] | None = None, **options) -> tqdm:
    """Return a progress bar of tqdm on the screen of rank zero.

    Args:
        items: Iterable to wrap, if any.
        **options: Options of tqdm.
    """
    from tqdm import tqdm

    stream = _screen.get() or sys.stderr
    settings: dict[str, Any] = {
        "file": stream,
        "disable": not ranks.is_first(),
        "mininterval": 0.1 if stream.isatty() else 15.0,  # no animation in log files
        "dynamic_ncols": stream.isatty(),
    }
    return tqdm(items, **{**settings, **options})


def close_bars() -> None:
    """End the lines of bars that an exception left open, so that the next output starts on a new line."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for one in list(getattr(tqdm, "_instances", ())):
            try:
                one.close()
            except AttributeError:  # interrupted in its constructor, after its first output
                one.fp.write("\n")


def warn(text: str) -> None:
    """Log a warning of a command on rank zero; the screen shows it."""
    from nemo.utils import logging as nemo_logging
    from nemo.utils.get_rank import is_global_rank_zero

    if is_global_rank_zero():
        nemo_logging.warning(text)


class Relay(logging.Handler):
    """Show errors, results, our own warnings and those of `_HEEDED`; count the other warnings.

    Warnings during an import are not shown.
    """

    def __init__(self, stream: TextIO):
        super().__init__()
        self.stream, self.withheld = stream, 0
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record's text, each text once."""
        text = record.getMessage().strip()
        origin = _origin(record, text)
        if record.levelno < logging.WARNING:
            shown = _logging_results.get()
        else:
            heeded = origin.startswith(_OURS) or any(part in origin for part in _HEEDED)
            noise = text.startswith(_UNHEEDED)
            shown = (heeded or record.levelno >= logging.ERROR) and not noise and not importing()
            self.withheld += not shown
        if shown and text not in self._shown:
            self._shown.add(text)
            level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            self.stream.write(f"{level}{text}\n")


def _origin(record: logging.LogRecord, text: str) -> str:
    """Return the file that a record comes from.

    NeMo logs Python warnings from its own file; their first line starts with the file that issued the warning. Before
    2.7, it names its own file for all other records as well: the caller is then found on the stack.
    """
    if not record.pathname.endswith(_NEMO_LOGGING):
        return record.pathname
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.endswith((__file__, logging.__file__, _NEMO_LOGGING)):
        frame = frame.f_back
    caller = frame.f_code.co_filename if frame else warnings.__file__
    return text.partition(":")[0] if caller == warnings.__file__ else caller


def importing(frame: FrameType | None = None) -> bool:
    """Return whether a module is being imported further up the stack, the caller's by default."""
    frame = frame or sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def _relayed(stream: TextIO, carry: bool) -> Iterator[None]:
    """Relay log records to the screen on rank zero."""
    if not ranks.is_first():
        yield
        return
    relay = Relay(stream)
    relay.withheld, _carried[0] = _carried[0], 0
    # NeMo's logger does not propagate to the root logger.
    loggers = logging.getLogger(), logging.getLogger("nemo_logger")
    for logger in loggers:
        logger.addHandler(relay)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(relay)
        if carry:
            _carried[0] = relay.withheld
        elif relay.withheld:
            stream.write(f"{relay.withheld} warnings of libraries are not shown here; -v shows them\n")

"""What a person sees of our scripts: our lines, bars, results, and the warnings that matter; libraries write to a log.

Nothing changes for code that calls the library itself: without `quiet`, bars go to standard error and nothing is
relayed. Importing this is cheap.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

_screen: ContextVar[TextIO | None] = ContextVar("nemo_modelopt_screen", default=None)
# Whose warnings a user can act on; the others stay in the log and are counted.
_HEEDED = (
    "nemo_modelopt_cli",
    "nemo_modelopt_dropin",
    "collections/llm/modelopt",
    "/modelopt/",
    "megatron/core/dist_checkpointing",
    "pytorch/callbacks/model_checkpoint",
)
# What tells nothing: modelopt blocks what is not used, and telemetry that nobody asked for ends with an interruption.
_UNHEEDED = (
    "DEPRECATED",
    "Model-Optimizer library in use. Async checkpoint saving is blocked",
    "The parent of span",
)
# Modules of ours whose information is the result that a user waits for.
_RESULTS = ("comparison", "_report", "pruner", "quantizers", "hf_verify", "searcher")


@contextlib.contextmanager
def quiet(log: Path | None) -> Iterator[TextIO]:
    """Send file descriptors 1 and 2 to ``log`` and yield a stream to where standard error went before.

    Descriptors and not ``sys.stdout``: NeMo, Megatron and their C++ parts write at import, through handlers they made
    themselves, and from child processes. None leaves everything as it is.
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
    # Line buffered: what we said is on the screen when something kills the process.
    stream = os.fdopen(os.dup(kept[1]), "w", buffering=1, encoding="utf-8")
    token = _screen.set(stream)
    try:
        with _relayed(stream):
            yield stream
    finally:
        _screen.reset(token)
        # The log's disk may be full, and the screen's reader gone.
        for output in (sys.stdout.flush, sys.stderr.flush, stream.close):
            with contextlib.suppress(OSError):
                output()
        for number, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, number)
            os.close(saved)


def is_quiet() -> bool:
    """Return whether libraries write to a log, so that only our own bars can be seen."""
    return _screen.get() is not None


def bar(items: Iterable[Any] | None = None, **options) -> tqdm:
    """Return tqdm's bar, with the time left, on rank zero's screen; ``options`` are tqdm's own."""
    from tqdm import tqdm

    stream = _screen.get() or sys.stderr
    settings: dict[str, Any] = {
        "file": stream,
        "disable": os.environ.get("RANK", "0") != "0",
        "mininterval": 0.1 if stream.isatty() else 15.0,  # a log file needs no animation
        "dynamic_ncols": stream.isatty(),
    }
    return tqdm(items, **{**settings, **options})


def close_bars() -> None:
    """End the lines of bars that an exception left open, so that what is written next has a line of its own."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for one in list(getattr(tqdm, "_instances", ())):
            try:
                one.close()
            except AttributeError:  # interrupted in its constructor, with its first line on the screen
                one.fp.write("\n")


def warn(text: str) -> None:
    """Log a warning of a script of ours, on rank zero: the screen shows it, whatever the script's place is."""
    from nemo.utils import logging as nemo_logging
    from nemo.utils.get_rank import is_global_rank_zero

    if is_global_rank_zero():
        nemo_logging.warning(text)


class Relay(logging.Handler):
    """Show warnings that matter, errors, and our own results; count the rest. Nothing that comes up in an import."""

    def __init__(self, stream: TextIO):
        super().__init__()
        self.stream, self.withheld = stream, 0
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record's text, each text once."""
        text = record.getMessage().strip()
        # NeMo logs Python's warnings from its own file; their first line starts with the file that warned.
        origin = text.partition(":")[0] if record.pathname.endswith("nemo_logging.py") else record.pathname
        heeded, noise = any(part in origin for part in _HEEDED), text.startswith(_UNHEEDED)
        if record.levelno < logging.WARNING:
            shown = heeded and record.levelno == logging.INFO and record.module in _RESULTS
        else:
            shown = (heeded or record.levelno >= logging.ERROR) and not noise and not importing()
            self.withheld += not shown
        if shown and text not in self._shown:
            self._shown.add(text)
            level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            self.stream.write(f"{level}{text}\n")


def importing(frame: FrameType | None = None) -> bool:
    """Return whether a module is being imported further up the stack, the caller's by default."""
    frame = frame or sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def _relayed(stream: TextIO) -> Iterator[None]:
    """Relay what loggers get to the screen, on rank zero."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    relay = Relay(stream)
    # NeMo's logger passes nothing on to the root logger.
    loggers = logging.getLogger(), logging.getLogger("nemo_logger")
    for logger in loggers:
        logger.addHandler(relay)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(relay)
        if relay.withheld:
            stream.write(f"{relay.withheld} warnings of libraries are not shown here; -v shows them\n")

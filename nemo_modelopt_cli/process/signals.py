"""Ctrl-C and SIGTERM (the signal that Slurm and torchrun send): one message, exit codes 130 and 143."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator

from nemo_modelopt_dropin import ranks
from nemo_modelopt_dropin.console import screen

CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
# What callers print when a signal ended the process.
RESUMABLE = "interrupted; run the same command again to resume"
NOTHING_WRITTEN = "interrupted; nothing was written"


class Stopped(SystemExit):
    """Raised in the main thread when SIGTERM arrives; a SystemExit, so that libraries let it through."""


def is_ours(code: int) -> bool:
    """Return whether an exit code means that a signal ended the process."""
    return code in CODES.values()


def reports() -> bool:
    """Return whether this process prints the message: rank zero, unless the process that started it does."""
    return ranks.leads()


@contextlib.contextmanager
def seen(at_once: Callable[[int], None] | None = None) -> Iterator[list[int]]:
    """Turn both signals into exceptions inside the context, and yield the list of signals that have arrived.

    The handlers that were there before are put back on leaving.

    Args:
        at_once: ends the process with an exit code if a module is being imported: some libraries catch every exception
            during their import, and would continue. None raises there too.
    """
    arrived: list[int] = []

    def handle(number, frame):
        arrived.append(number)
        if at_once is not None and screen.importing(frame):
            at_once(CODES[number])
        if number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        raise Stopped(CODES[number])

    # Set even if ignored before: a shell starts background jobs with Ctrl-C's signal ignored, and then one sent on
    # purpose would be too.
    before = {number: signal.signal(number, handle) for number in CODES}
    try:
        yield arrived
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def blocked() -> Iterator[Callable[[], None]]:
    """Hold both signals back inside the context, and yield a function that lets them through earlier."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, CODES)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield unblock
    finally:
        unblock()


def guarded(work: Callable[[], int], message: object) -> int:
    """Do a command's work and return its exit code; a signal outside a rank's own handling prints the message.

    Args:
        work: returns the exit code.
        message: printed on standard error if a signal ends the work.
    """
    with seen() as arrived:
        try:
            return work()
        except BaseException:
            if not arrived:
                raise
            if reports():
                sys.stderr.write(f"{message}\n")
            return CODES[arrived[0]]

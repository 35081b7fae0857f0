"""Completion scripts for shells, generated from the parsers of the commands."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path


def script(line: argparse.ArgumentParser, parsers: Iterable[argparse.ArgumentParser], shell: str) -> str:
    """Return a script that completes commands, flags, choices and paths without starting Python.

    Args:
        line: Parser of the command ``nemo-modelopt``.
        parsers: Parsers of the commands below it, whose actions are changed.
        shell: A name in `main.SHELLS`.
    """
    import shtab

    for parser in parsers:
        for action in parser._actions:
            # In bash, a flag with several values would otherwise complete no further flag.
            several = action.nargs in (argparse.ONE_OR_MORE, argparse.ZERO_OR_MORE)
            if _takes_text(action):
                action.complete = {**shtab.FILE, "bash": ""} if several else shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(line, shell)


def _takes_text(action: argparse.Action) -> bool:
    """Return whether the values of an option are texts, any of which may be a path."""
    return action.nargs != 0 and action.choices is None and action.type in (None, Path)

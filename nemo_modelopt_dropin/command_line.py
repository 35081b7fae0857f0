"""What our scripts share before anything heavy is imported: parsing, checks that list every problem, quiet starts."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = 2


class Parser(argparse.ArgumentParser):
    """An argument parser that knows the nearest flag and reads ``--some-flag`` as ``--some_flag`` and back."""

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):  # type: ignore[override]
        """Return the arguments, or exit with status 2 after naming every unknown flag and the nearest known one."""
        words = [self._known_spelling(word) for word in (sys.argv[1:] if args is None else args)]
        found, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error("\n".join(self._complaint(word) for word in unknown))
        return found

    def _known_spelling(self, word: str) -> str:
        """Return the flag as the parser has it, whether it was written with ``-`` or with ``_``."""
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag not in self._option_string_actions:
            for other in (flag[:2] + flag[2:].replace("-", "_"), flag[:2] + flag[2:].replace("_", "-")):
                if other in self._option_string_actions:
                    return other + equals + value
        return word

    def _complaint(self, word: str) -> str:
        near = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, n=1)
        return f"unknown argument {word}" + (f"; did you mean {near[0]}?" if near else "")

    def format_help(self) -> str:
        """Return the help with the default of every option that has one."""
        for action in self._actions:
            shown = action.default not in (None, argparse.SUPPRESS) and not isinstance(action.default, bool)
            if shown and action.option_strings and "default" not in (action.help or ""):
                action.help = f"{action.help or ''} (default: %(default)s)".strip()
        return super().format_help()

    def error(self, message: str):
        """Print every line of the message and exit with status 2."""
        lines = [f"{self.prog}: {line}\n" for line in (*message.splitlines(), "see --help")]
        self.exit(USAGE, "".join(lines))


def missing_paths(paths: dict[str, str | None], folder: bool = True) -> list[str]:
    """Return a sentence for each path that was given and is not there."""
    found = []
    for flag, path in paths.items():
        if path and not (Path(path).is_dir() if folder else Path(path).exists()):
            found.append(f"{flag} {path}: there is no such {'folder' if folder else 'file'}")
    return found


def layout_problems(devices: int, num_nodes: int, tp: int, pp: int, others: int = 1) -> list[str]:
    """Return what is wrong with a number of ranks and the sizes that they are split into."""
    if min(devices, num_nodes, tp, pp, others) < 1:
        return ["devices, nodes and parallel sizes must be at least 1"]
    if devices * num_nodes % (tp * pp * others):
        return [
            f"{devices} devices x {num_nodes} nodes = {devices * num_nodes} ranks cannot be split into "
            f"tp {tp} x pp {pp}{f' x {others}' if others > 1 else ''}"
        ]
    return []


def start_on_cpu() -> None:
    """Let this process run Megatron on the CPU over gloo; call it before NeMo is imported."""
    from nemo_modelopt_dropin.compress import runner

    runner.cpu_environment()
    from nemo_modelopt_dropin import cpu_backend

    cpu_backend.enable()


def run_local_ranks(devices: int, cpu: bool) -> int | None:
    """Start ``devices`` CPU ranks of this command and return their exit code; None where this is a rank already.

    On GPUs torchrun (or Lightning itself) starts the ranks, as for NeMo's own scripts.
    """
    from nemo_modelopt_dropin.compress import launch

    if not cpu or devices == 1 or launch.is_rank():
        return None
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    return launch.run_ranks(devices)

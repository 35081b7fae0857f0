"""The command ``nemo-modelopt``: list the commands, start one of them, print completions and the version.

Only the module of the command that runs is imported, so that ``--help`` takes a tenth of a second.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from nemo_modelopt_cli.process import entry, processes

PROG = "nemo-modelopt"
USAGE = 2
SHELLS = ("bash", "zsh")
_DISTRIBUTION = "nemo-modelopt-dropin"


class Command(NamedTuple):
    """A command of ``nemo-modelopt``.

    Args:
        name: the word that selects it.
        module_name: module with its functions ``parser()`` and ``main(argv, prog)``.
        summary: one line for the list of commands.
    """

    name: str
    module_name: str
    summary: str

    @property
    def prog(self) -> str:
        """Return the words that start it, for its messages."""
        return f"{PROG} {self.name}"

    @property
    def module(self) -> ModuleType:
        """Import and return its module."""
        return importlib.import_module(self.module_name)

    def parser(self) -> argparse.ArgumentParser:
        """Return its command line."""
        return self.module.parser(self.prog)


COMMANDS = {
    command.name: command
    for command in (
        Command("ptq", "nemo_modelopt_cli.ptq", "quantize a checkpoint after training and export it"),
        Command("prune", "nemo_modelopt_cli.prune", "prune the width and depth of a checkpoint"),
        Command("distill", "nemo_modelopt_cli.distill", "train a checkpoint, with or without a teacher"),
        Command(
            "compress",
            "nemo_modelopt_cli.compress.command",
            "prune, distill, quantize, export and report in one resumable command",
        ),
        Command("fit", "nemo_modelopt_cli.compress.fit_command", "choose sizes and formats that keep a budget"),
        Command(
            "evaluate",
            "nemo_modelopt_cli.evaluate",
            "score Hugging Face folders and checkpoints on tasks of EleutherAI's lm-eval",
        ),
        Command("compare", "nemo_modelopt_cli.compare", "compare two finished runs of compress on one page"),
        Command("demo", "nemo_modelopt_cli.demo", "compress a small GPT on this machine's CPU"),
    )
}


def main() -> int:
    """Run the command line of this process and return its exit code; entry point of ``nemo-modelopt``."""
    processes.import_in_spawned_children(Path(__file__).with_name("__main__.py"))
    return entry.run(lambda: run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code.

    Args:
        argv: the name of a command and its arguments, or options of ``nemo-modelopt`` itself.
    """
    name = argv[0] if argv else ""
    if name in COMMANDS:
        command = COMMANDS[name]
        work: Callable[[list[str], str], int] = command.module.main
        return work(list(argv[1:]), command.prog)
    if name and not name.startswith("-"):
        return _unknown(name)
    line = parser()
    arguments = line.parse_args(argv)
    if arguments.version:
        sys.stdout.write(f"{_DISTRIBUTION} {_version()}\n")
    elif arguments.print_completion:
        from nemo_modelopt_cli import completion

        whole = parser(with_options=True)
        sys.stdout.write(completion.script(whole, command_parsers(whole).values(), arguments.print_completion))
    else:
        line.print_help(sys.stderr)
        return USAGE
    return 0


def parser(with_options: bool = False) -> argparse.ArgumentParser:
    """Return the parser of ``nemo-modelopt``.

    Args:
        with_options: add the options of every command, which imports the modules of all commands.
    """
    line = argparse.ArgumentParser(
        PROG,
        description="Quantize, prune and distill NeMo 2 checkpoints.",
        epilog=f"'{PROG} COMMAND --help' lists the options of a command.",
        allow_abbrev=False,
    )
    line.add_argument("--version", action="store_true", help="print the version and exit")
    line.add_argument("--print-completion", choices=SHELLS, help="print the completion script of a shell and exit")
    commands = line.add_subparsers(title="commands", metavar="COMMAND", parser_class=argparse.ArgumentParser)
    for command in COMMANDS.values():
        parents = [command.parser()] if with_options else []
        commands.add_parser(command.name, help=command.summary, parents=parents, add_help=False)
    return line


def command_parsers(line: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the commands, by name.

    Args:
        line: what `parser` returned.
    """
    (commands,) = (action for action in line._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


def _unknown(name: str) -> int:
    """Report a command that does not exist."""
    from nemo_modelopt_dropin.errors import did_you_mean

    sys.stderr.write(
        f"{PROG}: unknown command {name!r}{did_you_mean(name, COMMANDS)}\n"
        f"{PROG}: the commands are {', '.join(COMMANDS)}\n{PROG}: see --help\n"
    )
    return USAGE


def _version() -> str:
    """Return the installed version."""
    from importlib import metadata

    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "(not installed)"

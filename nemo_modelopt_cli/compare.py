"""Compare two finished runs of compress on one page, compare.html."""

from __future__ import annotations

import argparse

from nemo_modelopt_cli.compress import command
from nemo_modelopt_cli.parser import Parser


def parser(prog: str | None = None) -> Parser:
    """Return the command line."""
    line = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    line.add_argument("first", metavar="A", help="folder of a finished run")
    line.add_argument("second", metavar="B", help="folder of another finished run")
    line.add_argument("--output", metavar="FOLDER", help="folder of compare.html (default: B)")
    return line


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Write the page and return the exit code."""
    arguments = parser(prog).parse_args(argv)
    output = ["--output", arguments.output] if arguments.output else []
    return command.main(["--compare", arguments.first, arguments.second, *output], prog)

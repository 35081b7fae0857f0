"""Compare two finished runs of compress on one page, compare.html."""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_modelopt_cli.compress import command
from nemo_modelopt_cli.parser import Parser


def parser(prog: str | None = None) -> Parser:
    """Return the command line."""
    line = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    line.add_argument("first", type=Path, metavar="A", help="folder of a finished run")
    line.add_argument("second", type=Path, metavar="B", help="folder of another finished run")
    line.add_argument("--output", type=Path, metavar="FOLDER", help="folder of compare.html (default: B)")
    return line


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Write the page and return the exit code."""
    from nemo_modelopt_dropin.report import compare

    line = parser(prog)
    arguments = line.parse_args(argv)
    folder = command.checked_comparison(line, [arguments.first, arguments.second], arguments.output)
    return compare.show(arguments.first, arguments.second, folder)

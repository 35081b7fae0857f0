"""Prepare a checkpoint and run scripts on a live rank, for the test of the commands."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

from test_code.commands import observe
from test_code.support import jobs_quant, tiny


def prepare(folder: str) -> None:
    """Write a tiny trained checkpoint and texts."""
    here = Path(folder)
    jobs_quant.make_checkpoint(here / "my_checkpoint", llama=True, steps=2)
    texts = tiny.texts(120)
    for name, rows in (("texts", texts[:80]), ("heldout", texts[80:])):
        (here / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def run(script: str, line: str, folder: str) -> int:
    """Run a command line in a folder as ``__main__``; return its exit code."""
    argv, before = sys.argv, Path.cwd()
    sys.argv = observe.command(script, line)[1:]
    os.chdir(folder)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = argv
        os.chdir(before)
    return 0

"""Record what the commands do: ``python -m test_code.commands.record [PART ...]``.

The parts are flags, settings, plans, "exit codes" and runs, by default all of them; runs take minutes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from test_code.commands import jobs, lines, observe, recording


def flags(folder: Path) -> dict[str, Any]:
    """Return the flags of each script."""
    return {script: observe.flags(script, folder) for script in lines.SCRIPTS}


def settings(folder: Path) -> dict[str, Any]:
    """Return the settings of each accepted line."""
    return _of_lines(lambda script, line: observe.settings(script, line, folder), lines.SCRIPTS)


def plans(folder: Path) -> dict[str, Any]:
    """Return the plan of each accepted line of the scripts that have ``--dry-run``."""
    with_plan = [script for script in lines.SCRIPTS if script != "demo"]
    return _of_lines(lambda script, line: observe.plan(script, line, folder), with_plan)


def exit_codes(folder: Path) -> dict[str, Any]:
    """Return the exit code of each wrong line."""
    return {
        script: {line: observe.run(script, line, folder).returncode for line in wrong}
        for script, wrong in lines.WRONG.items()
    }


def runs(folder: Path) -> dict[str, Any]:
    """Return the files of the small real runs."""
    from test_code.support.ranks import RankPool

    pool, work = RankPool(1, folder / "ranks"), folder / "work"
    work.mkdir()
    found: dict[str, Any] = {}
    try:
        pool.run(jobs.prepare, str(work))
        for name, words in lines.RUNS.items():
            script, _, line = words.partition(" ")
            before = observe.files(work)
            code = pool.run(jobs.run, script, line, str(work), timeout=600)[0]
            found[name] = _checked(name, code, "", observe.results(work, before))
    finally:
        pool.close()
    for script, line in lines.WHOLE_JOBS.items():
        before = observe.files(work)
        shown = observe.run(script, line, work, timeout=900)
        found[script] = _checked(script, shown.returncode, shown.stderr, observe.results(work, before))
    return found


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "flags": flags,
    "settings": settings,
    "plans": plans,
    "exit codes": exit_codes,
    "runs": runs,
}


def _of_lines(see: Callable[[str, str], Any], scripts: tuple[str, ...] | list[str]) -> dict[str, Any]:
    return {script: {line: see(script, line) for line in lines.accepted(script)} for script in scripts}


def _checked(name: str, code: int, shown: str, found: dict[str, Any]) -> dict[str, Any]:
    if code:
        raise RuntimeError(f"{name} ended with {code}\n{shown[-3000:]}")
    return found


def main() -> None:
    """Record the requested parts and keep the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parts = parser.parse_args().parts or list(PARTS)
    unknown = set(parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    content = recording.read() if recording.FILE.exists() else {}
    for part in parts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name).resolve()
            if part != "runs":
                observe.inputs(folder)
            os.chdir(folder)
            content[part] = PARTS[part](folder)
            os.chdir(observe.ROOT)
    recording.write({part: content[part] for part in PARTS if part in content})


if __name__ == "__main__":
    main()

"""Run the tests on the other versions we support: each row of the matrix is installed once and put first on the path.

    python scripts/test_compat.py                                   # every row, the tests that depend on it
    python scripts/test_compat.py --row nemo-2.6.2 --whole          # one row, the whole suite
    python scripts/test_compat.py --row nemo-2.6.2 -- -x test_code/test_pruner.py

A row holds only what differs from this environment (``pip install --no-deps --target``); the rest comes from here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "compat"
MARKER = "compat-pins.json"

# What differs from constraints.txt. nemo-toolkit 2.5.3 imports a class that megatron-core 0.15 has no more;
# modelopt 0.37 requires torchprofile, which 0.43 does not.
MATRIX: dict[str, tuple[str, ...]] = {
    "modelopt-0.37.0": ("nvidia-modelopt==0.37.0", "torchprofile==0.1.0"),
    "modelopt-0.44.0": ("nvidia-modelopt==0.44.0",),
    "modelopt-0.47.0": ("nvidia-modelopt==0.47.0",),
    "nemo-2.6.2": ("nemo-toolkit==2.6.2",),
    "nemo-2.6.2-modelopt-0.47.0": ("nemo-toolkit==2.6.2", "nvidia-modelopt==0.47.0"),
    "nemo-2.6.2-modelopt-0.37.0": ("nemo-toolkit==2.6.2", "nvidia-modelopt==0.37.0", "torchprofile==0.1.0"),
    "nemo-2.5.3": ("nemo-toolkit==2.5.3", "megatron-core==0.14.0"),
    "nemo-2.5.3-modelopt-0.37.0": (
        "nemo-toolkit==2.5.3",
        "megatron-core==0.14.0",
        "nvidia-modelopt==0.37.0",
        "torchprofile==0.1.0",
    ),
    "nemo-2.5.3-modelopt-0.47.0": ("nemo-toolkit==2.5.3", "megatron-core==0.14.0", "nvidia-modelopt==0.47.0"),
}
# Distribution -> the module whose file and version say what is really imported.
MODULES = {"nemo-toolkit": "nemo", "megatron-core": "megatron.core", "nvidia-modelopt": "modelopt"}
# What a row leaves out unless the whole suite is wanted: nothing of a library's decides its outcome.
LEFT_OUT: dict[str, str] = {
    "cli/test_interruptions.py": "signals, kills and full disks",
    "commands": "arguments and plans of the commands, against a record",
    "compress/test_stages.py": "which stages of a job run again",
    "evaluation": "lm-eval, which runs in a process of its own",
    "files": "folders and marks",
    "report": "pages and figures from numbers",
    "repository": "this repository: its documentation, links, structure",
}
KINDS = ("passed", "failed", "errors", "skipped", "xfailed", "deselected")


class CompatError(Exception):
    """A row cannot be run: its name is unknown, or it does not import what it should."""


@dataclass
class Result:
    """What a row's run was: versions imported, pytest's exit code, its counts, seconds."""

    row: str
    versions: Mapping[str, str]
    exit_code: int
    seconds: float
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        """Return whether everything passed and something ran."""
        bad = self.counts.get("failed", 0) + self.counts.get("errors", 0)
        return self.exit_code == 0 and bad == 0 and self.counts.get("passed", 0) > 0


def chosen_rows(name: str | None) -> list[str]:
    """Return the rows of that name (None: all).

    Raises:
        CompatError: If there is none.
    """
    if name is None:
        return list(MATRIX)
    if name not in MATRIX:
        raise CompatError(f"there is no row {name!r}; rows: {', '.join(MATRIX)}")
    return [name]


def recorded(pins: Sequence[str]) -> str:
    """Return what a row's folder records: it is installed again when this changes."""
    return json.dumps({"pins": sorted(pins), "python": list(sys.version_info[:2])})


def is_installed(folder: Path, pins: Sequence[str]) -> bool:
    """Return whether a folder holds exactly these pins, for this Python."""
    marker = folder / MARKER
    return marker.exists() and marker.read_text() == recorded(pins)


def environment(folder: Path, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a row: its folder first on the path, then our source tree.

    Ranks and subprocesses inherit it, and ``importlib.metadata`` finds the row's versions first. Stock's subpackage
    (``NEMO_MODELOPT=stock``) is then that of the row too.
    """
    inherited = [entry for entry in base.get("PYTHONPATH", "").split(os.pathsep) if entry and Path(entry) != ROOT]
    found = {name: value for name, value in base.items() if name != "NEMO_MODELOPT"}
    return {**found, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), *inherited])}


def parse_counts(output: str) -> dict[str, int]:
    """Return the counts of pytest's closing line (``=== 3 passed, 1 skipped in 0.5s ===``); empty without one."""
    for line in reversed(output.splitlines()):
        closing = re.fullmatch(r"(?:=+ )?(.*\d+ \w+.*) in [\d.]+m?s(?: \([\d:]+\))?(?: =+)?", line.strip())
        if closing:
            pairs = re.findall(r"(\d+) (\w+)", closing[1])
            return {"errors" if kind == "error" else kind: int(number) for number, kind in pairs}
    return {}


def check_imports(row: str, found: Mapping[str, Mapping[str, str]], folder: Path) -> dict[str, str]:
    """Return the versions that a row imports.

    Args:
        row: Name of the row.
        found: Distribution to ``version`` (its metadata), ``imported`` (the module's) and ``file``.
        folder: Where the row is installed.

    Raises:
        CompatError: If a pinned distribution comes from elsewhere or has another version.
    """
    for pin in MATRIX[row]:
        name, _, version = pin.partition("==")
        if name not in found:
            continue
        entry = found[name]
        if entry["version"] != version or entry["imported"] != version:
            raise CompatError(f"{row}: {name} {entry['imported']} (metadata {entry['version']}), not {version}")
        if not Path(entry["file"]).is_relative_to(folder):
            raise CompatError(f"{row}: {name} is imported from {entry['file']}, not from {folder}")
    return {name: entry["imported"] for name, entry in found.items()}


def table(results: Sequence[Result]) -> str:
    """Return the rows as a Markdown table: versions imported, counts, minutes."""
    heads = ["row", *MODULES, *KINDS, "minutes"]
    lines = [
        [
            result.row if result.is_good else f"{result.row} (FAILED)",
            *(result.versions.get(name, "?") for name in MODULES),
            *(str(result.counts.get(kind, 0)) for kind in KINDS),
            f"{result.seconds / 60:.1f}",
        ]
        for result in results
    ]
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    text = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in [heads, *lines]]
    text.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in text)


def install(row: str) -> Path:
    """Return the folder of a row, installed where it is missing or its pins changed."""
    folder, pins = FOLDER / row, MATRIX[row]
    if is_installed(folder, pins):
        return folder
    print(f"== {row}: installing {' '.join(pins)}", flush=True)
    beside = FOLDER / f".{row}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(beside), *pins]
    subprocess.run(command, check=True)
    (beside / MARKER).write_text(recorded(pins))
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    return folder


_PROBE = """
import importlib, json, sys
from importlib import metadata
import nemo_modelopt_dropin
found = {}
for name, module in json.loads(sys.argv[1]).items():
    m = importlib.import_module(module)
    found[name] = {"version": metadata.version(name), "imported": m.__version__, "file": m.__file__}
print(json.dumps([nemo_modelopt_dropin.__file__, found]))
"""


def imported_versions(row: str, folder: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Return the versions that an interpreter of the row really imports.

    Raises:
        CompatError: If they are not the row's, or our package is not this source tree's.
    """
    command = [sys.executable, "-W", "ignore", "-c", _PROBE, json.dumps(MODULES)]
    result = subprocess.run(command, env=dict(env), cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise CompatError(f"{row}: importing failed\n{result.stderr[-2000:]}")
    ours, found = json.loads(result.stdout.splitlines()[-1])
    if not Path(ours).is_relative_to(ROOT):
        raise CompatError(f"{row}: our package is imported from {ours}, not from {ROOT}")
    return check_imports(row, found, folder)


def suite(whole: bool) -> list[str]:
    """Return pytest's arguments for a row: two processes, without `LEFT_OUT` unless all is wanted."""
    left_out = [] if whole else [f"--ignore=test_code/{name}" for name in LEFT_OUT]
    return ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", *left_out]


def run_row(row: str, arguments: Sequence[str]) -> Result:
    """Install a row, run pytest on it with its output shown, and return the result."""
    folder = install(row)
    env = environment(folder, os.environ)
    versions = imported_versions(row, folder, env)
    print(f"== {row}: {', '.join(f'{name} {version}' for name, version in versions.items())}", flush=True)
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", *arguments]
    lines = []
    with subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return Result(row, versions, process.returncode, time.monotonic() - started, parse_counts("".join(lines)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows and print the table; 1 where one failed."""
    parser = argparse.ArgumentParser(description="Run the tests on the other supported versions.")
    parser.add_argument("--row", metavar="NAME", help=f"one row only: {', '.join(MATRIX)}")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --; by default what depends on versions")
    parser.add_argument(
        "--whole", action="store_true", help="by default, the whole suite: these too: " + ", ".join(LEFT_OUT)
    )
    options = parser.parse_args(arguments)
    results = []
    try:
        for row in chosen_rows(options.row):
            results.append(run_row(row, options.pytest or suite(options.whole)))
    except CompatError as error:
        print(f"test_compat: {error}", file=sys.stderr)
        return 1
    finally:
        if results:
            print(f"\n{table(results)}", flush=True)
    return 0 if all(result.is_good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())

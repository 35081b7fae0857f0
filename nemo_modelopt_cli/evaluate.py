"""Score models on tasks of EleutherAI's lm-eval: Hugging Face folders and NeMo 2 checkpoints.

    nemo-modelopt evaluate teacher_hf student_hf --tasks arc_easy,hellaswag --limit 200

lm-eval runs in a process of its own, without network access unless HF_HUB_OFFLINE=0 is set. NeMo checkpoints are
written as Hugging Face files first, in one process, and these are removed afterwards. The command prints a table and
writes evaluation.json. Exit codes: 0 done, 1 failed, 2 wrong arguments or settings, 130 interrupted, 143 ended by
SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

from nemo_modelopt_cli import options
from nemo_modelopt_cli.evaluation import check, folders, scoring, tasks
from nemo_modelopt_cli.evaluation.harness_settings import Harness, conversion_problems
from nemo_modelopt_cli.options import option
from nemo_modelopt_cli.parser import Parser, no_checkpoints
from nemo_modelopt_cli.process import processes, signals
from nemo_modelopt_dropin import files, locks
from nemo_modelopt_dropin.errors import InUseError, ModelOptConfigError
from nemo_modelopt_dropin.preflight import output_checks, readers

RESULT = "evaluation.json"
_CONVERTED, _LOG = "converted", "log"


@dataclass(frozen=True, kw_only=True)
class Options(Harness):
    """The flags of the command."""

    tasks: tuple[str, ...] = field(
        metadata=option("tasks: names, patterns, YAML files of tasks or folders of them, separated by commas")
    )
    output: str = field(default="runs/evaluate", metadata=option(f"folder of {RESULT}"))
    cpu: bool = field(default=False, metadata=option("run on the CPU"))
    devices: int = field(default=1, metadata=option("GPUs to split a model over"))


def parser(prog: str | None = None) -> Parser:
    """Return the command line."""
    line = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    line.add_argument("folders", nargs="+", metavar="FOLDER", help="Hugging Face folder or NeMo 2 checkpoint")
    options.add(line, Options, separator="-")
    line.add_argument("--dry-run", action="store_true", help="check the arguments and the tasks, and stop")
    line.add_argument("-v", "--verbose", action="store_true", help="show the output of the libraries")
    return line


def resolve(argv: list[str] | None = None, prog: str | None = None) -> tuple[Options, dict[str, Path], bool, bool]:
    """Return the settings, the models by name, and the switches dry-run and verbose.

    Exits with status 2 after listing everything that is wrong.
    """
    line = parser(prog)
    given = line.read(argv)
    line.refuse([])
    chosen = options.build(Options, given)
    found = {name: Path(name).expanduser().resolve() for name in given.folders}
    problems = chosen.harness_problems() + ([] if chosen.devices > 0 else ["devices must be positive"])
    names = tasks.names(chosen.tasks)
    problems += [problem for name in names for problem in tasks.problems(name)]
    if not names:
        problems.append("tasks: set at least one")
    for name, folder in found.items():
        if is_nemo(folder):
            problems += no_checkpoints({name: str(folder)}) or conversion_problems(str(folder))
        elif not (folder / "config.json").is_file():
            kind = "no such folder" if not folder.is_dir() else "neither a Hugging Face folder nor a NeMo 2 checkpoint"
            problems.append(f"{name}: {kind}")
        else:
            problems += folders.problems(folder, chosen.backend) if chosen.backend in ("hf", "vllm") else []
    problems += output_checks.place_problems("--output", chosen.output, {name: str(one) for name, one in found.items()})
    taken = files.problem(Path(chosen.output), files.EVALUATION)
    problems += [f"--output: {taken}"] if taken and not problems else []
    line.refuse(problems)
    return chosen, found, given.dry_run, given.verbose


def is_nemo(folder: Path) -> bool:
    """Return whether a folder is a NeMo 2 checkpoint."""
    return any((folder / name).exists() for name in ("context", "io.json"))


def is_quantized(folder: Path) -> bool:
    """Return whether a NeMo 2 checkpoint has a state of modelopt: it is then written in compressed-tensors' layout."""
    return any((folder / "weights").glob("modelopt_state*"))


def labels(given: Sequence[str]) -> dict[str, str]:
    """Return a short name for each model: the name of its folder, or the path as it was given if that is not unique."""
    short = {name: Path(name).resolve().name for name in given}
    return {name: one if list(short.values()).count(one) == 1 else name for name, one in short.items()}


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Score the models, print and write the scores; return the exit code."""
    from nemo_modelopt_cli.compress import runner

    chosen, found, dry_run, verbose = resolve(argv, prog)
    layouts = [folders.quantization(folder)[1] for folder in found.values()]
    compressed = readers.COMPRESSED_TENSORS in layouts or any(map(is_quantized, found.values()))
    try:
        packages = check.check(tasks.names(chosen.tasks), chosen, compressed, flag="--python")
    except ModelOptConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return runner.USAGE
    if dry_run:
        return _show_plan(chosen, found, packages)
    after = _Interrupted(Path(chosen.output) / RESULT)
    return signals.guarded(lambda: _execute(chosen, found, verbose, after), after)


@dataclass
class _Interrupted:
    """What is printed after an interruption, put together at that time."""

    result: Path
    scored: int = 0

    def __str__(self) -> str:
        if not self.scored:
            return signals.NOTHING_WRITTEN
        return f"interrupted; {self.result} holds the scores of the first {self.scored} models"


def _show_plan(chosen: Options, found: dict[str, Path], packages: dict[str, str]) -> int:
    from nemo_modelopt_cli import dry_run

    rows = [
        ("model", f"{name}{' (NeMo: written as Hugging Face files first)' if is_nemo(path) else ''}")
        for name, path in found.items()
    ]
    limit = "all rows" if chosen.limit is None else f"at most {chosen.limit} rows each"
    rows.append(("tasks", f"{', '.join(tasks.names(chosen.tasks))}: {limit}"))
    rows.append(("with", ", ".join(f"{name} {version}" for name, version in packages.items())))
    return dry_run.show([*rows, ("writes", str(Path(chosen.output) / RESULT))])


def _execute(chosen: Options, found: dict[str, Path], verbose: bool, after: _Interrupted) -> int:
    from nemo_modelopt_cli.compress import runner

    output = Path(chosen.output).resolve()
    try:
        with locks.lock(output):
            files.own(output, files.EVALUATION, RESULT, _CONVERTED, _LOG)
            log = None if verbose else output / _LOG / "evaluate.txt"
            code = runner.guarded(lambda out: _work(chosen, found, output, out, after), log, after, output=output)
    except (InUseError, ModelOptConfigError) as error:
        sys.stderr.write(f"error: {error}\n")
        return runner.FAILED if isinstance(error, InUseError) else runner.USAGE
    if code == runner.OK:
        _show(output / RESULT)
    return code


def _work(chosen: Options, found: dict[str, Path], output: Path, out: TextIO, after: _Interrupted) -> None:
    from nemo_modelopt_cli.compress.stages import StageError

    names, wanted = labels([*found]), tasks.names(chosen.tasks)
    same = {one.name: getattr(chosen, one.name) for one in fields(Harness) if one.name != "python"}
    result: dict[str, Any] = {"tasks": wanted, **same, "packages": {}, "models": []}
    for number, (name, folder) in enumerate(found.items(), 1):
        out.write(f"[{number}/{len(found)}] {name}\n")
        with _readable(folder, output / _CONVERTED, chosen) as readable:
            try:
                answer = scoring.score(readable, wanted, chosen, names[name], chosen.cpu, chosen.devices)
            except scoring.ScoringError as error:
                raise StageError(str(error)) from None
        result["packages"] |= answer["packages"]
        result["models"].append({"model": names[name], "path": str(folder), **scoring.summary(answer)})
        files.write_json(output / RESULT, result, default=str)
        after.scored = number


@contextlib.contextmanager
def _readable(folder: Path, target: Path, chosen: Options) -> Iterator[Path]:
    """Yield a Hugging Face folder: the model's own, or one made from a NeMo checkpoint for the time of the context.

    Raises:
        StageError: if the checkpoint cannot be written as such files, or not as the backend reads them.
    """
    from nemo_modelopt_cli.compress.stages import StageError

    if not is_nemo(folder):
        yield folder
        return
    shutil.rmtree(target, ignore_errors=True)
    words = ["ptq", "-nc", str(folder), "-algo", "no_quant", "--export_format", "hf", "--no_report"]
    words += ["-out", str(target)]
    words += ["--hf-layout", readers.COMPRESSED_TENSORS] if chosen.backend == "hf" else []
    command = [sys.executable, "-m", "nemo_modelopt_cli", *words, *(["--cpu"] if chosen.cpu else [])]
    try:
        end = functools.partial(processes.end_with, os.getpid())
        done = subprocess.run(command, stdin=subprocess.DEVNULL, preexec_fn=end, check=False)
        if done.returncode:
            log = target.parent / _LOG
            raise StageError(f"{folder} was not written as Hugging Face files; see {log}, or show the reason with -v")
        if problems := folders.problems(target, chosen.backend):
            raise StageError("; ".join(problems))
        yield target
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _show(path: Path) -> None:
    """Print the scores as a table."""
    import json

    from rich.console import Console

    from nemo_modelopt_dropin.report import scores

    screen = Console(file=sys.stdout)
    screen.print(scores.table(json.loads(path.read_text(encoding="utf-8"))))
    screen.print(f"Scores: {path}", highlight=False, soft_wrap=True)

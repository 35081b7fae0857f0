r"""Compress a NeMo GPT checkpoint: prune, distill, quantize, export and report, in one resumable command.

    python scripts/compress.py --teacher CHECKPOINT --train-text train.jsonl --heldout-text heldout.jsonl \
        --target-ffn-hidden-size 4096 --target-num-layers 24 --distill-steps 2000 --output runs/mine

The texts are JSON, JSON-lines, Parquet or text files (also .gz, .bz2, .xz and .zst) of texts or chats. Under torchrun
every rank runs this command; without it, --devices N starts N local ranks. Run the same command again after an
interruption to resume; finished stages are kept. If the settings of a stage changed, the command prints which and
stops; --redo STAGE runs it and those after it again. The settings are saved as run.yaml in the run's folder; --config
takes such a file, flags win over it. --compare A B puts two finished runs side by side. Exit codes: 0 done, 1 failed, 2
wrong arguments or settings, 130 interrupted (Ctrl-C), 143 ended by SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_modelopt_cli import options, run_file
from nemo_modelopt_cli.compress.settings import (
    TARGETS,
    Job,
    SettingsError,
    Training,
    follows_from_targets,
    from_dict,
    raise_all,
)
from nemo_modelopt_cli.parser import Parser, default_devices, default_nodes
from nemo_modelopt_dropin import files
from nemo_modelopt_dropin.errors import ModelOptConfigError
from nemo_modelopt_dropin.preflight.output_checks import config_paths, formats_in, place_problems

if TYPE_CHECKING:
    from nemo_modelopt_cli.compress.stages import Stage

TARGET_FLAGS = (*TARGETS, "target_params", "drop_layers")


def parser(prog: str | None = None) -> Parser:
    """Return the command line; a flag that is not set is None, because the config file may set it."""
    found = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    job = found.add_argument_group("job")
    job.add_argument("--config", type=Path, help="YAML file with the settings; flags win over it")
    job.add_argument("--output", type=Path, help="folder of the run (default: runs/compress)")
    job.add_argument(
        "--redo",
        nargs="+",
        metavar="STAGE",
        default=[],
        help="job steps to run again if their settings changed, and with them the steps that build on them (default: "
        "no step); each old result is kept until the new one is complete",
    )
    job.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="folders of two finished runs; writes compare.html into --output (default: B)",
    )
    job.add_argument("--dry-run", action="store_true", help="check the settings, print what would run, and stop")
    job.add_argument("-v", "--verbose", action="store_true", help="show what the libraries write")
    options.add(found, Job, separator="-", title="job", unset=True)
    return found


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the nested settings of the config file and the flags; flags win.

    Raises:
        SettingsError: if the config file cannot be read as settings.
    """
    found: dict[str, Any] = {}
    if arguments.config:
        try:
            found = run_file.read(arguments.config)
        except run_file.RunFileError as error:
            raise SettingsError(f"--config {arguments.config} {error}") from None
    if arguments.output is not None:
        found["output"] = arguments.output
    for name, value in options.given(Job, arguments).items():
        if isinstance(value, dict) and name in found:
            if isinstance(found[name], dict):  # anything else in the file is reported as a problem later
                found[name] |= value
        else:
            found[name] = value
    return found


def fill_in(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Set what nobody gave and follows from the rest: ranks, warm-up. Return what, so that it is not saved.

    Ranks are those that torchrun started, else what one copy of the model needs; the warm-up is at most a tenth.
    """
    layout, training = (found.setdefault(name, {}) for name in ("layout", "distillation"))
    if not isinstance(layout, dict) or not isinstance(training, dict):
        return []  # refused later

    def number(section: dict[str, Any], name: str, otherwise: int) -> int:
        value = str(section.get(name) or otherwise)
        return int(value) if value.isdecimal() else otherwise  # what is no number is refused later

    done = []
    nodes = number(layout, "num_nodes", default_nodes(1))
    steps, usual = number(training, "steps", Training.steps), Training.warmup_steps
    devices = default_devices(nodes, number(layout, "tp", 1), number(layout, "pp", 1))
    for name, section, key, value in (
        ("layout", layout, "num_nodes", nodes),
        ("layout", layout, "devices", devices),
        ("distillation", training, "warmup_steps", min(usual, steps // 10)),
    ):
        if section.get(key) is None:
            section[key] = value
            done.append((name, key))
    return done


def resolve(argv: list[str] | None = None, prog: str | None = None) -> tuple[Job | None, Path, argparse.Namespace]:
    """Return the checked job, its folder and the arguments; no job where two runs are to be compared.

    Exits with status 2 after listing everything that is wrong.
    """
    line = parser(prog)
    arguments = line.read(argv)
    if arguments.compare:
        problems = [
            f"--compare {one}: no report.json there, so no run that finished"
            for one in arguments.compare
            if not has_report(one)
        ]
        folder = (arguments.output or arguments.compare[1]).resolve()
        in_the_way = None if problems else files.taken(folder, ["compare.html"])
        line.refuse([*problems, f"--output: {in_the_way}"] if in_the_way else problems)
        return None, folder, arguments
    output, job = Path("runs/compress"), None
    try:
        found = settings(arguments)
        arguments.derived = fill_in(found)
        output = Path(found.pop("output", None) or output).resolve()
        line.problems += output_problems(output, found, arguments.config)
        job = make_job(found, line.told)
    except SettingsError as error:
        line.refuse(str(error).splitlines())
    line.refuse(redo_problems(job, output, arguments.redo))
    return job, output, arguments


def redo_problems(job: Job | None, output: Path, redo: Collection[str]) -> list[str]:
    """Return which names in --redo are not those of stages; the content of the inputs is not read."""
    from nemo_modelopt_cli.compress import plan, stages

    planned = plan.compression_stages(job, output, before="") if job is not None and redo else []
    return stages.unknown([stage.name for stage in planned], redo) if planned else []


def output_problems(output: Path, found: dict[str, Any], config: Path | None = None) -> list[str]:
    """Return what would be lost or overwritten by what this command writes."""
    names = {"teacher": "--teacher", "train_text": "--train-text", "heldout_text": "--heldout-text"}
    given = {flag: found.get(name) for name, flag in {**names, "distill_config": "--distill-config"}.items()}
    inputs = {flag: path if isinstance(path, str) else None for flag, path in given.items()}
    problems = place_problems("--output", str(output), {**inputs, **config_paths(config, str(output))})
    if not problems and formats_in(output):
        problems.append(f"--output {output} is a checkpoint; use a new folder, or that of a run to resume")
    found_there = None if problems else files.problem(output, files.COMPRESSION_RUN)
    return [*problems, f"--output: {found_there}"] if found_there else problems


def has_report(folder: Path) -> bool:
    """Return whether a folder is that of a finished run."""
    return (folder / "report.json").is_file()


def make_job(found: dict[str, Any], told: Collection[str] = ()) -> Job:
    """Return the job of nested settings.

    Args:
        found: the settings.
        told: flags of which a problem is known already, by name: what follows from that is not told.

    Raises:
        SettingsError: listing every setting that is unknown, missing, of another type or cannot work.
    """
    required = ("teacher", "train_text", "heldout_text")
    problems: list[str] = []
    job = None
    missing = [f"--{name.replace('_', '-')}" for name in required if not found.get(name) and name not in told]
    if missing:
        problems.append(f"missing: {', '.join(missing)} (as flags or in --config)")
    for name in (*required, "distill_config"):
        if isinstance(found.get(name), str):
            found[name] = str(Path(found[name]).resolve())
    try:
        job = from_dict(Job, {**dict.fromkeys(required, ""), **found})
        problems += [one for one in job.problems() if not (follows_from_targets(one) and {*TARGET_FLAGS} & {*told})]
    except SettingsError as error:
        problems += str(error).splitlines()
    raise_all(problems)
    assert job is not None  # else there are problems
    return job


def report_unused_redo(planned: Sequence[Stage], output: Path, redo: Collection[str]) -> None:
    """Print in one line which stages of --redo are kept because nothing changed."""
    from nemo_modelopt_cli.compress import stages

    kept = stages.without_effect(planned, output, redo)
    if kept:
        folders = ", ".join(str(output / name) for name in kept)
        sys.stderr.write(
            f"compress.py: --redo {' '.join(kept)} has no effect, its settings and inputs did not change; to run a "
            f"stage again anyway, remove its folder: {folders}\n"
        )


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the job, or print the plan, or compare two runs; return the exit code."""
    job, output, arguments = resolve(argv, prog)
    if job is None:
        from nemo_modelopt_dropin.report import compare as report_compare

        first, second = arguments.compare
        return report_compare.show(first, second, output)
    from nemo_modelopt_cli.compress import api, plan
    from nemo_modelopt_cli.process import launch

    if arguments.dry_run:
        from nemo_modelopt_cli import dry_run
        from nemo_modelopt_cli.compress import runner, stages

        planned = plan.compression_stages(job, output)
        waiting = dict.fromkeys(stages.pending(planned, output), "would run")
        for change in stages.changed(planned, output):
            waiting[change.name] = f"would run again: {'; '.join(change.settings)}"
            waiting |= dict.fromkeys(change.also, f"would run again after {change.name}")
        dry_run.show(dry_run.compression(job, output, [s.name for s in planned], waiting))
        try:
            runner.check_place(planned, output)
            stages.check_redo(planned, output, arguments.redo)
            report_unused_redo(planned, output, arguments.redo)
        except (stages.StageError, ModelOptConfigError) as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        return 0

    if arguments.redo and os.environ.get("RANK", "0") == "0" and launch.STARTED_BY_US not in os.environ:
        report_unused_redo(plan.compression_stages(job, output), output, arguments.redo)
    return api.execute(job, output, arguments.verbose, arguments.derived, arguments.redo)

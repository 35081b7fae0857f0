r"""Compress a NeMo GPT checkpoint: prune, distill, quantize, export and report, in one resumable command.

    nemo-modelopt compress --teacher CHECKPOINT --train-text train.jsonl --heldout-text heldout.jsonl \
        --target-ffn-hidden-size 4096 --target-num-layers 24 --distill-steps 2000 --output runs/mine

The texts are JSON, JSON-lines, Parquet or text files (also .gz, .bz2, .xz and .zst) of texts or chats. With
torchrun, start this command on every rank; without it, --devices N starts N local ranks. To resume after an
interruption, run the same command again: finished job steps are kept. If the settings of a step changed, the command
prints them and stops; --redo STAGE runs the step again, and the steps that build on it. The settings are saved to
run.yaml in the run's folder; pass it to --config to repeat the run, flags win over it. --compare A B compares two
finished runs. Exit codes: 0 done, 1 failed, 2 wrong arguments or settings, 130 interrupted (Ctrl-C), 143 ended by
SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from nemo_modelopt_cli import options, run_file
from nemo_modelopt_cli.compress import api, fit_plan, plan, stages
from nemo_modelopt_cli.compress.digests import Digests
from nemo_modelopt_cli.compress.settings import (
    TARGETS,
    Job,
    SettingsError,
    Training,
    follows_from_targets,
    from_dict,
    raise_all,
)
from nemo_modelopt_cli.compress.stages import Stage
from nemo_modelopt_cli.evaluation import tasks
from nemo_modelopt_cli.parser import Parser, default_devices, default_nodes
from nemo_modelopt_dropin import files, ranks
from nemo_modelopt_dropin.errors import ModelOptConfigError
from nemo_modelopt_dropin.fit import limits
from nemo_modelopt_dropin.preflight.output_checks import config_paths, formats_in, place_problems

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
    """Set the settings that follow from others if they are not set: the ranks, the warm-up and the formats.

    The ranks are those that torchrun started, else as many as one copy of the model needs; the warm-up is at most a
    tenth of the steps; a budget is that of Hugging Face files.

    Returns:
        Section and name of each setting that was filled in; ``run.yaml`` omits them.
    """
    layout, training = (found.setdefault(name, {}) for name in ("layout", "distillation"))
    if not isinstance(layout, dict) or not isinstance(training, dict):
        return []  # reported later

    def number(section: dict[str, Any], name: str, otherwise: int) -> int:
        value = str(section.get(name) or otherwise)
        return int(value) if value.isdecimal() else otherwise  # a value that is not a number is reported later

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
    fit, quantization = found.get("fit"), found.setdefault("quantization", {})
    has_budget = isinstance(fit, dict) and any(fit.get(kind) is not None for kind in limits.KINDS)
    if has_budget and isinstance(quantization, dict) and not quantization.get("formats"):
        quantization["formats"] = ["hf"]
        done.append(("quantization", "formats"))
    return done


def resolve(
    argv: list[str] | None = None, prog: str | None = None, make_parser: Callable[[str | None], Parser] = parser
) -> tuple[Job | None, Path, argparse.Namespace]:
    """Return the checked job, its folder and the arguments; the job is None if two runs are to be compared.

    Exits with status 2 after listing everything that is wrong.

    Args:
        argv: the command line; None for that of this process.
        prog: the words that start the command.
        make_parser: returns the parser.
    """
    line = make_parser(prog)
    arguments = line.read(argv)
    if arguments.compare:
        return None, checked_comparison(line, arguments.compare, arguments.output, "--compare "), arguments
    output, job = Path("runs/compress"), None
    try:
        found = settings(arguments)
        arguments.derived = fill_in(found)
        output = Path(found.pop("output", None) or output).resolve()
        line.problems += output_problems(output, found, arguments.config)
        job = make_job(found, line.told)
        fit_plan.check_point(output, job)
    except SettingsError as error:
        line.refuse(str(error).splitlines())
    line.refuse(stages.unknown(plan.step_names(job), arguments.redo) if job is not None else [])
    return job, output, arguments


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


def checked_comparison(line: Parser, runs: Sequence[Path], output: Path | None, flag: str = "") -> Path:
    """Return the folder for the page that compares two runs; exit with status 2 if they cannot be compared.

    Args:
        line: The command line, which prints the problems.
        runs: Folders of the two runs.
        output: The requested folder; None for the second run's.
        flag: What precedes the name of a run in a message.
    """
    problems = [f"{flag}{one}: not a finished run, there is no report.json" for one in runs if not has_report(one)]
    folder = (output or runs[1]).resolve()
    in_the_way = None if problems else files.taken(folder, ["compare.html"])
    line.refuse([*problems, f"--output: {in_the_way}"] if in_the_way else problems)
    return folder


def make_job(found: dict[str, Any], reported: Collection[str] = ()) -> Job:
    """Return the job of nested settings.

    Args:
        found: the settings.
        reported: arguments already reported as invalid; problems that only follow from them are left out.

    Raises:
        SettingsError: listing every setting that is unknown, missing, of another type or cannot work.
    """
    required = ("teacher", "train_text", "heldout_text")
    problems: list[str] = []
    if isinstance(chosen := found.get("evaluation"), dict) and isinstance(chosen.get("tasks"), (str, list, tuple)):
        given = [chosen["tasks"]] if isinstance(chosen["tasks"], str) else map(str, chosen["tasks"])
        found["evaluation"] = {**chosen, "tasks": tasks.absolute(given)}
    missing = [f"--{name.replace('_', '-')}" for name in required if not found.get(name) and name not in reported]
    if missing:
        problems.append(f"missing: {', '.join(missing)} (as flags or in --config)")
    for name in options.paths(Job):
        if isinstance(found.get(name), str):
            found[name] = str(Path(found[name]).resolve())
    try:
        job = from_dict(Job, {**dict.fromkeys(required, ""), **found})
    except SettingsError as error:
        raise SettingsError("\n".join([*problems, str(error)])) from None
    problems += [one for one in job.problems() if not (follows_from_targets(one) and {*TARGET_FLAGS} & {*reported})]
    raise_all(problems)
    return job


def report_unused_redo(planned: Sequence[Stage], output: Path, redo: Collection[str]) -> None:
    """Print in one line which job steps of --redo are kept because nothing changed."""
    kept = stages.without_effect(planned, output, redo)
    if kept:
        folders = ", ".join(str(output / name) for name in kept)
        sys.stderr.write(
            f"compress.py: --redo {' '.join(kept)} has no effect, its settings and inputs did not change; to run a "
            f"step again anyway, remove its folder: {folders}\n"
        )


def show_plan(job: Job, output: Path, planned: Sequence[Stage], redo: Collection[str]) -> int:
    """Print what a run would do, and return the exit code that it would start with."""
    from nemo_modelopt_cli import dry_run
    from nemo_modelopt_cli.compress import runner

    waiting = dict.fromkeys(stages.pending(planned, output), "would run")
    for change in stages.changed(planned, output):
        waiting[change.name] = f"would run again: {'; '.join(change.settings)}"
        waiting |= dict.fromkeys(change.also, f"would run again after {change.name}")
    try:
        found = fit_plan.read(output) if job.fit.is_set and fit_plan.STAGE not in waiting else None
        used = fit_plan.applied(job, found) if found else job
        dry_run.show(dry_run.compression(used, output, [stage.name for stage in planned], waiting))
        if found:
            fit_plan.show(found, job)
        runner.check_place(planned, output)
        stages.check_redo(planned, output, redo)
        stages.check_ready(planned, output)
        report_unused_redo(planned, output, redo)
    except (stages.StageError, ModelOptConfigError) as error:
        sys.stderr.write(f"error: {error}\n")
        return runner.USAGE
    return runner.OK


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the job, or print the plan, or compare two runs; return the exit code."""
    job, output, arguments = resolve(argv, prog)
    if job is None:
        from nemo_modelopt_dropin.report import compare

        first, second = arguments.compare
        return compare.show(first, second, output)
    digests = Digests.of_this_process()
    planned = plan.compression_stages(job, output, digests=digests)
    if arguments.dry_run:
        return show_plan(job, output, planned, arguments.redo)
    if arguments.redo and ranks.leads():
        report_unused_redo(planned, output, arguments.redo)
    return api.execute(job, output, planned, digests, arguments.verbose, arguments.derived, arguments.redo)

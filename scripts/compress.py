r"""Compress a NeMo GPT checkpoint: prune, distill, quantize, export and report, in one resumable command.

    python scripts/compress.py --teacher CHECKPOINT --train-text train.jsonl --heldout-text heldout.jsonl \
        --target-ffn-hidden-size 4096 --target-num-layers 24 --distill-steps 2000 --output runs/mine

The texts are JSON lines with a "text" column. Under torchrun every rank runs this command; without it, --devices N
starts N local ranks. Run the same command again after an interruption and it goes on where it was; finished stages
whose settings did not change are kept. Exit codes: 0 done, 1 failed, 2 wrong arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from nemo_modelopt_dropin.command_line import Parser
from nemo_modelopt_dropin.compress.settings import (
    ALGORITHMS,
    EXPORT_FORMATS,
    Job,
    Layout,
    Pruning,
    Quantization,
    SettingsError,
    Training,
    from_dict,
)

_Flags = dict[str, type]
_LAYOUT: _Flags = {"devices": int, "num-nodes": int, "tp": int, "pp": int}
_PRUNING: _Flags = {
    "target-ffn-hidden-size": int,
    "target-hidden-size": int,
    "target-num-attention-heads": int,
    "target-num-query-groups": int,
    "target-num-layers": int,
}
_DISTILLATION: _Flags = {
    "steps": int,
    "global-batch-size": int,
    "micro-batch-size": int,
    "lr": float,
    "min-lr": float,
    "warmup-steps": int,
    "weight-decay": float,
    "seed": int,
    "evaluate-every": int,
    "save-every": int,
}
_CALIBRATION: _Flags = {"size": int, "batch-size": int, "seq-len": int}


def parser() -> Parser:
    """Return the command line; every flag is a setting of the same name, and None where it is not given."""
    found = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    job = found.add_argument_group("job")
    job.add_argument("--config", type=Path, help="YAML file with the settings; flags win over it")
    job.add_argument("--output", type=Path, help="folder of the run (default: runs/compress)")
    job.add_argument("--teacher", help="NeMo 2 checkpoint folder")
    job.add_argument("--train-text", help="JSON lines to distill and calibrate on")
    job.add_argument("--heldout-text", help="JSON lines to measure on")
    job.add_argument("--seq-length", type=int, help="tokens a sample (default: 128)")
    job.add_argument("--scratch", action="store_true", default=None, help="train a baseline student from scratch too")
    job.add_argument("--dry-run", action="store_true", help="check the settings, say what would run, and stop")
    job.add_argument("-v", "--verbose", action="store_true", help="show what the libraries write")
    layout = found.add_argument_group("layout")
    for name, kind in _LAYOUT.items():
        layout.add_argument(f"--{name}", type=kind)
    layout.add_argument("--cpu", action="store_true", default=None, help="run on CPU ranks over gloo")
    pruning = found.add_argument_group("prune")
    for name, kind in _PRUNING.items():
        pruning.add_argument(f"--{name}", type=kind)
    pruning.add_argument("--drop-layers", type=int, nargs="+", help="layers to drop, counted from 1")
    pruning.add_argument("--prune-samples", type=int, help="sequences to measure importance on (default: 256)")
    pruning.add_argument("--prune-batch-size", type=int, help="sequences a pass (default: 4)")
    distillation = found.add_argument_group("distill")
    distillation.add_argument("--distill-config", help="YAML of the distillation losses (NeMo's format)")
    for name, kind in _DISTILLATION.items():
        distillation.add_argument(f"--distill-{name}", type=kind)
    quantization = found.add_argument_group("quantize and export")
    quantization.add_argument("--algorithm", help=f"one of {', '.join(ALGORITHMS)} (default: fp8)")
    quantization.add_argument("--formats", nargs="+", help=f"of {', '.join(EXPORT_FORMATS)} (default: nemo)")
    for name, kind in _CALIBRATION.items():
        quantization.add_argument(f"--calibration-{name}", type=kind)
    return found


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the nested settings that the config file and the flags give together; flags win.

    Raises:
        SettingsError: where the config file cannot be read as settings.
    """
    found: dict[str, Any] = {}
    if arguments.config:
        import yaml

        try:
            found = yaml.safe_load(arguments.config.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise SettingsError(f"--config {arguments.config} cannot be read: {error}") from None
        if not isinstance(found, dict):
            raise SettingsError(f"--config {arguments.config} must hold settings by name")

    def put(section: str | None, key: str, value: Any) -> None:
        if value is not None:
            target = found.setdefault(section, {}) if section else found
            target[key] = value

    given = vars(arguments)
    for key in ("teacher", "train_text", "heldout_text", "seq_length", "scratch", "distill_config", "output"):
        put(None, key, given[key])
    for name in (*_LAYOUT, "cpu"):
        put("layout", name.replace("-", "_"), given[name.replace("-", "_")])
    for name in (*_PRUNING, "drop-layers"):
        put("pruning", name.replace("-", "_"), given[name.replace("-", "_")])
    put("pruning", "num_samples", arguments.prune_samples)
    put("pruning", "micro_batch_size", arguments.prune_batch_size)
    for name in _DISTILLATION:
        key = name.replace("-", "_")
        put("distillation", key, given[f"distill_{key}"])
    for key in ("algorithm", "formats"):
        put("quantization", key, given[key])
    for name in _CALIBRATION:
        key = "calibration_" + name.replace("-", "_")
        put("quantization", key, given[key])
    return found


def resolve(argv: list[str] | None = None) -> tuple[Job, Path, argparse.Namespace]:
    """Return the checked job, its folder and the arguments.

    Raises:
        SettingsError: listing everything that is wrong.
    """
    arguments = parser().parse_args(argv)
    found = settings(arguments)
    output = Path(found.pop("output", "runs/compress")).resolve()
    for section, cls in (
        ("layout", Layout),
        ("pruning", Pruning),
        ("distillation", Training),
        ("quantization", Quantization),
    ):
        if section in found and not isinstance(found[section], dict):
            raise SettingsError(f"{section} must hold settings by name, got {found[section]!r}")
        found[section] = from_dict(cls, found.get(section, {}), section)
    missing = [f"--{name.replace('_', '-')}" for name in ("teacher", "train_text", "heldout_text") if name not in found]
    if missing:
        raise SettingsError(f"missing: {', '.join(missing)} (as flags or in --config)")
    for name in ("teacher", "train_text", "heldout_text", "distill_config"):
        if found.get(name):
            found[name] = str(Path(found[name]).resolve())
    job = from_dict(Job, found)
    job.check()
    return job, output, arguments


def main(argv: list[str] | None = None) -> int:
    """Run the job and return the exit code."""
    try:
        job, output, arguments = resolve(argv)
    except SettingsError as error:
        for line in str(error).splitlines():
            print(f"compress: {line}", file=sys.stderr)
        return 2
    from nemo_modelopt_dropin.compress import plan, runner, stages, summary

    if arguments.dry_run:
        planned = plan.compression_stages(job, output)
        waiting = stages.pending(planned, output)
        for stage in planned:
            print(f"{stage.name:<9} {'would run' if stage.name in waiting else 'finished'}")
        return 0

    def finish(records):
        return summary.finish(records, output, f"Compression of {Path(job.teacher).name}", job)

    return runner.execute(
        lambda out: plan.compression_stages(job, output, out=out), output, job.layout, finish, arguments.verbose
    )


if __name__ == "__main__":
    sys.exit(main())

"""Quantize a NeMo 2 checkpoint after training (PTQ) and export it. Has the flags of NeMo's scripts/llm/ptq.py.

For more than one GPU, start the command with torchrun; with --cpu it starts its ranks itself. The settings are saved as
run.yaml in the output folder; --config reads such a file, and flags win over it. Until the export has succeeded, the
calibrated state is kept next to the output, so that running the same command again does not repeat the calibration.
Exit codes: 0 done, 1 failed, 2 wrong arguments or settings, 130 interrupted, 143 ended by SIGTERM.
"""

from __future__ import annotations

import argparse
import glob
import os
from pathlib import Path

from nemo_modelopt_cli import options
from nemo_modelopt_cli.flags import ptq as flags
from nemo_modelopt_cli.flags.ptq import ALGORITHMS, FORMATS
from nemo_modelopt_cli.flags.ptq import algorithm as algorithm
from nemo_modelopt_cli.parser import (
    Parser,
    default_devices,
    default_nodes,
    derive,
    derive_stages,
    layout_problems,
    no_checkpoints,
    not_positive,
    template_problems,
    tokenizer_problems,
)
from nemo_modelopt_dropin import files
from nemo_modelopt_dropin.errors import did_you_mean
from nemo_modelopt_dropin.preflight import algorithms, data_files, output_checks, quant_file, shard_sizes
from nemo_modelopt_dropin.preflight.model_checks import block_problems, file_problems, split_problems
from nemo_modelopt_dropin.preflight.model_sizes import STAGES, known

PATHS = options.paths(flags.Options)
HUB = ("cnn_dailymail", "wikitext")
_FOLDERS = {"trtllm": "./qnemo_{algorithm}_tp{inference_tp}_pp{inference_pp}", "hf": "./hf_{algorithm}"}


def parser(prog: str | None = None) -> Parser:
    """Return the command line."""
    return Parser.of_command(prog, __doc__, flags.Options)


def resolve(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """Return the checked arguments with the defaults that depend on others."""
    line = parser(prog)
    arguments = line.read(argv)
    derive(arguments, "num_nodes", default_nodes(1 if arguments.cpu else arguments.calibration_pp))
    needed = default_devices(arguments.num_nodes, arguments.calibration_tp, arguments.calibration_pp)
    derive(arguments, "devices", needed)
    if arguments.export_path is None:
        name = _FOLDERS.get(arguments.export_format, "./nemo_{algorithm}")
        arguments.export_path = name.format(**vars(arguments))
    derive_stages(arguments, arguments.nemo_checkpoint, arguments.calibration_pp)
    for option, ending in (("calibration_state", "calibration-state"), ("report_path", "report")):
        derive(arguments, option, f"{arguments.export_path.rstrip('/')}.{ending}")
    problems = no_checkpoints({"--nemo_checkpoint": arguments.nemo_checkpoint})
    problems += output_problems(arguments)
    if arguments.algorithm != "no_quant":
        limit = max(1, arguments.calibration_dataset_size)
        problems += data_problems(arguments.calibration_dataset, arguments.calibration_column, limit)
        if arguments.calibration_dataset not in HUB:
            texts = {"--calibration_dataset": arguments.calibration_dataset}
            tokenizer = arguments.tokenizer or arguments.nemo_checkpoint
            problems += template_problems(texts, tokenizer, arguments.calibration_column)
    problems += tokenizer_problems(arguments)
    problems += layout_problems(
        arguments.devices, arguments.num_nodes, arguments.calibration_tp, arguments.calibration_pp
    )
    sizes = ("batch_size", "calibration_dataset_size", "awq_block_size", "inference_tp", "inference_pp")
    problems += not_positive(arguments, sizes)
    problems += number_problems(arguments)
    problems += shard_sizes.problem("--max-shard-size", arguments.max_shard_size)
    if arguments.export_format == "hf":
        problems += algorithms.layout_problems("--hf-layout", arguments.algorithm, arguments.hf_layout)
    if arguments.algorithm not in ALGORITHMS and os.path.isfile(arguments.algorithm):
        problems += [f"--algorithm {one}" for one in quant_file.problems(arguments.algorithm)]
    if (arguments.algorithm == "auto") is (arguments.auto_quantize_bits is None):
        problems.append("--algorithm auto and --auto_quantize_bits go together: set both or neither")
    if arguments.cpu and algorithms.needs_cuda(arguments.algorithm):
        problems.append(
            f"--algorithm {arguments.algorithm} needs CUDA kernels, which the CPU backend does not simulate: "
            "leave --cpu out on a machine with a GPU"
        )
    used = arguments.auto_quantize_formats.split(",")
    for name in (arguments.algorithm, *(used if arguments.algorithm == "auto" else ())):
        problems += [f"--algorithm {one}" for one in (algorithms.version_problem(name),) if one]
    for name in used:
        if name not in algorithms.TABLE and not name.endswith("_CFG") and not os.path.isfile(name):
            known_names = f"one of {', '.join(algorithms.TABLE)}, or a preset of modelopt (..._CFG)"
            problems.append(
                f"--auto_quantize_formats: {name!r} is not {known_names}{did_you_mean(name, algorithms.TABLE)}"
            )
    problems += split_problems(arguments.nemo_checkpoint, arguments.calibration_tp, arguments.calibration_pp)
    unwritten = file_problems(arguments.nemo_checkpoint, arguments.algorithm, arguments.export_format)
    problems += [f"--export_format: {one}" for one in unwritten]
    block = algorithms.block_size(arguments.algorithm, arguments.awq_block_size)
    shape = known(arguments.nemo_checkpoint)
    flag = "--awq_block_size" if algorithms.has_block_setting(arguments.algorithm) else None
    problems += block_problems(shape, arguments.calibration_tp, block, arguments.export_format == "hf", flag)
    line.refuse(problems)
    return arguments


def number_problems(arguments: argparse.Namespace) -> list[str]:
    """Return a sentence for each number outside of its range."""
    ranges = {
        "sq_alpha": (0, 1),
        "auto_quantize_bits": (1, 16),
        "calibration_shuffle_seed": (0, float("inf")),
        "seq_len": (2, float("inf")),
    }
    found = []
    for name, (least, most) in ranges.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            allowed = f"at least {least}" if most == float("inf") else f"from {least} to {most}"
            found.append(f"--{name} must be {allowed}, got {value:g}")
    return found


def output_problems(arguments: argparse.Namespace) -> list[str]:
    """Return what would be lost or overwritten by what this command writes."""
    state = None if arguments.no_calibration_state else arguments.calibration_state
    report = None if arguments.no_report else arguments.report_path
    outputs = {"--export_path": arguments.export_path, "--calibration_state": state, "--report_path": report}
    inputs = {
        "--nemo_checkpoint": arguments.nemo_checkpoint,
        "--tokenizer": arguments.tokenizer,
        "--algorithm": None if arguments.algorithm in ALGORITHMS else arguments.algorithm,
        **output_checks.input_paths("--calibration_dataset", arguments.calibration_dataset),
        **output_checks.config_paths(arguments.config, arguments.export_path),
    }
    found = output_checks.problems("--export_path", arguments.export_path, inputs, arguments.export_format)
    for flag in ("--calibration_state", "--report_path"):
        found += output_checks.place_problems(flag, outputs[flag], inputs)
    others = {"--export_path": arguments.export_path, "--report_path": report}
    found += output_checks.state_problems("--calibration_state", state, files.CALIBRATION_STATE, others)
    search = arguments.auto_quantize_checkpoint
    found += output_checks.nesting_problems(
        "--auto_quantize_checkpoint", search, {**others, "--calibration_state": state}
    )
    return found + output_checks.report_problems("--report_path", report, {"--export_path": arguments.export_path})


def data_problems(name: str, column: str | None = None, limit: int = 1) -> list[str]:
    """Return what is wrong with a data set that must be on the hub, or here and readable.

    Args:
        name: the data set.
        column: of the texts, None for the usual one.
        limit: how many rows of files to look at.
    """
    if name in HUB:
        return []
    if os.path.exists(name) or glob.glob(name, recursive=True):
        problem = data_files.problem(name, column, limit=limit)
        hint = " (--calibration_column)" if problem and "no column" in problem else ""
        return [f"--calibration_dataset: {problem}{hint}"] if problem else []
    known = f"neither one of {', '.join(HUB)} nor a file, folder or pattern that is there"
    return [f"--calibration_dataset {name}: {known}{did_you_mean(name, HUB)}"]


def work(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Quantize and export; return the rows of the result."""
    from nemo.collections import llm
    from nemo.collections.llm.modelopt import ExportConfig, QuantizationConfig

    quantization = QuantizationConfig(
        algorithm=None if arguments.algorithm == "no_quant" else arguments.algorithm,
        awq_block_size=arguments.awq_block_size,
        sq_alpha=arguments.sq_alpha,
        enable_kv_cache=arguments.enable_kv_cache,
        kv_cache_qformat=arguments.kv_cache_qformat,
        calibration_dataset=arguments.calibration_dataset,
        calibration_dataset_size=arguments.calibration_dataset_size,
        calibration_batch_size=arguments.batch_size,
        calibration_seq_len=arguments.seq_len,
        calibration_column=arguments.calibration_column,
        calibration_shuffle_seed=arguments.calibration_shuffle_seed,
        auto_quantize_bits=arguments.auto_quantize_bits,
        auto_quantize_formats=arguments.auto_quantize_formats.split(","),
        auto_quantize_checkpoint=arguments.auto_quantize_checkpoint,
        sensitivity_scan=arguments.sensitivity_scan,
        calibration_state=None if arguments.no_calibration_state else arguments.calibration_state,
    )
    export = ExportConfig(
        path=arguments.export_path,
        export_format=arguments.export_format,
        decoder_type=arguments.decoder_type,
        dtype=arguments.dtype,
        inference_tp=arguments.inference_tp,
        inference_pp=arguments.inference_pp,
        generate_sample=arguments.generate_sample,
        verify=arguments.verify,
        hf_layout=arguments.hf_layout,
        max_shard_size=arguments.max_shard_size,
        report_path=None if arguments.no_report else arguments.report_path,
    )
    same_name = ("calibration_tp", "calibration_pp", "devices", "num_nodes", "legacy_ckpt", "trust_remote_code")
    llm.ptq(
        model_path=arguments.nemo_checkpoint,
        export_config=export,
        quantization_config=quantization,
        tokenizer_path=arguments.tokenizer,
        **{name: getattr(arguments, name) for name in same_name + STAGES},
    )
    return outcome(arguments)


def outcome(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Return algorithm, format and size of what was written."""
    from nemo.collections.llm.modelopt.quantization import comparison
    from nemo_modelopt_dropin.report.page import megabytes

    sizes = [comparison.bytes_on_disk(Path(path)) for path in (arguments.nemo_checkpoint, arguments.export_path)]
    before, after = ("unknown" if size is None else megabytes(size) for size in sizes)
    return [
        ("algorithm", arguments.algorithm),
        ("format", f"{arguments.export_format} ({FORMATS[arguments.export_format]})"),
        ("on disk", f"{after}; the original {before}"),
    ]


def _others(arguments: argparse.Namespace) -> tuple[Path, ...]:
    """Return the other outputs of the command."""
    state = [] if arguments.no_calibration_state else [Path(arguments.calibration_state)]
    return (*state, *([] if arguments.no_report else [Path(arguments.report_path)]))


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Quantize and export, or print the plan; return the exit code."""
    arguments = resolve(argv, prog)
    if arguments.dry_run:
        from nemo_modelopt_cli import dry_run

        return dry_run.show(dry_run.quantization(arguments))
    from nemo_modelopt_cli.run_script import Script, execute

    state = None if arguments.no_calibration_state else Path(arguments.calibration_state)
    script = Script("ptq", Path(arguments.export_path), PATHS, others=_others(arguments), state=state)
    return execute(script, arguments, work)

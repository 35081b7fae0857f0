"""Prune a NeMo 2 GPT checkpoint. Has the flags of NeMo's scripts/llm/gpt_prune.py.

Width and depth are pruned by importance, which is measured on data: --data_paths (Megatron's tokenized files) or --text
(a file of texts or conversations). --drop_layers needs no data. A target is a size or a fraction of the original size
(0.5); with --target_params, sizes are chosen from candidates by held-out loss. Importance is measured on whole layers:
the ranks of --tp work as pipeline stages meanwhile, and the result loads at any layout. For more than one GPU, start
the command with torchrun; with --cpu it starts its ranks itself. The settings are saved as run.yaml in the output
folder; --config reads such a file, and flags win over it.
Exit codes: 0 done, 1 failed, 2 wrong arguments or settings, 130 interrupted, 143 ended by SIGTERM.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from nemo_modelopt_cli import options
from nemo_modelopt_cli.checks import data_paths
from nemo_modelopt_cli.flags import prune as flags
from nemo_modelopt_cli.flags.prune import BUDGETS, TARGETS
from nemo_modelopt_cli.parser import (
    Parser,
    absolute_paths,
    default_devices,
    default_nodes,
    derive,
    derive_stages,
    layout_problems,
    loading_options,
    no_checkpoints,
    not_positive,
    template_problems,
    text_problems,
    tokenizer_problems,
)
from nemo_modelopt_dropin import files, versions
from nemo_modelopt_dropin.preflight import budget, model_sizes, output_checks, pair_checks, prune_layout
from nemo_modelopt_dropin.preflight.model_checks import (
    budget_problems,
    drop_problems,
    family_problems,
    split_problems,
    target_problems,
)

PATHS = options.paths(flags.Options)


def parser(prog: str | None = None) -> Parser:
    """Return the command line."""
    return Parser.of_command(prog, __doc__, flags.Options)


def resolve(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """Return the checked arguments."""
    line = parser(prog)
    arguments = line.read(argv)
    derive(arguments, "num_nodes", default_nodes(1))
    derive(arguments, "devices", default_devices(arguments.num_nodes, arguments.tp_size, arguments.pp_size))
    derive_stages(arguments, arguments.restore_path, arguments.pp_size)
    derive(arguments, "report_path", f"{(arguments.save_path or '').rstrip('/')}.report")
    given = [name for name in (*TARGETS, *BUDGETS) if getattr(arguments, name) is not None]
    unsupported = versions.pruning_problem(by_importance=not arguments.drop_layers)
    problems = [unsupported] if unsupported else []
    problems += no_checkpoints({"--restore_path": arguments.restore_path})
    problems += output_problems(arguments)
    texts = {"--text": arguments.text, "--heldout_text": arguments.heldout_text}
    problems += text_problems(texts) + template_problems(texts, arguments.restore_path)
    problems += tokenizer_problems(arguments) + data_paths.problems(arguments)
    problems += pair_checks.same_text(("--text", arguments.text), ("--heldout_text", arguments.heldout_text))
    problems += layout_problems(arguments.devices, arguments.num_nodes, arguments.tp_size, arguments.pp_size)
    problems += not_positive(arguments, ("max_candidates", "heldout_batches"))
    for name in BUDGETS:
        problems += budget.problem(f"--{name}", getattr(arguments, name))
    if not problems and arguments.tp_size > 1 and not arguments.drop_layers:
        problems += prune_layout.problems(arguments.restore_path, arguments.devices * arguments.num_nodes)
    sizes = {name: getattr(arguments, name) for name in given if name in TARGETS}
    problems += [
        f"--{name} must be a size of at least 1, or a share between 0 and 1, got {size}"
        for name, size in sizes.items()
        if not (size >= 1 if isinstance(size, int) else 0 < size < 1)
    ]
    problems += model_problems(arguments, sizes)
    if arguments.drop_layers and given:
        problems.append(f"--drop_layers cannot be combined with --{', --'.join(given)}")
    if not arguments.drop_layers:
        problems += _importance_problems(arguments, given)
    line.refuse(problems)
    return arguments


def output_problems(arguments: argparse.Namespace) -> list[str]:
    """Return what would be lost or overwritten by what this command writes."""
    report = None if arguments.no_report else arguments.report_path
    inputs = {
        "--restore_path": arguments.restore_path,
        **output_checks.input_paths("--text", arguments.text),
        **output_checks.input_paths("--heldout_text", arguments.heldout_text),
        **output_checks.input_paths("--data_paths", arguments.data_paths),
        **output_checks.config_paths(arguments.config, arguments.save_path),
    }
    found = output_checks.problems("--save_path", arguments.save_path, inputs, "nemo")
    for flag, path in (("--scores_path", arguments.scores_path), ("--report_path", report)):
        found += output_checks.place_problems(flag, path, inputs)
    outputs = {"--save_path": arguments.save_path, "--report_path": report}
    found += output_checks.state_problems("--scores_path", arguments.scores_path, files.PRUNING_SCORES, outputs)
    return found + output_checks.report_problems("--report_path", report, {"--save_path": arguments.save_path})


def model_problems(arguments: argparse.Namespace, sizes: dict[str, int | float]) -> list[str]:
    """Return which parts of the request do not fit the model."""
    shape = model_sizes.known(arguments.restore_path)
    found = split_problems(arguments.restore_path, arguments.tp_size if arguments.drop_layers else 1, arguments.pp_size)
    found += target_problems(shape, sizes, arguments.target_params is not None)
    found += family_problems(arguments.restore_path, sizes, arguments.target_params is not None)
    found += drop_problems(model_sizes.layers(arguments.restore_path), arguments.drop_layers)
    if not found:
        found += budget_problems(shape, arguments.target_params, sizes)
    return [f"--{one}" for one in found]


def _importance_problems(arguments: argparse.Namespace, given: list[str]) -> list[str]:
    found = []
    if not given:
        found.append("nothing to prune: set --drop_layers, --target_params or at least one other --target_...")
    if "target_num_query_groups" in given and "target_num_attention_heads" not in given:
        found.append("--target_num_query_groups needs --target_num_attention_heads")
    if not arguments.seq_length:
        found.append("--seq_length is required when pruning by importance")
    if arguments.mbs < 1 or arguments.num_train_samples % max(1, arguments.mbs):
        found.append(f"--num_train_samples {arguments.num_train_samples} must be a multiple of --mbs {arguments.mbs}")
    if arguments.text and arguments.data_paths:
        found.append("--text and --data_paths cannot be combined")
    return found


def make_data(arguments: argparse.Namespace):
    """Return the data module: Megatron's files, a text, or mock data if neither is set."""
    from nemo.collections import llm
    from nemo_modelopt_cli.tokens import TextDataModule, checkpoint_tokenizer
    from nemo_modelopt_dropin.console import screen

    sizes = {
        "seq_length": arguments.seq_length,
        "micro_batch_size": arguments.mbs,
        "global_batch_size": arguments.mbs,
    }
    if arguments.data_paths:
        return llm.PreTrainingDataModule(
            paths=arguments.data_paths,
            split=arguments.split,
            index_mapping_dir=arguments.index_mapping_dir,
            tokenizer=checkpoint_tokenizer(arguments.restore_path),
            **loading_options(arguments.cpu),
            **sizes,
        )
    if arguments.text:
        if arguments.target_params is not None and not arguments.heldout_text:
            screen.warn("No --heldout_text: candidates are compared on --text, on which importance is measured.")
        return TextDataModule(
            arguments.text,
            arguments.restore_path,
            arguments.heldout_text,
            train_samples=arguments.num_train_samples,
            **sizes,
        )
    screen.warn("Neither --data_paths nor --text: importance is measured on random tokens, so pruning is random.")
    tokenizer = checkpoint_tokenizer(arguments.restore_path)
    return llm.MockDataModule(tokenizer=tokenizer, **loading_options(arguments.cpu), **sizes)


def work(arguments: argparse.Namespace) -> None:
    """Prune and save."""
    from nemo.collections import llm
    from nemo.collections.llm.modelopt import PruningConfig
    from nemo.collections.llm.modelopt.prune import check_checkpoint
    from nemo_modelopt_cli.run_script import standing_in

    same_name = ("devices", "num_nodes", "num_train_samples", "save_path", "legacy_ckpt")
    vars(arguments).update(absolute_paths(arguments, PATHS))
    layout = prune_layout.used(
        arguments.restore_path,
        arguments.devices * arguments.num_nodes,
        {name: getattr(arguments, name) for name in prune_layout.NAMES},
        by_importance=not arguments.drop_layers,
    )
    prune_layout.announce(arguments.tp_size, layout)
    config = PruningConfig(
        **{name: getattr(arguments, name) for name in (*TARGETS, *BUDGETS)},
        drop_layers=arguments.drop_layers,
        scores_path=arguments.scores_path,
        max_candidates=arguments.max_candidates,
        heldout_batches=arguments.heldout_batches,
        report_path=None if arguments.no_report else arguments.report_path,
    )
    check_checkpoint(config, arguments.restore_path, layout["tp_size"])
    # NeMo's validation, by which importance is measured, leaves a folder of logs in the working directory.
    with tempfile.TemporaryDirectory() as elsewhere, standing_in(elsewhere):
        llm.prune(
            nemo_checkpoint=arguments.restore_path,
            pruning_config=config,
            data=None if arguments.drop_layers else make_data(arguments),
            tokenizer_path=arguments.tokenizer,
            **layout,
            **{name: getattr(arguments, name) for name in same_name},
        )


def _others(arguments: argparse.Namespace) -> tuple[Path, ...]:
    """Return the other outputs of the command."""
    scores = [Path(arguments.scores_path)] if arguments.scores_path else []
    return (*scores, *([] if arguments.no_report else [Path(arguments.report_path)]))


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Prune and save, or print the plan; return the exit code."""
    arguments = resolve(argv, prog)
    if arguments.dry_run:
        from nemo_modelopt_cli import dry_run

        return dry_run.show(dry_run.pruning(arguments, TARGETS))
    from nemo_modelopt_cli.run_script import Script, execute

    return execute(Script("prune", Path(arguments.save_path), PATHS, others=_others(arguments)), arguments, work)

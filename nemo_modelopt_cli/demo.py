"""Train a small GPT on Python's help texts, then prune, distill, quantize and export it, and write a report.

The recipe: vocabulary 1024; sequences of 128 tokens, 16 per step; fp32 on two data-parallel CPU ranks with one thread
each (on two cores faster than one process with two threads, and less sensitive to other load). The teacher has 2.8 M
parameters and trains 240 steps at a peak learning rate of 3e-3, about three and a half passes over the text; the
student keeps 46% of its body and distills 120 steps at 2e-3. Run the command again after an interruption to resume.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nemo_modelopt_cli.compress.settings import (
    Job,
    Layout,
    Pruning,
    Quantization,
    SettingsError,
    Training,
)
from nemo_modelopt_cli.parser import Parser
from nemo_modelopt_dropin import files, ranks
from nemo_modelopt_dropin.errors import ModelOptConfigError

SEQ_LENGTH = 128
VOCABULARY = 1024
TEACHER = {
    "num_layers": 6,
    "hidden_size": 192,
    "ffn_hidden_size": 512,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 32,
}
# Half of the parameters outside of embedding and output layer: 2.25 M to 1.1 M.
PRUNING = Pruning(
    target_ffn_hidden_size=320,
    target_hidden_size=160,
    target_num_attention_heads=4,
    target_num_query_groups=2,
    target_num_layers=5,
    num_samples=128,
    micro_batch_size=8,
)
PRETRAINING = Training(
    steps=240,
    global_batch_size=16,
    micro_batch_size=8,
    lr=3e-3,
    min_lr=1e-4,
    warmup_steps=24,
    evaluate_every=60,
    save_every=60,
)
# The pruned student starts near a good place: a lower peak rate than from random weights, and no more than half the
# teacher's steps. The from-scratch baseline uses the same settings.
DISTILLATION = Training(
    steps=120,
    global_batch_size=16,
    micro_batch_size=8,
    lr=2e-3,
    min_lr=1e-4,
    warmup_steps=12,
    evaluate_every=30,
    save_every=30,
)


def parser(prog: str | None = None) -> Parser:
    """Return the command line."""
    found = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder of the run (default: %(default)s)"
    )
    found.add_argument("--devices", type=int, default=2, help="CPU ranks (default: %(default)s)")
    found.add_argument(
        "--algorithm",
        default="fp8",
        help="quantization: fp8, int8, int4, int4_awq, ... (default: %(default)s)",
    )
    found.add_argument("--steps-scale", type=float, default=1.0, help="multiply all training steps (for trials)")
    found.add_argument("--fresh", action="store_true", help="remove the folder first")
    found.add_argument("-v", "--verbose", action="store_true", help="show what the libraries write")
    return found


def parse(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """Return the arguments; nothing heavy is imported."""
    return parser(prog).parse_args(argv)


def scaled(training: Training, factor: float) -> Training:
    """Return the training run with ``factor`` times the steps, warm-up and intervals."""
    import dataclasses

    numbers = {
        name: max(1, round(getattr(training, name) * factor)) for name in ("steps", "evaluate_every", "save_every")
    }
    return dataclasses.replace(
        training, **numbers, warmup_steps=min(round(training.warmup_steps * factor), numbers["steps"] - 1)
    )


def make_job(arguments: argparse.Namespace) -> Job:
    """Return the compression job over the files that the demo's own stages write."""
    root = arguments.output
    return Job(
        teacher=str(root / "pretrain" / "checkpoint"),
        train_text=str(root / "corpus" / "train.jsonl"),
        heldout_text=str(root / "corpus" / "heldout.jsonl"),
        seq_length=SEQ_LENGTH,
        layout=Layout(devices=arguments.devices, cpu=True),
        pruning=PRUNING,
        distillation=scaled(DISTILLATION, arguments.steps_scale),
        quantization=Quantization(
            algorithm=arguments.algorithm, calibration_size=64, calibration_batch_size=8, formats=("nemo", "hf")
        ),
        scratch=True,
    )


def make_stages(job: Job, pretraining: Training, root: Path):
    """Return the demo's stages: its own two, then the compression job's."""
    from nemo_modelopt_cli.compress import corpus
    from nemo_modelopt_cli.compress.plan import compression_stages, outcome
    from nemo_modelopt_cli.compress.stages import Stage

    def pretrain(folder, records, out):
        return corpus.pretrain(
            folder,
            root / "corpus",
            {**TEACHER, "vocab_size": VOCABULARY},
            pretraining,
            job.layout,
            job.seq_length,
            out,
        )

    python = ".".join(map(str, sys.version_info[:3]))  # another Python has other help texts
    own = [
        Stage(
            "corpus",
            lambda folder, records, out: corpus.make(folder, VOCABULARY),
            {"size": VOCABULARY, "python": python},
        ),
        Stage(
            "pretrain",
            pretrain,
            {"model": TEACHER, "seq_length": SEQ_LENGTH, **outcome(pretraining), "cpu": job.layout.cpu},
            ("corpus",),
            True,
        ),
    ]
    return own + compression_stages(job, root, before="pretrain")


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the demo; return 0 when its numbers make sense, else 1."""
    arguments = parse(argv, prog)
    arguments.output = arguments.output.resolve()
    job = make_job(arguments)
    pretraining = scaled(PRETRAINING, arguments.steps_scale)
    try:
        job.check(teacher_exists=False)
    except SettingsError as error:
        sys.stderr.write(f"demo: {error}\n")
        return 2
    from nemo_modelopt_cli.compress import runner, summary

    if arguments.fresh and not ranks.is_rank():
        try:
            files.remove(arguments.output, files.COMPRESSION_RUN)
        except ModelOptConfigError as error:
            sys.stderr.write(f"demo: --fresh: {error}\n")
            return 2

    def finish(records):
        return summary.finish(records, arguments.output, "Demo: half of a GPT", job, strict=True)

    stages = make_stages(job, pretraining, arguments.output)
    return runner.execute(
        stages,
        arguments.output,
        job.layout,
        finish,
        arguments.verbose,
        # A demo's results are no loss: other settings may replace them.
        redo=[stage.name for stage in stages],
    )

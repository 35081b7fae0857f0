"""Train a NeMo 2 GPT checkpoint, from the logits of a teacher if there is one.

Has the flags of NeMo's scripts/llm/gpt_train.py. Checkpoints are written below --log_dir, one every few minutes
(--save_minutes), and the same command resumes from the last one. For more than one GPU, start the command with
torchrun; with --cpu it starts its ranks itself. The settings are saved as run.yaml in the output folder; --config reads
such a file, and flags win over it.
Exit codes: 0 done, 1 failed, 2 wrong arguments or settings, 130 interrupted, 143 ended by SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from nemo_modelopt_cli import options
from nemo_modelopt_cli.checks import distill_checks, resume_checks
from nemo_modelopt_cli.flags import distill as flags
from nemo_modelopt_cli.parser import Parser, default_devices, default_nodes, derive, loading_options
from nemo_modelopt_dropin.preflight import model_sizes, pair_checks

PATHS = options.paths(flags.Options)


def parser(prog: str | None = None) -> Parser:
    """Return the command line."""
    return Parser.of_command(prog, __doc__, flags.Options)


def resolve(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """Return the checked arguments."""
    line = parser(prog)
    given = line.read(argv)
    derive(given, "num_nodes", default_nodes(1))
    needed = default_devices(given.num_nodes, given.tp_size, given.cp_size, given.pp_size, given.ep_size)
    derive(given, "devices", needed)
    given.precision = given.precision or ("32" if given.cpu else "bf16-mixed")
    line.refuse(distill_checks.problems(given))
    return given


def make_data(given: argparse.Namespace):
    """Return the data module that the flags describe."""
    from nemo.collections import llm
    from nemo_modelopt_cli.tokens import TextDataModule, checkpoint_tokenizer

    sizes = {"seq_length": given.seq_length, "micro_batch_size": given.mbs, "global_batch_size": given.gbs}
    if given.text:
        texts = (given.text, given.model_path, given.heldout_text)
        settings = {
            "train_samples": given.max_steps * given.gbs,
            "tokenizer": make_tokenizer(given),
            "answer_only_loss": given.answer_only_loss,
            **sizes,
        }
        if given.packed_sequence_size:
            from nemo_modelopt_cli.packed import PackedTextDataModule

            return PackedTextDataModule(*texts, packed_sequence_size=given.packed_sequence_size, **settings)
        if distill_checks.aligns_texts(given):
            from nemo_modelopt_cli.aligned import AlignedTextDataModule

            return AlignedTextDataModule(*texts, teacher_checkpoint=given.teacher_path, **settings)
        return TextDataModule(*texts, **settings)
    if given.use_chat_data:
        from nemo.collections.llm.gpt.data.chat import ChatDataModule

        return ChatDataModule(
            dataset_root=given.data_paths[0],
            tokenizer=make_tokenizer(given),
            use_hf_tokenizer_chat_template=True,
            dataset_kwargs={"index_mapping_dir": given.index_mapping_dir},
            pin_memory=not given.cpu,
            **loading_options(given.cpu),
            **sizes,
        )
    tokenizer = make_tokenizer(given) or checkpoint_tokenizer(given.model_path)
    if given.use_mock_data:
        return llm.MockDataModule(tokenizer=tokenizer, **loading_options(given.cpu), **sizes)
    return llm.PreTrainingDataModule(
        paths=given.data_paths,
        split=given.split,
        index_mapping_dir=given.index_mapping_dir,
        tokenizer=tokenizer,
        **loading_options(given.cpu),
        **sizes,
    )


def make_tokenizer(given: argparse.Namespace):
    """Return the tokenizer of --tokenizer, with the chat template of --chat-template-path, or None."""
    if not given.tokenizer:
        return None
    from nemo_modelopt_dropin import moved

    template = Path(given.chat_template_path).read_text(encoding="utf-8").strip() if given.chat_template_path else None
    return moved.find("get_tokenizer")(given.tokenizer, **({"chat_template": template} if template else {}))


def make_trainer(given: argparse.Namespace):
    """Return the trainer for the layout and precision."""
    import torch
    from lightning.pytorch.loggers import TensorBoardLogger
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.distributed import DistributedDataParallelConfig

    from nemo import lightning as nl
    from nemo_modelopt_cli import intermediate, per_token
    from nemo_modelopt_dropin.console import progress

    overlap = not given.cpu
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=given.tp_size,
        pipeline_model_parallel_size=given.pp_size,
        context_parallel_size=given.cp_size,
        **model_sizes.unequal_stages(given.model_path, given.pp_size),
        expert_model_parallel_size=given.ep_size,
        sequence_parallel=given.tp_size > 1,
        pipeline_dtype=torch.bfloat16 if "bf16" in given.precision else torch.float32,
        ckpt_load_strictness=StrictHandling.LOG_ALL if given.legacy_ckpt else None,
        ckpt_async_save=not given.cpu,
        ddp=DistributedDataParallelConfig(
            # Without Transformer Engine or Apex, Megatron's distributed optimizer saves what it cannot load.
            use_distributed_optimizer=not given.cpu,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
            check_for_nan_in_grad=True,
            # A loss per token is divided by the tokens of all ranks instead.
            average_in_collective=not per_token.wanted(given),
        ),
    )
    # For fp32 too: a checkpoint brings the type that it was imported in, mostly bf16.
    precision = nl.MegatronMixedPrecision(
        precision=given.precision,
        params_dtype=torch.bfloat16 if "bf16" in given.precision else torch.float32,
        autocast_enabled=False,
        grad_reduce_in_fp32=True,
    )
    callbacks: list[Any] = [progress.FirstFigures()]
    if per_token.wanted(given):
        callbacks.append(per_token.PerTokenLoss())
    if given.save_minutes and not given.dump_teacher_topk:
        callbacks.append(intermediate.Interim(interim_folder(given), given.save_minutes))
    if not given.verbose:  # else NeMo's own lines of progress are on the screen
        callbacks.append(progress.TrainingBar("distill" if given.teacher_path or given.teacher_topk else "train"))
    return nl.Trainer(
        accelerator="cpu" if given.cpu else "gpu",
        strategy=strategy,
        devices=given.devices,
        num_nodes=given.num_nodes,
        max_steps=given.max_steps,
        # A text: NeMo writes the arguments of all this into checkpoints, and cannot write a path.
        logger=TensorBoardLogger(str(Path(given.log_dir) / given.name), name="tensorboard", version=""),
        log_every_n_steps=min(given.log_interval, given.max_steps),
        val_check_interval=min(given.val_check_interval, given.max_steps),
        limit_val_batches=validation_batches(given),
        # With NeMo's own display on rank zero, several CPU ranks hang when the first checkpoint is due.
        enable_progress_bar=not given.cpu,
        enable_model_summary=not given.cpu,
        callbacks=callbacks,
        plugins=precision,
    )


def validation_batches(given: argparse.Namespace) -> int:
    """Return --limit_val_batches rounded up to whole global batches: NeMo counts micro-batches, and skips the rest."""
    shares = given.devices * given.num_nodes // (given.tp_size * given.pp_size * given.cp_size)
    step = max(1, given.gbs // (given.mbs * max(1, shares)))
    return -(-given.limit_val_batches // step) * step


def make_optimizer(given: argparse.Namespace):
    """Return Megatron's distributed Adam with linear warm-up and cosine decay."""
    from megatron.core.optimizer import OptimizerConfig
    from nemo.lightning.pytorch.optim import CosineAnnealingScheduler

    from nemo import lightning as nl

    config = OptimizerConfig(
        optimizer="adam", lr=given.lr, bf16="bf16" in given.precision, use_distributed_optimizer=not given.cpu
    )
    schedule = CosineAnnealingScheduler(
        max_steps=given.max_steps,
        warmup_steps=min(given.warmup_steps, given.max_steps - 1),
        constant_steps=0,
        min_lr=given.min_lr,
    )
    return nl.MegatronOptimizerModule(config, schedule)


def work(given: argparse.Namespace) -> list[tuple[str, str]]:
    """Train or distill; return the rows of the result."""
    from nemo.lightning.pytorch.callbacks import ModelCheckpoint

    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo_modelopt_cli import intermediate

    checkpoints = ModelCheckpoint(
        monitor="val_loss",
        save_top_k=1,
        save_last=True,
        # By default NeMo leaves the optimizer out of the last checkpoint and cannot resume from it.
        save_optim_on_train_end=True,
        # None: after each validation, so that names and choice go by the loss of the weights that are saved.
        every_n_train_steps=None if given.limit_val_batches else min(given.val_check_interval, given.max_steps),
    )
    common: dict[str, Any] = {
        "data": make_data(given),
        "trainer": make_trainer(given),
        "optim": make_optimizer(given),
        "log": nl.NeMoLogger(
            name=given.name,
            log_dir=given.log_dir,
            ckpt=checkpoints,
            use_datetime_version=False,
            update_logger_directory=False,  # else all experiments below --log_dir share one curve
        ),
        "resume": intermediate.Resume(
            interim_folder(given),
            str(Path(given.log_dir) / given.name),
            resume_if_exists=True,
            resume_ignore_no_checkpoint=True,
            restore_config=nl.RestoreConfig(path=given.model_path),
        ),
    }
    teacher = given.teacher_topk or given.teacher_path
    remark(given)
    if given.teacher_topk:
        check_recorded_teacher(given)
    if teacher:
        llm.distill(
            student_model_path=given.model_path,
            teacher_model_path=teacher,
            distillation_config_path=given.distillation_config,
            tokenizer=make_tokenizer(given),
            **common,
        )
    else:
        llm.train(model=given.model_path, tokenizer="data", **common)
    rows = outcome(common["trainer"], checkpoints)
    intermediate.Steps(interim_folder(given)).remove_before(Path(given.log_dir) / given.name / "checkpoints")
    return rows


def interim_folder(given: argparse.Namespace) -> str:
    """Return the folder of the checkpoints that are kept until the end of the training."""
    return str(Path(given.log_dir) / given.name / "interim")


def remark(given: argparse.Namespace) -> None:
    """Warn about settings that are legal but rarely intended."""
    from nemo_modelopt_dropin.console import screen

    larger = pair_checks.larger_student(given.model_path, given.teacher_path)
    if larger:
        screen.warn(larger)
    if not (given.teacher_topk or given.teacher_path):
        screen.warn("No --teacher_path: this is plain training on the next token, without distillation.")
    if given.warmup_steps >= given.max_steps > 1:
        screen.warn(
            f"--warmup_steps {given.warmup_steps} does not fit into --max_steps {given.max_steps}: the learning rate "
            f"rises for {given.max_steps - 1} steps and reaches --lr only then."
        )


def outcome(trainer: Any, checkpoints: Any) -> list[tuple[str, str]]:
    """Return the metrics of the training, and its last checkpoint.

    Raises:
        RuntimeError: if the checkpoint cannot be loaded; NeMo only warns when it fails to write its context.
    """
    from nemo.lightning.ckpt_utils import ckpt_to_dir

    from nemo_modelopt_dropin.console import progress

    rows = progress.figures(trainer)
    if not checkpoints.last_model_path:
        return [*rows, ("checkpoint", "none was written")]
    last = ckpt_to_dir(checkpoints.last_model_path)
    context = last / "context" / "io.json"
    if trainer.is_global_zero and not (context.is_file() and context.stat().st_size):
        raise RuntimeError(f"{context} could not be written: NeMo cannot load {last}")
    return [*rows, ("checkpoint", str(last))]


def check_recorded_teacher(given: argparse.Namespace) -> None:
    """Raise an error if the recording cannot be read or is of another teacher."""
    from nemo.collections.llm.modelopt.distill.recorded.store import read_manifest
    from nemo.collections.llm.modelopt.distill.recorded.teacher import check_teacher

    read_manifest(given.teacher_topk)
    if given.teacher_path:
        check_teacher(given.teacher_topk, given.teacher_path)


def record(given: argparse.Namespace) -> None:
    """Record the top-k logits of the teacher on the training data."""
    from nemo.collections.llm.modelopt.distill import dump_teacher_topk

    dump_teacher_topk(
        given.teacher_path,
        given.dump_teacher_topk,
        make_data(given),
        make_trainer(given),
        given.max_steps,
        given.distillation_config,
        make_tokenizer(given),
        given.text or " ".join(given.data_paths or []) or "random tokens",
    )


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Train or distill, record the teacher, or print the plan; return the exit code."""
    given = resolve(argv, prog)
    if given.dry_run:
        from nemo_modelopt_cli import dry_run

        return dry_run.show(
            dry_run.distillation(given, resume_checks.rows(given, PATHS, distill_checks.finished(given)))
        )
    from nemo_modelopt_cli.run_script import Script, execute

    if given.dump_teacher_topk:
        return execute(Script("distill", Path(given.dump_teacher_topk), PATHS), given, record)
    done = distill_checks.finished(given)
    if done is not None:
        sys.stderr.write(
            f"distill: nothing to do, {given.name} has seen all samples of --max_steps {given.max_steps} x --gbs "
            f"{given.gbs}: {done}\nRaise --max_steps to continue, or choose another --name to start again.\n"
        )
        return 0
    resume_checks.report(given, PATHS)
    output = Path(given.log_dir) / given.name
    return execute(Script("distill", output, PATHS, keeps_progress=True), given, work)

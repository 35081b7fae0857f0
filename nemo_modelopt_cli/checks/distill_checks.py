"""Check the arguments of distill before anything heavy is imported."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from nemo_modelopt_cli.checks import data_paths, resume_checks
from nemo_modelopt_cli.parser import (
    layout_problems,
    missing_paths,
    no_checkpoints,
    not_positive,
    template_problems,
    text_problems,
    tokenizer_problems,
)
from nemo_modelopt_dropin import files
from nemo_modelopt_dropin.preflight import (
    checkpoint_files,
    data_files,
    loss_file,
    model_sizes,
    pair_checks,
    tokenizer_files,
)
from nemo_modelopt_dropin.preflight.model_checks import pair_problems, split_problems
from nemo_modelopt_dropin.preflight.output_checks import config_paths, input_paths, place_problems

# The file by which a recording of a teacher is known.
RECORDING = resume_checks.RECORDING
_NUMBERS = ("max_steps", "gbs", "mbs", "seq_length", "val_check_interval", "log_interval")


def problems(given: argparse.Namespace) -> list[str]:
    """Return everything that is wrong with the arguments."""
    models = {name: getattr(given, name) for name in ("model_path", "teacher_path")}
    found = no_checkpoints({f"--{name}": path for name, path in models.items()})
    named = pair_checks.name_problems("--name", given.name, given.log_dir)
    found += named
    if given.log_dir and given.name and not named:
        found += _output_problems(given) + resume_checks.problems(given)
    read = ("distillation_config", "chat_template_path")
    found += missing_paths({f"--{name}": getattr(given, name) for name in read}, folder=False)
    texts = {"--text": given.text, "--heldout_text": given.heldout_text}
    found += text_problems(texts) + _chat_problems(given, texts)
    found += pair_checks.same_text(("--text", given.text), ("--heldout_text", given.heldout_text))
    found += tokenizer_problems(given) + data_paths.problems(given)
    found += layout_problems(
        given.devices, given.num_nodes, given.tp_size, given.pp_size, given.cp_size * given.ep_size
    )
    if given.cp_size > 1 and given.cpu:
        found.append(f"--cp {given.cp_size}: context parallelism needs Transformer Engine, which runs on GPUs only")
    if sum(map(bool, (given.data_paths, given.text, given.use_mock_data))) != 1:
        found.append("use exactly one of --data_paths, --text and --use_mock_data")
    found += _teacher_problems(given) + _training_problems(given) + _tokenizer_problems(given)
    return found + _model_problems(given)


def _chat_problems(given: argparse.Namespace, texts: dict[str, str | None]) -> list[str]:
    """Return what is wrong with conversations, their template, and how they are packed and counted."""
    found = []
    if given.chat_template_path and not given.tokenizer:
        found.append("--chat-template-path replaces the template of --tokenizer; set both")
    elif not given.chat_template_path:
        found += template_problems(texts, given.tokenizer or given.model_path)
    if given.use_chat_data and (len(given.data_paths or []) != 1 or not given.tokenizer):
        found.append("--use-chat-data needs one path in --data_paths, and --tokenizer")
    no_template = not given.chat_template_path and checkpoint_files.has_chat_template(given.tokenizer) is False
    if given.use_chat_data and given.tokenizer and no_template:
        found.append(
            f"--use-chat-data: the tokenizer in {given.tokenizer} has no chat template; set --chat-template-path, or "
            "use the tokenizer of an instruction-tuned model"
        )
    return found + _packing_problems(given)


def _packing_problems(given: argparse.Namespace) -> list[str]:
    size, needs_text = given.packed_sequence_size, []
    if given.answer_only_loss:
        needs_text.append("--answer_only_loss")
    if size is not None:
        needs_text.append("--packed_sequence_size")
    found = []
    if needs_text and not given.text:
        way = "for the conversations of --use-chat-data, pass their files as --text and --heldout_text"
        found.append(f"{' and '.join(needs_text)} need --text; {way}")
    if size is None:
        return found
    if size < 1:
        found.append(f"--packed_sequence_size must be at least 1, got {size}")
    elif given.seq_length and given.seq_length > size:
        found.append(f"--packed_sequence_size {size} must be at least --seq_length {given.seq_length}")
    if (given.mbs or 1) > 1:
        found.append(
            f"--packed_sequence_size {size} needs --mbs 1, got {given.mbs}: a packed sequence is a micro-batch; "
            f"--packed_sequence_size {size * given.mbs} with --mbs 1 has as many tokens"
        )
    if given.cp_size > 1:
        found.append(f"--packed_sequence_size needs --cp 1, got {given.cp_size}: the parts are not split over ranks")
    return found


def _output_problems(given: argparse.Namespace) -> list[str]:
    """Return what would be lost or overwritten by what this command writes."""
    folder = Path(given.log_dir) / given.name
    names = ("model_path", "teacher_path", "teacher_topk", "distillation_config", "chat_template_path", "tokenizer")
    inputs: dict[str, str | None] = {f"--{name}": getattr(given, name) for name in names}
    for name in ("text", "heldout_text", "data_paths"):
        inputs |= input_paths(f"--{name}", getattr(given, name))
    if given.dump_teacher_topk:
        return place_problems("--dump-teacher-topk", given.dump_teacher_topk, inputs)
    inputs |= config_paths(given.config, str(folder))
    found = place_problems("--log_dir/--name", str(folder), inputs)
    # NeMo moves files of an earlier attempt, our marker too, into folders run_0, run_1, ...
    known = any(any(folder.glob(one)) for one in ("checkpoints/*-last", "interim/step-*", f"run_*/{files.MARKER}"))
    # Recording a teacher leaves a logger's folder under the name of the training.
    known = known or (folder.is_dir() and {entry.name for entry in folder.iterdir()} <= {"tensorboard"})
    problem = None if found or known else files.problem(folder, files.TRAINING_RUN)
    return [*found, f"--log_dir/--name: {problem}"] if problem else found


def _training_problems(given: argparse.Namespace) -> list[str]:
    found = [
        f"--{name} must not be negative, got {getattr(given, name)}"
        for name in ("lr", "min_lr", "limit_val_batches", "warmup_steps", "save_minutes")
        if getattr(given, name) < 0
    ]
    if given.min_lr > given.lr >= 0:
        found.append(f"--min_lr {given.min_lr:g} is above --lr {given.lr:g}, the highest learning rate")
    found += not_positive(given, _NUMBERS)
    shares = max(1, given.devices * given.num_nodes // max(1, given.tp_size * given.pp_size * given.cp_size))
    if min(given.gbs or 0, given.mbs or 0) > 0 and given.gbs % (given.mbs * shares):
        found.append(f"--gbs {given.gbs} must be a multiple of --mbs {given.mbs} x {shares} data parallel ranks")
    return found


def _teacher_problems(given: argparse.Namespace) -> list[str]:
    """Return what is wrong with the settings of the losses, and with a teacher that is recorded or was."""
    path, recorded, recording = given.distillation_config, given.dump_teacher_topk, given.teacher_topk
    found = [f"--distillation_config {one}" for one in loss_file.problems(path)]
    readable = path is not None and not found and Path(path).is_file()
    if recorded and (recording or not given.teacher_path):
        found.append("--dump-teacher-topk needs --teacher_path, the checkpoint to record, and no --teacher-topk")
    if recorded and Path(recorded).exists():
        found.append(f"--dump-teacher-topk: {recorded} exists; choose a new folder")
    found += missing_paths({"--teacher_topk": recording})
    if recording and Path(recording).is_dir() and not Path(recording, RECORDING).is_file():
        found.append(f"--teacher_topk {recording} is not a recording of --dump-teacher-topk: it has no {RECORDING}")
    if (recorded or recording) and readable and loss_file.read(path).get("intermediate_layer_pairs"):
        found.append(
            "--distillation_config: intermediate_layer_pairs need the teacher itself, and a recording holds logits "
            "alone; take them out of the file"
        )
    return found


def _tokenizer_problems(given: argparse.Namespace) -> list[str]:
    """Return how the student's tokenizer differs from the teacher's, as far as files show."""
    path = given.distillation_config
    if aligns_texts(given):
        return _aligned_problems(given)
    if loss_file.problems(path) or (
        path and Path(path).is_file() and loss_file.read(path).get(tokenizer_files.OVERRIDE)
    ):
        return []
    student = tokenizer_files.of_folder(given.tokenizer or given.model_path)
    found = tokenizer_files.difference(student, tokenizer_files.of_folder(given.teacher_path))
    if not found:
        return []
    own = given.tokenizer or given.model_path
    return [f"--teacher_path {given.teacher_path}: {tokenizer_files.message(found, own, given.teacher_path)}"]


def aligns_texts(given: argparse.Namespace) -> bool:
    """Return whether the settings compare models with different tokenizers; False if they cannot be read."""
    path = given.distillation_config
    if not path or not Path(path).is_file() or loss_file.problems(path):
        return False
    return loss_file.read(path).get("logit_kl_vocabulary") == loss_file.ALIGNED_TEXT


def _aligned_problems(given: argparse.Namespace) -> list[str]:
    """Return what a distillation from a teacher with another tokenizer cannot have."""
    found = []
    if not given.text:
        found.append("needs --text, because both models read the text")
    elif any(path and data_files.holds_chats(path) for path in (given.text, given.heldout_text)):
        found.append("reads texts, not conversations: their template belongs to one tokenizer")
    if not given.teacher_path or given.teacher_topk or given.dump_teacher_topk:
        found.append("needs --teacher_path, without a recording")
    if given.pp_size > 1 or given.cp_size > 1:
        found.append(f"needs --pp 1 and --cp 1, got {given.pp_size} and {given.cp_size}")
    if given.packed_sequence_size or given.answer_only_loss:
        found.append("takes neither --packed_sequence_size nor --answer_only_loss")
    return [f"--distillation_config: {tokenizer_files.ALIGNED} {one}" for one in found]


def _model_problems(given: argparse.Namespace) -> list[str]:
    found = []
    for path in filter(None, (given.model_path, given.teacher_path)):
        found += split_problems(path, given.tp_size, given.pp_size)
    shape = model_sizes.known(given.model_path)
    if given.ep_size > 1 and shape is not None and not shape.experts:
        found.append(f"--ep {given.ep_size} is for models with experts; {given.model_path} has none")
    layers = {"student": model_sizes.layers(given.model_path)}
    layers |= {"teacher": model_sizes.layers(given.teacher_path)} if given.teacher_path else {}
    return found + [f"--distillation_config {one}" for one in pair_problems(given.distillation_config, layers)]


def finished(given: argparse.Namespace) -> Path | None:
    """Return the last checkpoint of an experiment that has seen all samples that are asked for, else None.

    The names of NeMo's checkpoints contain that number.
    """
    for folder in sorted(Path(given.log_dir, given.name, "checkpoints").glob("*-last")):
        seen = re.search(r"consumed_samples=(\d+)", folder.name)
        if seen and int(seen[1]) >= given.max_steps * given.gbs:
            return folder
    return None

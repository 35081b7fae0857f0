"""Describe what a command would do, from its arguments and the checkpoint's configuration (``--dry-run``)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nemo_modelopt_cli import run_file
from nemo_modelopt_cli.compress import fit_settings
from nemo_modelopt_cli.compress.settings import TARGETS, Job
from nemo_modelopt_cli.run_script import Rows, aligned
from nemo_modelopt_dropin.fit import choice
from nemo_modelopt_dropin.fit import files as fit_files
from nemo_modelopt_dropin.preflight import algorithms, loss_file, model_sizes, pair_checks, prune_layout, readers
from nemo_modelopt_dropin.preflight.model_sizes import Memory, Shape, UnknownModel
from nemo_modelopt_dropin.report.page import megabytes, millions

_NEMO = "context/, weights/"


def show(rows: Rows) -> int:
    """Print the plan and return the exit code."""
    sys.stdout.writelines(f"{line}\n" for line in aligned(rows))
    return 0


def model(label: str, path: str | Path) -> tuple[Rows, Shape | None]:
    """Return the rows of a checkpoint, and its shape if the configuration contains it."""
    try:
        shape = model_sizes.read(path)
    except UnknownModel as reason:
        return [(label, str(path)), ("", f"sizes unknown: {reason}")], None
    return [(label, f"{path} ({shape.name})"), ("", size(shape))], shape


def size(shape: Shape) -> str:
    """Return shape and size in one line."""
    return f"{shape.describe()}: {millions(shape.parameters)}, {megabytes(2 * shape.parameters)} in 16 bits"


def layout(devices: int, num_nodes: int, cpu: bool, **sizes: int) -> tuple[str, str]:
    """Return the row of the ranks and how they share the model; what is left over is data parallel."""
    product = 1
    for one in sizes.values():
        product *= one
    shared = " x ".join(f"{name} {one}" for name, one in {**sizes, "dp": devices * num_nodes // product}.items())
    kind = "CPU over gloo" if cpu else "GPU"
    return "ranks", f"{devices} x {num_nodes} nodes ({kind}): {shared}"


def _device(cpu: bool) -> str:
    return "cpu" if cpu else "cuda"


def memory(found: Memory | None) -> tuple[str, str]:
    """Return the row of the memory of one rank."""
    if found is None:
        return "memory", "unknown"
    parts = ", ".join(f"{name} {megabytes(amount)}" for name, amount in found.parts.items() if amount)
    return "memory", f"about {megabytes(found.total)} a rank, libraries not counted: {parts}"


_REPORT = "report.html, report.json, figures/"


def quantization(given: argparse.Namespace) -> Rows:
    """Return the plan of ptq."""
    rows, shape = model("model", given.nemo_checkpoint)
    width = 4 if given.cpu else 2
    written, bits = "", _bits(given)
    if shape is not None:
        if given.export_format == "nemo":
            written = f", about {megabytes(width * shape.parameters)}"
        elif bits is not None:
            written = f", about {megabytes(model_sizes.quantized_bytes(shape, bits))}"
    tp, pp = given.calibration_tp, given.calibration_pp
    files = {"nemo": _NEMO, "hf": _hf_files(given.algorithm, given.hf_layout)}.get(
        given.export_format, "config, *.safetensors"
    )
    beside: Rows = []
    in_bits = "its preset's" if bits is None else f"{bits:g}"
    done = f"{given.algorithm}; matrices in {in_bits} bits, {given.export_format} format{written}"
    data: Rows = []
    if given.algorithm == "no_quant":
        done = f"not at all: {given.export_format} format{written}"
    else:
        asked = f"at most {given.calibration_dataset_size} rows of {given.calibration_dataset}"
        data.append(("data", f"{asked}, {given.seq_len} tokens each"))
        beside += [] if given.no_report else [("", f"{given.report_path}: {_REPORT}")]
        if given.export_format == "nemo":
            done += "; simulated with wide weights, only hf and trtllm files are small"
        if not given.no_calibration_state:
            beside.append(("", f"{given.calibration_state}: the calibrated state, until the export has succeeded"))
    return rows + [
        ("quantize", done),
        *(hf_layout(given.algorithm, given.hf_layout) if given.export_format == "hf" else []),
        *data,
        layout(given.devices, given.num_nodes, given.cpu, tp=tp, pp=pp),
        memory(model_sizes.forward_memory(shape, given.batch_size, given.seq_len, tp, pp, width) if shape else None),
        ("writes", f"{given.export_path}: {files}, {run_file.NAME}"),
        *beside,
    ]


def hf_layout(algorithm: str, layout: str) -> Rows:
    """Return the rows of the layout of Hugging Face files and of the programs that read it."""
    found = algorithms.hf_format_of(algorithm)
    if found is None:
        return []
    used = algorithms.layout_of(found, layout)
    read = ", ".join(f"{name} ({cell.text})" for name, cell in readers.cells(found, used).items() if cell.reads)
    rows: Rows = [("hf layout", f"{used}, read by {read or 'no known server'}")]
    warning = algorithms.reader_warning(algorithm, found, layout)
    return [*rows, ("", f"warning: {warning}")] if warning else rows


def _hf_files(algorithm: str, layout: str) -> str:
    """Return the names of the files of a Hugging Face checkpoint."""
    found = algorithms.hf_format_of(algorithm)
    has_own = found is not None and algorithms.layout_of(found, layout) == readers.MODELOPT
    extra = ", hf_quant_config.json" if has_own else ""
    return f"config.json, generation_config.json{extra}, *.safetensors, tokenizer, README.md"


def _bits(given: argparse.Namespace) -> float | None:
    """Return the bits of a weight on disk, None if only the preset or file determines them."""
    return given.auto_quantize_bits or algorithms.weight_bits(given.algorithm)


def pruning(given: argparse.Namespace, targets: Iterable[str]) -> Rows:
    """Return the plan of prune; ``targets`` are the names of its target flags."""
    rows, shape = model("model", given.restore_path)
    wanted = {name: getattr(given, name) for name in targets}
    asked = ", ".join(f"{name.removeprefix('target_')} {size}" for name, size in wanted.items() if size is not None)
    limits = {name: getattr(given, name, None) for name in ("target_params", "target_active_params")}
    limited = [f"{name.removeprefix('target_')} at most {limit}" for name, limit in limits.items() if limit is not None]
    if limited:
        tried = f"the best of up to {given.max_candidates} candidates by held-out loss"
        asked = ", ".join([*limited, *([asked] if asked else []), tried])
    rows.append(("prune", f"drop layers {', '.join(map(str, given.drop_layers))}" if given.drop_layers else asked))
    width = 4 if given.cpu else 2
    written = ""
    if shape is not None and not limited:
        small = shape.pruned(wanted, given.drop_layers)
        rows += [("after", size(small)), ("", f"{small.parameters / shape.parameters:.0%} of the parameters")]
        written = f", about {megabytes(width * small.parameters)}"
    if not given.drop_layers:
        source = given.text or " ".join(given.data_paths or []) or "random tokens"
        rows.append(("data", f"{given.num_train_samples} samples of {given.seq_length} tokens of {source}"))
        if limited and given.text:
            rows.append(("", f"candidates are compared on {given.heldout_text or 'the same: no --heldout_text'}"))
    tokens = given.seq_length or 1
    # Candidates are compared with the original model on pieces of at most 1024 positions.
    logits = 2 * min(1024, given.mbs * tokens) if limited else 0
    requested = {name: getattr(given, name) for name in prune_layout.NAMES}
    ranks = given.devices * given.num_nodes
    shared = prune_layout.used(given.restore_path, ranks, requested, by_importance=not given.drop_layers)
    tp, pp = shared["tp_size"], shared["pp_size"]
    rows.append(layout(given.devices, given.num_nodes, given.cpu, tp=tp, pp=pp))
    if tp != given.tp_size:
        rows.append(("", prune_layout.note(given.tp_size, shared)))
    rows += [
        memory(model_sizes.forward_memory(shape, given.mbs, tokens, tp, pp, width, logits) if shape else None),
        ("writes", f"{given.save_path}: {_NEMO}, {run_file.NAME}{written}"),
    ]
    if given.scores_path and not given.drop_layers:
        rows.append(("", f"{given.scores_path}: the measured importance"))
    return rows if given.no_report else [*rows, ("", f"{given.report_path}: {_REPORT}")]


def distillation(given: argparse.Namespace, resumes: Sequence[tuple[str, str]] = ()) -> Rows:
    """Return the plan of distill.

    Args:
        given: checked arguments.
        resumes: rows about the training that would be resumed.
    """
    rows, student = model("model", given.model_path)
    teacher = None
    if given.teacher_path and not given.teacher_topk:
        more, teacher = model("teacher", given.teacher_path)
        rows += more
        warning = pair_checks.larger_student(given.model_path, given.teacher_path)
        rows += [("", f"warning: {warning}")] if warning else []
    if given.teacher_topk:
        rows.append(("teacher", f"recorded in {given.teacher_topk}; none is loaded"))
    if not given.teacher_path and not given.teacher_topk:
        rows.append(("teacher", "none: plain training on the next token, no distillation"))
    source = given.text or " ".join(given.data_paths or []) or "random tokens"
    sizes = {"tp": given.tp_size, "pp": given.pp_size, "cp": given.cp_size, "ep": given.ep_size}
    dp = max(1, given.devices * given.num_nodes // (sizes["tp"] * sizes["pp"] * sizes["cp"]))
    width = 4 if given.precision.startswith("32") else 2
    length = given.packed_sequence_size or given.seq_length
    tokens = given.max_steps * given.gbs * length
    estimate = None
    if given.dump_teacher_topk:
        return rows + [
            ("record", f"the teacher on {given.max_steps} steps of {given.gbs} x {length} tokens"),
            ("data", source),
            layout(given.devices, given.num_nodes, given.cpu, **sizes),
            ("writes", f"{given.dump_teacher_topk}: about {4 + width} bytes for each recorded entry of a token"),
        ]
    if student is not None and (teacher is not None or not given.teacher_path or given.teacher_topk):
        tp, pp, seq = sizes["tp"], sizes["pp"], length // sizes["cp"]
        estimate = model_sizes.training_memory(student, teacher, given.mbs, seq, tp, pp, dp, width, _device(given.cpu))
    minimised = (
        [("losses", loss_file.describe(given.distillation_config))] if given.teacher_path or given.teacher_topk else []
    )
    return rows + [
        (
            "train",
            f"{given.max_steps} steps of {given.gbs} x {length} tokens, {millions(tokens)} in all, "
            f"warm-up in {min(given.warmup_steps, given.max_steps - 1)} of them"
            + (" (all but the last: lower --warmup_steps)" if given.warmup_steps >= given.max_steps > 1 else ""),
        ),
        *resumes,
        *minimised,
        ("data", source),
        *_packing(given),
        layout(given.devices, given.num_nodes, given.cpu, **sizes),
        memory(estimate),
        ("writes", f"{Path(given.log_dir) / given.name}: checkpoints/ (two, with optimizer), logs, {run_file.NAME}"),
        *([("", "interim/: a checkpoint every few minutes, until the end")] if given.save_minutes else []),
    ]


def _packing(given: argparse.Namespace) -> Rows:
    """Return how the texts of a distillation are packed and counted."""
    found = []
    if given.packed_sequence_size:
        found.append(("", f"whole rows of at most {given.seq_length} tokens, packed; each attends only to itself"))
    if given.answer_only_loss:
        found.append(("", "of conversations, only the assistant's replies count in the loss"))
    return found


def compression(job: Job, output: Path, stages: Iterable[str], waiting: Mapping[str, str]) -> Rows:
    """Return the plan of compress: its job steps first, then the rows of the other commands.

    Args:
        job: checked settings.
        output: the run's folder.
        stages: names of all stages, in order.
        waiting: what would happen to each stage that is not finished.
    """
    rows: Rows = [(name, waiting.get(name, "finished")) for name in stages]
    more, shape = model("model", job.teacher)
    rows += more
    targets = {name: getattr(job.pruning, name) for name in TARGETS}
    own, width = job.layout, 4 if job.layout.cpu else 2
    dp = own.devices * own.num_nodes // (own.tp * own.pp)
    estimate = None
    files = [_REPORT, "a checkpoint below each stage's folder", run_file.NAME]
    if shape is not None:
        # Before a search, what follows is at most.
        small = shape if job.fit.is_set else shape.pruned(targets, job.pruning.drop_layers)
        limit = job.pruning.target_params
        if job.fit.is_set:
            rows += _search(job, shape)
        elif limit is None:
            rows += [("pruned", size(small)), ("", f"{small.parameters / shape.parameters:.0%} of the parameters")]
        else:  # sizes are known only once candidates are measured: what follows is at most
            tried = f"the best of up to {job.pruning.max_candidates} candidates by held-out loss"
            rows.append(("pruned", f"params at most {limit}, {tried}"))
        if "hf" in job.quantization.formats:
            files.append(f"export/hf, {_exported_size(job, small)}")
        batch = job.distillation.micro_batch_size
        estimate = model_sizes.training_memory(
            small, shape, batch, job.seq_length, own.tp, own.pp, dp, width, _device(own.cpu)
        )

    return rows + [
        (
            "distill",
            f"{job.distillation.steps} steps of {job.distillation.global_batch_size} x {job.seq_length} tokens",
        ),
        ("losses", loss_file.describe(job.distill_config)),
        ("quantize", f"{_quantized(job)}, as {' and '.join(job.quantization.formats)}"),
        *(
            hf_layout(job.quantization.algorithm, job.quantization.hf_layout)
            if "hf" in job.quantization.formats and not job.fit.is_set
            else []
        ),
        *evaluation(job),
        layout(own.devices, own.num_nodes, own.cpu, tp=own.tp, pp=own.pp),
        memory(estimate),
        ("writes", f"{output}: {', '.join(files)}"),
    ]


def evaluation(job: Job) -> Rows:
    """Return the row of the scores on tasks of lm-eval; none without tasks."""
    own = job.evaluation
    if not own.names:
        return []
    rows = "all rows" if own.limit is None else f"at most {own.limit} rows of each task"
    return [("evaluate", f"{' and '.join(own.ordered)} on {', '.join(own.names)}, {rows}, loaded by {own.reader}")]


def _exported_size(job: Job, shape: Shape) -> str:
    """Return how large the Hugging Face files of a shape will be."""
    if job.fit.is_set:
        return f"at most {job.fit.disk}" if job.fit.disk else "of a size that the search chooses"
    tokenizer = fit_files.tokenizer_bytes(job.teacher)
    amount = fit_files.disk_bytes(shape, job.quantization.weights, tokenizer, job.quantization.hf_layout)
    return f"about {megabytes(amount)}"


def _quantized(job: Job) -> str:
    return "a format that the search chooses" if job.fit.is_set else job.quantization.weights.name


def _search(job: Job, shape: Shape) -> Rows:
    """Return what a search under budgets would do."""
    problem, fit = fit_settings.problem_of(job, shape), job.fit
    least, original, most = choice.smallest_figures(problem), problem.original, problem.resolved()
    rows = [
        (
            f"fit {kind}",
            f"at most {choice.shown(kind, value)}; the original in 16 bits has {choice.shown(kind, original[kind])}, "
            f"the smallest possible {choice.shown(kind, least[kind])}",
        )
        for kind, value in most.items()
    ]
    possible = problem.possible()
    names = "; ".join(one.name for one in possible if not one.fp8_cache)
    names += "; each also with a KV cache in fp8" if any(one.fp8_cache for one in possible) else ""
    measured = f"losses are measured for at most {fit.minutes:g} minutes, of {fit.candidates} combinations at the end"
    return [*rows, ("formats", names), ("", measured)]

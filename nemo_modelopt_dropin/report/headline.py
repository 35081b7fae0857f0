"""Answer how small, how good and how fast a compressed model is, and state sizes in one type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nemo_modelopt_dropin.report import scores

# Checkpoints of one run differ in type (fp32 on CPU ranks, bf16 on GPUs, mixed after quantization), so models are
# compared at the same number of bytes per parameter.
_BF16_BYTES = 2
# Students whose weights are not quantized, the most finished one first.
_STUDENTS = ("distilled", "pruned")
# Models that have the same shape, so the differences of their speeds are those of the measurement.
_SAME_SHAPE = (*_STUDENTS, "from scratch")
# Speeds that differ by a higher factor than this are reported as a range.
_STEADY = 1.25
# Exported formats whose files hold quantized weights; a NeMo checkpoint only simulates the format.
_FORMATS = {"hf": "Hugging Face", "trtllm": "TensorRT-LLM"}

SIZES = (
    '"in bf16" counts 2 bytes per parameter for every model, so that sizes can be compared. "on disk" is the measured '
    'size of the files, whatever their types; Hugging Face files include the tokenizer. "body" excludes embedding and '
    "output layer."
)


def in_bf16(model: Mapping[str, Any]) -> int:
    """Return the bytes that the parameters of a model take in bf16."""
    return _BF16_BYTES * model["parameters"]


def millions(count: float) -> str:
    """Return a number of parameters as readers expect it, in millions or billions."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def megabytes(count: float) -> str:
    """Return a number of bytes as readers expect it, in kilobytes, megabytes or gigabytes."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def answers(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the headline of a report: question, short answer and the sentences behind it; [] without a student.

    Everything comes from the numbers of the run, and what was not measured is reported as such.

    Args:
        content: the numbers of a run.
    """
    models = {model["name"]: model for model in content["models"]}
    student = next((models[name] for name in _STUDENTS if name in models), None)
    if student is None or "teacher" not in models:
        return []
    teacher, quantized = models["teacher"], models.get("quantized")
    exports = content.get("exports") or {}
    return [
        _how_small(teacher, student, quantized, exports),
        _how_good(teacher, quantized or student, exports.get("hf") or {}, content.get("evaluation")),
        _how_fast(teacher, student, models),
    ]


def _answer(question: str, answer: str, *sentences: str) -> dict[str, Any]:
    return {"question": question, "answer": answer, "sentences": [one for one in sentences if one]}


def _how_small(teacher, student, quantized, exports: Mapping[str, Any]) -> dict[str, Any]:
    share = student["parameters"] / max(teacher["parameters"], 1)
    full = in_bf16(teacher)
    files = [
        f"The exported {label} files take {megabytes(exports[name]['bytes'])} on disk, "
        f"{exports[name]['bytes'] / max(full, 1):.0%} of the teacher in bf16."
        for name, label in _FORMATS.items()
        if (exports.get(name) or {}).get("bytes") is not None
    ]
    if quantized and not files:
        files = ["The size of the quantized format was not measured: no files in that format were exported."]
    return _answer(
        "How small?",
        f"{share:.0%} of the parameters",
        f"{millions(student['parameters'])} parameters, the teacher has {millions(teacher['parameters'])}.",
        f"In bf16: {megabytes(in_bf16(student))}, the teacher {megabytes(full)}.",
        *files,
    )


def _how_good(
    teacher, last, exported: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    name, loss = f"the {last['name']} model", last["heldout_loss"]
    unmeasured = ""
    if exported.get("heldout_loss") is not None:
        name, loss = "the exported Hugging Face files", exported["heldout_loss"]
    elif exported:
        unmeasured = "The loss of the exported files was not measured."
    reference = teacher["heldout_loss"]
    if not (math.isfinite(loss) and math.isfinite(reference)):
        return _answer("How good?", "unknown", f"A held-out loss is not a number: {name} {loss}, teacher {reference}.")
    return _answer(
        "How good?",
        f"{_against(loss - reference)} the teacher",
        f"Held-out loss of {name}: {loss:.4f} nats per token, of the teacher {reference:.4f}.",
        f"Perplexity: {_perplexity(loss)}, the teacher {_perplexity(reference)}.",
        unmeasured,
        *scores.sentences(evaluation),
    )


def _against(change: float) -> str:
    """Return in words how a held-out loss compares."""
    if f"{abs(change):.4f}" == f"{0:.4f}":
        return "as good as"
    return f"{abs(change):.4f} nats {'worse' if change > 0 else 'better'} than"


def _how_fast(teacher, student, models: Mapping[str, Any]) -> dict[str, Any]:
    unmeasured = "Generation was not measured"
    unmeasured += ", nor was the speed of the quantized format." if "quantized" in models else "."
    speed, reference = (model.get("heldout_tokens_per_second") for model in (student, teacher))
    if not speed or not reference:
        return _answer("How fast?", "not measured", "The run has no speed for both models.", unmeasured)
    measured = (
        f"Forward passes over the held-out text on this machine, before quantization: {speed:,.0f} tokens/s, the "
        f"teacher {reference:,.0f}. Other work on the machine changes these speeds."
    )
    slowest, fastest = _speeds_of_shape(student, models)
    if fastest <= _STEADY * slowest:
        return _answer("How fast?", f"{speed / reference:.2f} times the teacher's speed", measured, unmeasured)
    return _answer(
        "How fast?",
        f"{slowest / reference:.1f} to {fastest / reference:.1f} times the teacher's speed",
        measured,
        f"It did so in this run: models of the same size were measured at {slowest:,.0f} to {fastest:,.0f} tokens/s.",
        unmeasured,
    )


def _speeds_of_shape(student, models: Mapping[str, Any]) -> tuple[float, float]:
    """Return the lowest and highest speed of the models that compute the same as the student."""
    speeds = [
        model["heldout_tokens_per_second"]
        for name, model in models.items()
        if name in _SAME_SHAPE and model["parameters"] == student["parameters"]
    ]
    found = [speed for speed in speeds if speed]
    return min(found), max(found)


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 100 else "over e^100"

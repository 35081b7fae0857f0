"""Make the report from the records of finished job steps: numbers, checks, table, page."""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from nemo_modelopt_cli.compress import fit_plan
from nemo_modelopt_cli.compress.facts import MODELS, done
from nemo_modelopt_cli.compress.settings import Job
from nemo_modelopt_cli.compress.stages import SKIPPED, Record

# Limits that the demo enforces; a run that misses one is not a good compression, whatever its exit code.
RECOVERED_AT_LEAST = 0.5
# Held-out losses differ by about this much by chance, so smaller differences are not judged.
JUDGED_FROM = 0.005
PTQ_COSTS_AT_MOST = 0.05
# The files hold the same 8-bit weights, but activations are not quantized when they are read back.
EXPORT_APART_AT_MOST = 0.02
_PACKAGES = (
    "nemo-modelopt-dropin",
    "nemo-toolkit",
    "megatron-core",
    "nvidia-modelopt",
    "torch",
    "lightning",
    "transformers",
)
_CURVES = {"pretrain": "teacher", "distill": "distilled", "scratch": "from scratch"}


def build(records: Mapping[str, Record], title: str, job: Job) -> dict[str, Any]:
    """Return everything that the page and the table show, as plain data.

    Args:
        records: of the finished steps; those that had nothing to do are left out.
        title: of the page.
        job: the settings.
    """
    found = searched(records, job)
    used = fit_plan.applied(job, found["plan"]) if found else job
    records = {k: r for k, r in records.items() if not r.result.get(SKIPPED)}
    models = [_model(MODELS[name], records[name].result) for name in MODELS if name in records]
    losses = {model["name"]: model["heldout_loss"] for model in models}
    exports = records["export"].result if "export" in records else {}
    if (exports.get("hf") or {}).get("heldout_loss") is not None:
        losses["exported"] = exports["hf"]["heldout_loss"]
    return {
        "title": title,
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "done": done(records, used),
        "models": models,
        "stages": [
            {"name": record.name, "seconds": record.seconds, "attempts": record.attempts} for record in records.values()
        ],
        "total_seconds": round(sum(record.seconds for record in records.values()), 1),
        "curves": [
            {"model": label, "points": records[name].result["curve"]}
            for name, label in _CURVES.items()
            if name in records
        ],
        "importance": records["prune"].result.get("importance", {}) if "prune" in records else {},
        "recovery": recovery(records, job),
        "fit": found or {},
        "sensitivity": records["quantize"].result.get("weight_errors", []) if "quantize" in records else [],
        "exports": exports,
        "evaluation": records["evaluate"].result if "evaluate" in records else {},
        "checks": checks(losses),
        "settings": {"job": job.as_dict(), **{name: record.settings for name, record in records.items()}},
        "versions": _versions(),
        "machine": _machine(records),
    }


def searched(records: Mapping[str, Record], job: Job) -> dict[str, Any] | None:
    """Return the plan of a job with budgets, its points and what was chosen as text, and what became of it."""
    if fit_plan.STAGE not in records:
        return None
    plan = records[fit_plan.STAGE].result["plan"]
    sentences = fit_plan.sentences(plan, job.fit)
    exported = (records["export"].result.get("hf") or {}) if "export" in records else {}
    if exported.get("bytes"):
        predicted = fit_plan.point_of(plan, job.fit)["figures"]["disk"]
        sentences.append(
            f"The exported folder has {exported['bytes'] / 1e6:,.3f} MB; {predicted / 1e6:,.3f} MB were predicted."
        )
    return {"plan": plan, "rows": fit_plan.rows(plan, job.fit), "sentences": sentences}


def recovery(records: Mapping[str, Record], job: Job) -> list[dict[str, Any]]:
    """Return steps, tokens, held-out loss and regained share before, during and after distillation.

    Losses during the training exist only if ``evaluate_every`` is set; the first and last are those of the models.
    """
    if not {"teacher", "prune", "distill"} <= records.keys():
        return []
    teacher, pruned, distilled = (records[name].result["heldout_loss"] for name in ("teacher", "prune", "distill"))
    training, lost = job.distillation, pruned - teacher
    points = {0: pruned}
    points |= {point["step"]: point["heldout"] for point in records["distill"].result["curve"] if "heldout" in point}
    points[training.steps] = distilled
    return [
        {
            "steps": step,
            "tokens": step * training.global_batch_size * job.seq_length,
            "loss": loss,
            "regained": (pruned - loss) / lost if lost >= JUDGED_FROM else None,
        }
        for step, loss in sorted(points.items())
    ]


def _model(label: str, result: Mapping[str, Any]) -> dict[str, Any]:
    names = ("heldout_loss", "heldout_tokens_per_second", "parameters", "body_parameters", "bytes", "shape")
    found = {name: result[name] for name in names}
    return {"name": label, "perplexity": math.exp(found["heldout_loss"]), **found}


def checks(losses: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the checks of the held-out losses that can be judged, each with its numbers in one sentence."""
    found: list[dict[str, Any]] = []

    def check(name: str, ok: bool, sentence: str) -> None:
        found.append({"name": name, "ok": bool(ok), "sentence": sentence})

    if {"teacher", "pruned"} <= losses.keys():
        check(*_pruning(losses["teacher"], losses["pruned"]))
    if {"teacher", "pruned", "distilled"} <= losses.keys():
        check(*_distillation(losses["teacher"], losses["pruned"], losses["distilled"]))
    if {"distilled", "from scratch"} <= losses.keys():
        better = losses["from scratch"] - losses["distilled"]
        check(
            "distilled beats from scratch",
            better > 0,
            f"The distilled student is {better:.4f} nats better than one of its shape trained from random weights on "
            "the same steps (above 0 expected).",
        )
    if {"distilled", "quantized"} <= losses.keys():
        cost = losses["quantized"] - losses["distilled"]
        check(
            "quantization is cheap",
            cost <= PTQ_COSTS_AT_MOST,
            f"Quantization changed the held-out loss by {signed(cost)} nats (at most +{PTQ_COSTS_AT_MOST} expected).",
        )
    if {"exported", "quantized"} <= losses.keys():
        apart = abs(losses["exported"] - losses["quantized"])
        check(
            "the export is the model",
            apart <= EXPORT_APART_AT_MOST,
            f"The exported Hugging Face files, read back, are {apart:.4f} nats from the quantized model "
            f"(at most {EXPORT_APART_AT_MOST} expected).",
        )
    return found


def _pruning(teacher: float, pruned: float) -> tuple[str, bool, str]:
    """Return the check of pruning, which may cost any amount because distillation follows."""
    lost = pruned - teacher
    if lost > 0:
        few = (
            f" That is too little to judge distillation by: less than {JUDGED_FROM} nats." if lost < JUDGED_FROM else ""
        )
        return "pruning", True, f"Pruning raised the held-out loss from {teacher:.4f} to {pruned:.4f}.{few}"
    sentence = f"Pruning did not raise the held-out loss ({teacher:.4f} before, {pruned:.4f} after): the teacher is "
    sentence += "hardly trained, or there is too little held-out text to judge distillation by."
    return "pruning", math.isfinite(pruned), sentence


def _distillation(teacher: float, pruned: float, distilled: float) -> tuple[str, bool, str]:
    """Return the check of distillation, which must recover its share of the loss that pruning cost."""
    lost, change = pruned - teacher, distilled - pruned
    if lost < JUDGED_FROM or not change <= JUDGED_FROM:
        sentence = f"Distillation changed the held-out loss by {signed(change)} nats, from {pruned:.4f} to "
        sentence += f"{distilled:.4f} (at most +{JUDGED_FROM} expected)."
        return "distillation", change <= JUDGED_FROM, sentence
    share, better = -change / lost, teacher - distilled
    if better > 0:
        sentence = f"Distillation recovered all of the {lost:.4f} nats that pruning cost; the student is "
        sentence += f"{better:.4f} nats better than the teacher on this text."
    else:
        sentence = f"Distillation recovered {share:.0%} of the {lost:.4f} nats that pruning cost "
        sentence += f"(at least {RECOVERED_AT_LEAST:.0%} expected)."
    return "distillation", share >= RECOVERED_AT_LEAST, sentence


def signed(change: float) -> str:
    """Return the change of a loss with its sign, or without one if it rounds to zero."""
    text = f"{change:+.4f}"
    return text.lstrip("+-") if float(text) == 0 else text


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _machine(records: Mapping[str, Record]) -> dict[str, str]:
    device = records["teacher"].result.get("device", "") if "teacher" in records else ""
    return {"system": platform.platform(), "cores": str(os.cpu_count()), "device": device or platform.machine()}


def finish(records: Mapping[str, Record], root: Path, title: str, job: Job, strict: bool = False) -> int:
    """Write the report and print its table and checks; return 1 if a check fails and ``strict`` is set, else 0."""
    import sys

    from rich.console import Console

    from nemo_modelopt_dropin.report import page, scores

    content = build(records, title, job)
    page.write(content, root)
    screen = Console(file=sys.stdout)
    screen.print(page.table(content))
    if content["evaluation"]:
        screen.print(scores.table(content["evaluation"]))
    for sentence in (content.get("fit") or {}).get("sentences", []):
        screen.print(sentence, highlight=False)
    failed = [check for check in content["checks"] if not check["ok"]]
    for check in content["checks"]:
        mark = "[green]ok[/green]  " if check["ok"] else "[red]FAIL[/red]"
        screen.print(f"{mark} {check['sentence']}", highlight=False)
    screen.print(f"Report: {root / 'report.html'}", highlight=False, soft_wrap=True)
    return 1 if failed and strict else 0

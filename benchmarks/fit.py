"""Benchmark compression to a budget: sizes and formats chosen together, sizes alone, and formats alone.

For each seed, a small Llama-style teacher is trained on Python's help texts (the demo's corpus). For each budget of
bytes on disk, three searches choose: among sizes and formats together, among sizes in 16 bits, and among formats of the
whole model. Each choice is pruned, distilled from the teacher on the same samples for the same number of steps, and
quantized. Losses are held-out losses in nats per token; bytes are those of the formula, which the tests compare with
real files. A run resumes: finished cells are read from the folder. Everything runs in one CPU process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_modelopt_cli.compress.fit_settings import Fit
from nemo_modelopt_cli.compress.settings import Job, Layout, Pruning, Quantization, SettingsError, Training
from nemo_modelopt_cli.run_script import start_on_cpu

VOCABULARY, SEQ_LENGTH = 512, 64
TEACHER = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 352,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 32,
}
SEEDS, BUDGETS = (1, 2, 3), ("0.6x", "0.45x", "0.33x", "0.25x")
# The whole model in FP8 keeps the first budget, in INT4 the second one, and in no format the others.
FORMATS = ("no_quant", "fp8", "int4_awq")
JOINT, PRUNED, QUANTIZED = "joint", "prune only", "quantize only"
METHODS = (JOINT, PRUNED, QUANTIZED)
PRETRAIN_STEPS, DISTILL_STEPS = 200, 40
LAYOUT = Layout(cpu=True)


def training_run(steps: int, lr: float, seed: int) -> Training:
    """Return the settings of a training whose warm-up is a tenth of its steps."""
    return Training(
        steps=steps, global_batch_size=16, micro_batch_size=16, lr=lr, min_lr=lr / 20, warmup_steps=steps // 10,
        seed=seed
    )  # fmt: skip


def job_of(root: Path, seed: int, budget: str, method: str) -> Job:
    """Return the job of one cell."""
    whole = {f"target_{name}": size for name, size in TEACHER.items() if name != "kv_channels"}
    return Job(
        teacher=str(root / f"teacher-{seed}" / "checkpoint"),
        train_text=str(root / "corpus" / "train.jsonl"),
        heldout_text=str(root / "corpus" / "heldout.jsonl"),
        seq_length=SEQ_LENGTH,
        layout=LAYOUT,
        pruning=Pruning(
            num_samples=64, micro_batch_size=16, heldout_batches=8, **(whole if method == QUANTIZED else {})
        ),
        distillation=training_run(DISTILL_STEPS, 2e-3, seed),
        quantization=Quantization(
            calibration_size=32, calibration_batch_size=16, formats=("hf",), awq_block_size=32
        ),
        fit=Fit(
            disk=budget, formats=("no_quant",) if method == PRUNED else FORMATS, candidates=1, minutes=5.0,
        ),
    )  # fmt: skip


def teacher(root: Path, seed: int) -> None:
    """Train the teacher of a seed, unless it exists."""
    from nemo_modelopt_cli.compress import corpus

    folder = root / f"teacher-{seed}"
    if (folder / "done").exists():
        return
    if not (root / "corpus" / "tokenizer").exists():
        (root / "corpus").mkdir(parents=True, exist_ok=True)
        corpus.make(root / "corpus", VOCABULARY)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    settings = training_run(PRETRAIN_STEPS, 3e-3, seed)
    sizes = {**TEACHER, "vocab_size": VOCABULARY}
    corpus.pretrain(folder, root / "corpus", sizes, settings, LAYOUT, SEQ_LENGTH, sys.stderr)
    (folder / "done").touch()


def cell(root: Path, seed: int, budget: str, method: str) -> dict[str, Any]:
    """Search, prune, distill and quantize; return what was chosen and its losses."""
    from nemo_modelopt_cli.compress import fit_plan, jobs, plan, stages

    job, run = job_of(root, seed, budget, method), root / f"run-{seed}"
    try:
        job.check()
    except SettingsError as error:
        return {"out of reach": str(error)}
    started = time.perf_counter()
    steps = plan.search_stages(plan.compression_stages(job, run))
    records = stages.run_stages(steps, run, redo=[fit_plan.STAGE])
    found = fit_plan.read(run)
    assert found is not None
    point, chosen = fit_plan.point_of(found, job.fit), fit_plan.applied(job, found)
    folder, tokens = root / f"cell-{seed}-{budget}-{method.replace(' ', '-')}", run / "tokens"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("prune", "distill", "quantize"):
        (folder / name).mkdir(parents=True)
    student, losses = Path(job.teacher), {}
    if fit_plan.prunes(chosen):
        losses["pruned"] = jobs.prune(folder / "prune", chosen, tokens, run)["heldout_loss"]
        student = folder / "prune" / "checkpoint"
        losses["distilled"] = jobs.distill(folder / "distill", chosen, student, tokens, sys.stderr)["heldout_loss"]
        student = folder / "distill" / "checkpoint"
    if chosen.quantization.weights != replace(chosen.quantization.weights, attention="no_quant", mlp="no_quant"):
        losses["quantized"] = jobs.quantize(folder / "quantize", chosen, student, tokens)["heldout_loss"]
    shutil.rmtree(folder)
    original = records["teacher"].result["heldout_loss"]
    return {
        "sizes": point["sizes"],
        "format": point["format"],
        "bytes": point["figures"]["disk"],
        "limit": found["budgets"]["disk"],
        "predicted": point["predicted"],
        "measured": point["measured"],
        "teacher": original,
        **losses,
        "loss": [original, *losses.values()][-1],
        "tried": [[one["predicted"], one["measured"]] for one in found["points"] if one["measured"] is not None],
        "seconds": round(time.perf_counter() - started, 1),
    }


def summary(cells: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each budget, the mean increase over the teacher by method, and the margin of the joint choice."""
    rows = []
    for budget in BUDGETS:
        row: dict[str, Any] = {"budget": budget}
        by_seed = {
            method: {
                seed: found["loss"] - found["teacher"]
                for seed in SEEDS
                if "loss" in (found := cells.get(key(seed, budget, method), {}))
            }
            for method in METHODS
        }
        for method, values in by_seed.items():
            row[method] = statistics.mean(values.values()) if values else None
        for method in METHODS[1:]:
            both = sorted(by_seed[JOINT].keys() & by_seed[method].keys())
            margins = [by_seed[method][seed] - by_seed[JOINT][seed] for seed in both]
            # A method that cannot keep the budget has no margin.
            row[f"margin over {method}"] = statistics.mean(margins) if margins else None
            row[f"spread over {method}"] = statistics.stdev(margins) if len(margins) > 1 else None
        rows.append(row)
    return rows


def key(seed: int, budget: str, method: str) -> str:
    """Return the name of a cell."""
    return f"seed {seed}, {budget}, {method}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table of the results."""

    def text(value: float | None) -> str:
        return "out of reach" if value is None else f"{value:+.4f}"

    def margin(row: dict[str, Any], method: str) -> str:
        value, spread = row[f"margin over {method}"], row[f"spread over {method}"]
        if value is None:
            return ""
        return f"{value:+.4f}" + ("" if spread is None else f" ± {spread:.4f}")

    lines = ["| budget | " + " | ".join(METHODS) + " | joint better than prune only by | than quantize only by |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        cells = [text(row[method]) for method in METHODS] + [margin(row, method) for method in METHODS[1:]]
        lines.append(f"| {row['budget']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(cells: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw bytes against the increase of the loss, one point for each cell."""
    import altair as alt

    from nemo_modelopt_dropin.report import charts

    points = [
        {"method": name.rpartition(", ")[2], "MB": one["bytes"] / 1e6, "increase": one["loss"] - one["teacher"]}
        for name, one in cells.items()
        if "loss" in one
    ]
    chart = alt.Chart(alt.Data(values=points)).mark_point(filled=True, size=70, opacity=0.8)
    x = alt.X("MB:Q", title="Hugging Face folder, MB", scale=alt.Scale(zero=False, padding=15))
    y = alt.Y("increase:Q", title="loss over the teacher's")
    shown = chart.encode(x=x, y=y, color=alt.Color("method:N", sort=METHODS), shape=alt.Shape("method:N", sort=METHODS))
    path.write_bytes(charts.png(charts.specification(shown)))


def write(cells: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write the results: numbers, table and figure."""
    from nemo_modelopt_dropin.fit.prediction import rank_correlation

    folder.mkdir(parents=True, exist_ok=True)
    # Means of different seeds could not be compared.
    seeds = [seed for seed in SEEDS if all(key(seed, b, m) in cells for b in BUDGETS for m in METHODS)]
    cells = {key(seed, b, m): cells[key(seed, b, m)] for seed in seeds for b in BUDGETS for m in METHODS}
    if not cells:
        return
    tried = sorted({tuple(pair) for one in cells.values() for pair in one.get("tried", [])})
    correlation = rank_correlation(*zip(*tried, strict=True)) if tried else None
    rows = summary(cells)
    about = {
        "teacher": TEACHER, "pretrain steps": PRETRAIN_STEPS, "distill steps": DISTILL_STEPS,
        "seeds": seeds, "rank correlation of predicted and measured": correlation, "combinations": len(tried),
    }  # fmt: skip
    (folder / "fit.json").write_text(json.dumps({"about": about, "rows": rows, "cells": cells}, indent=1) + "\n")
    (folder / "fit.md").write_text(markdown(rows))
    figure(cells, folder / "fit.png")


def main() -> int:
    """Run what is missing for some minutes, write the results, and return 3 if cells are left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints and finished cells")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after these; run again to continue")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    path, end = given.folder.resolve() / "cells.json", time.monotonic() + 60 * given.minutes
    cells: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    wanted = [(seed, budget, method) for seed in SEEDS for method in METHODS for budget in BUDGETS]
    left = [one for one in wanted if key(*one) not in cells]
    if left:
        import torch

        start_on_cpu()
        torch.set_num_threads(1)
    while left and time.monotonic() < end:
        one = left.pop(0)
        teacher(path.parent, one[0])
        cells[key(*one)] = cell(path.parent, *one)
        path.write_text(json.dumps(cells, indent=1))
        sys.stderr.write(f"{key(*one)}: {cells[key(*one)]}\n")
    if cells:
        write(cells, given.results)
    return 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())

"""Benchmark every step on models of real shape: time and peak memory, and their growth with the model.

The models have the layers and the vocabulary of Llama-3.2-1B with random bf16 weights. Each step runs in a process of
its own on one CPU rank: import (also that of NeMo alone), quantization with export and verification, pruning of layers
and of width, and two steps of distillation. CPU ranks hold weights in fp32, so memory is compared with four bytes for
each weight. What modules take that are imported before the step is not included.

    python benchmarks/real_size.py                         # the smallest model
    python benchmarks/real_size.py --size 1.2 --step fp8   # one step; results are added to those in the file
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks._real_size_rank import LENGTH, ROWS, STEPS  # noqa: E402

VOCABULARY = 128256
_HEAD = {"head_dim": 64, "num_key_value_heads": 8, "num_attention_heads": 32}
# Sizes in billions of parameters, with tied embeddings: the layers of Llama-3.2-1B, fewer of them, or half as wide.
SIZES: dict[str, dict[str, int]] = {
    "0.25": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, **_HEAD, "num_attention_heads": 16,
    },
    "0.5": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, **_HEAD},
    "1.2": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, **_HEAD},
}  # fmt: skip
# A small model for the test of this benchmark.
QUICK = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 16, "num_key_value_heads": 2,
    "num_attention_heads": 4, "vocab_size": 512,
}  # fmt: skip
# Upper bounds: peak memory / fp32 weights, comparison / calibration, check of the logits / calibration, import / that
# of stock NeMo without the patches of its importers. A lower bound:
# megabytes of weights in 16 bits that the export processes in a second of CPU time.
TARGETS = {
    "memory": {"fp8": 1.25, "int4_awq": 1.25, "drop_layers": 1.4, "width": 1.4},
    "ratio": 1.0,
    "export": 150.0,
    "import": 1.5,
}
_WRITING = ("write weights",)


def prepare(folder: Path, sizes: dict[str, int]) -> None:
    """Write a Hugging Face checkpoint with random bf16 weights, and a text for calibration."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    from nemo_modelopt_cli.compress import corpus

    target = folder / "hf"
    documents = list(corpus.documents().values())
    vocabulary = sizes.get("vocab_size", VOCABULARY)
    corpus.train_tokenizer(documents, min(vocabulary, 4096), target)
    config = LlamaConfig(
        **{"vocab_size": vocabulary, **sizes}, tie_word_embeddings=True, max_position_embeddings=131072,
        rope_theta=500000.0, rms_norm_eps=1e-5, torch_dtype="bfloat16", architectures=["LlamaForCausalLM"],
        rope_scaling={
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    config.save_pretrained(target)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target)).state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in shapes.items():
        if name == "lm_head.weight":  # tied
            continue
        plain = torch.ones(value.shape) if value.dim() == 1 else torch.randn(value.shape, generator=generator) * 0.02
        weights[name] = plain.bfloat16()
    save_file(weights, str(target / "model.safetensors"), metadata={"format": "pt"})
    parameters = sum(value.numel() for value in weights.values())
    (folder / "sizes.json").write_text(json.dumps({**sizes, "parameters": parameters}))
    rows = [text for text in documents if len(text) > 6 * LENGTH]
    corpus.write_jsonl(folder / "text.jsonl", [rows[i % len(rows)] for i in range(2 * ROWS)])


def run(step: str, folder: Path, threads: int, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a step in a process of its own and return its figures; its output goes to a log in the folder."""
    result = folder / f"{step}.json"
    result.unlink(missing_ok=True)
    more = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **(env or {})}
    if step == "import_stock":
        more["NEMO_MODELOPT"] = "stock"
    with (folder / f"{step}.log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "benchmarks._real_size_rank", step, str(folder), str(result)],
            cwd=ROOT, env={**os.environ, **more}, stdout=log, stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip
    return json.loads(result.read_text())


def row(step: str, found: dict[str, Any], folder: Path, parameters: int) -> dict[str, Any]:
    """Return the figures of a step, with the ratios that the targets bound."""
    phases = found["phases"]
    weights = 4 * parameters
    worst = max(phases, key=lambda name: phases[name]["peak"])
    seconds = sum(phase["seconds"] for phase in phases.values())
    result = {
        "parameters": parameters,
        "seconds": seconds,
        "cores used": sum(phase["cpu"] for phase in phases.values()) / seconds,
        "peak GB": (phases[worst]["peak"] - found["imports"]) / 1e9,
        "peak / fp32 weights": (phases[worst]["peak"] - found["imports"]) / weights,
        "peak in": worst,
        "longest": max(phases, key=lambda name: phases[name]["seconds"]),
        "phases": {
            name: {"seconds": phase["seconds"], "peak GB": max(0.0, phase["peak"] - found["imports"]) / 1e9}
            for name, phase in sorted(phases.items(), key=lambda item: -item[1]["seconds"])
        },
    }
    if "calibrate" in phases:
        calibration = phases["calibrate"]["seconds"]
        written = sum(file.stat().st_size for file in (folder / step).glob("*.safetensors"))
        # Of CPU time: seconds on the clock depend on what else the machine does.
        seconds, cpu = (sum(phases[name][key] for name in _WRITING) for key in ("seconds", "cpu"))
        result["comparison / calibration"] = phases.get("compare", {"seconds": 0.0})["seconds"] / calibration
        result["logits check / calibration"] = phases["check logits"]["seconds"] / calibration
        result["export MB/s a core"] = 2 * parameters / 1e6 / cpu
        result["export MB/s on the clock"] = 2 * parameters / 1e6 / seconds
        result["exported MB"] = written / 1e6
    return result


def verdicts(step: str, found: dict[str, Any]) -> list[str]:
    """Return a line for each target of a step."""
    lines = []
    limit = TARGETS["memory"].get(step)  # type: ignore[attr-defined]
    bounds = [("peak / fp32 weights", limit, False)] if limit else []
    if "comparison / calibration" in found:
        if found.get("rows", ROWS) >= ROWS:  # a shorter calibration says nothing about the ratios
            bounds += [("comparison / calibration", TARGETS["ratio"], False)]
            bounds += [("logits check / calibration", TARGETS["ratio"], False)]
        bounds += [("export MB/s a core", TARGETS["export"], True)]
    for name, bound, lower in bounds:
        met = found[name] >= bound if lower else found[name] <= bound
        lines.append(f"{name} {found[name]:.2f} (target {bound:g}: {'met' if met else 'MISSED'})")
    return lines


def growth(rows: dict[str, dict[str, Any]], step: str) -> dict[str, float]:
    """Return the powers of the parameters with which time and peak grow from the smallest to the largest model."""
    found = sorted((row for row in rows.values() if row["step"] == step), key=lambda row: row["parameters"])
    if len(found) < 2:
        return {}
    first, last = found[0], found[-1]
    ratio = math.log(last["parameters"] / first["parameters"])
    return {key: math.log(last[key] / first[key]) / ratio for key in ("seconds", "peak GB")}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the figures as Markdown."""
    lines = [
        "| billions | step | rows | seconds | peak GB | / fp32 weights | peak in | longest phases |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in sorted(rows.values(), key=lambda one: (list(STEPS).index(one["step"]), one["parameters"])):
        phases = list(found["phases"].items())[:4]
        longest = ", ".join(f"{name} {phase['seconds']:.0f} s" for name, phase in phases)
        lines.append(
            f"| {found['parameters'] / 1e9:.2f} | {found['step']} | {found.get('rows', ROWS)} | "
            f"{found['seconds']:.0f} | {found['peak GB']:.2f} | {found['peak / fp32 weights']:.2f} | "
            f"{found['peak in']} | {longest} |"
        )
    lines.append("")
    for found in sorted(rows.values(), key=lambda one: (list(STEPS).index(one["step"]), one["parameters"])):
        for line in verdicts(found["step"], found):
            lines.append(f"- {found['parameters'] / 1e9:.2f} B, {found['step']}: {line}")
    for name, found in rows.items():
        stock = rows.get(f"{name.removesuffix(' import')} import_stock")
        if name.endswith(" import") and stock:
            ratio = found["seconds"] / stock["seconds"]
            limit = TARGETS["import"]
            met = "met" if ratio <= limit else "MISSED"
            lines.append(
                f"- {found['parameters'] / 1e9:.2f} B: import / NeMo's own {ratio:.2f} (target {limit}: {met})"
            )
    for step in STEPS:
        exponents = growth(rows, step)
        if exponents:
            lines.append(
                f"- growth of {step} with the parameters: time to the power of {exponents['seconds']:.2f}, memory "
                f"{exponents['peak GB']:.2f} (linear: 1)"
            )
    return "\n".join(lines) + "\n"


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw seconds and peak memory over the number of parameters, one line for each step."""
    import altair as alt
    import vl_convert

    charts = []
    for key in ("seconds", "peak / fp32 weights"):
        values = [{"billions": r["parameters"] / 1e9, "step": r["step"], "value": r[key]} for r in rows.values()]
        chart = alt.Chart(alt.Data(values=values)).mark_line(point=True)
        charts.append(
            chart.encode(
                x=alt.X("billions:Q", title="billions of parameters"),
                y=alt.Y("value:Q", title=key),
                color=alt.Color("step:N", sort=list(STEPS), title=None),
            ).properties(width=320, height=220)
        )
    path.write_bytes(vl_convert.vegalite_to_png(alt.hconcat(*charts).to_dict(), scale=2))


def add(output: Path, name: str, found: dict[str, Any], threads: int) -> str:
    """Add the figures of a step to the files of the results, and return the table."""
    from benchmarks import _measure

    path = output / "real_size.json"
    output.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    rows[name] = found
    about = {**_measure.about(), "threads": threads}
    about["machine"] = about["machine"].replace("one thread per rank", f"{threads} threads")
    path.write_text(json.dumps({**about, "targets": TARGETS, "rows": rows}, indent=2) + "\n")
    text = table(rows)
    notes = output / "real_size_notes.md"
    (output / "real_size.md").write_text(
        f"{about['machine']}; {about['versions']}\n\n{text}" + (f"\n{notes.read_text()}" if notes.exists() else "")
    )
    plot(rows, output / "real_size.png")
    return text


def main() -> int:
    """Run the steps, add their results to the files and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.25", help="billions of parameters")
    parser.add_argument("--step", choices=STEPS, action="append", help="only this step; can be repeated")
    parser.add_argument("--folder", type=Path, help="folder for models and logs, which are kept; temporary by default")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of text that are calibrated on")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)) / args.size
        if not (folder / "sizes.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            prepare(folder, SIZES[args.size])
        parameters = json.loads((folder / "sizes.json").read_text())["parameters"]
        for step in args.step or STEPS:
            found = row(step, run(step, folder, args.threads, {"REAL_SIZE_ROWS": str(args.rows)}), folder, parameters)
            found = {"step": step, "rows": args.rows, **found}
            print(add(args.output, f"{args.size} {step}", found, args.threads))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Benchmark post-training quantization against stock: time per real token and peak memory of `Quantizer.quantize`.

A real token is a token of the text. Stock pads each row to the sequence length with the end-of-text token and
calibrates on the padding as well; our quantizer joins rows with one such token. The runs alternate: stock, ours on one
rank, and ours on two data-parallel ranks. Each rank computes on one thread, and the best run counts. Our figures
include the comparison with the original model (held-out loss before and after, error of each layer), which stock does
not do; the figures without it are reported as well. Peak memory is what a rank needs beyond the model while
`quantize` runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZES = {"num_layers": 8, "hidden_size": 256, "ffn_hidden_size": 1024, "num_attention_heads": 8, "num_query_groups": 4}
FULL = {"sizes": SIZES, "vocabulary": 32000, "samples": 512, "seq_len": 512, "batch": 16}
QUICK = {
    "sizes": {**SIZES, "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128},
    "vocabulary": 512,
    "samples": 16,
    "seq_len": 64,
    "batch": 4,
}
HELD_OUT = 32
# Upper bounds: a third of stock's time on one rank, 0.6 of that on two data-parallel ranks, and stock's memory.
TARGETS = {"time ours / stock": 1 / 3, "time two ranks / one": 0.6, "memory ours / stock": 1.0}


def prepare(folder: Path, vocabulary: int, samples: int) -> dict[str, str]:
    """Write the text and a tokenizer with exactly ``vocabulary`` entries, and return their paths."""
    from nemo_modelopt_cli.compress import corpus

    documents = list(corpus.documents().values())
    rows: list[str] = []
    for turn in range(1 + (samples + HELD_OUT) // len(documents)):
        for text in documents:
            # Each turn starts the same documents at another paragraph, so that rows differ and keep natural lengths.
            paragraphs = text.split("\n\n")
            rest = "\n\n".join(paragraphs[turn % max(1, len(paragraphs)) :])
            rows.append(rest if rest.strip() else text)
    corpus.write_jsonl(folder / "text.jsonl", rows[: samples + HELD_OUT])
    corpus.train_tokenizer(documents, vocabulary, folder / "tokenizer")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens([f"<filler_{i}>" for i in range(vocabulary - len(tokenizer))])
    tokenizer.save_pretrained(folder / "tokenizer")
    return {"text": str(folder / "text.jsonl"), "tokenizer": str(folder / "tokenizer")}


def measure(pools: dict[str, Any], folder: Path, case: dict[str, Any], repeats: int, algorithm: str) -> dict[str, Any]:
    """Run all contestants and return the figures.

    Args:
        pools: rank pools (``test_code.support.ranks.RankPool``): "stock" and "ours" with one rank, "ours x 2" with two.
        folder: folder for the text and the tokenizer.
        case: `FULL` or `QUICK`.
        repeats: number of runs; the best one counts.
        algorithm: quantization algorithm.

    Returns:
        The figures of each contestant ("rows"), their "ratios", the "targets" and the "case".
    """
    from benchmarks import _ptq_rank

    files = prepare(folder, case["vocabulary"], case["samples"])
    settings = {
        "algorithm": algorithm,
        "enable_kv_cache": False,
        "calibration_dataset": files["text"],
        "calibration_dataset_size": case["samples"],
        "calibration_batch_size": case["batch"],
        "calibration_seq_len": case["seq_len"],
    }
    job = (_ptq_rank.quantize, {**case["sizes"], "seq_length": case["seq_len"]}, files["tokenizer"], settings)
    runs = {
        "stock": (pools["stock"], True),
        "ours": (pools["ours"], True),
        "ours x 2": (pools["ours x 2"], True),
        "ours, not compared": (pools["ours"], False),
    }
    limit = {"timeout": 3600.0}
    # A few rows first: imports and first calls are not measured.
    few = (*job[:-1], {**settings, "calibration_dataset_size": case["batch"]})
    packages = {name: pool.run(*few, comparison=comparison)[0]["package"] for name, (pool, comparison) in runs.items()}
    assert packages == {name: "stock" if name == "stock" else "ours" for name in runs}
    timed: dict[str, list] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (pool, comparison) in runs.items():
            timed[name].append(pool.run(*job, comparison=comparison, **limit))
    rows = {}
    for name in runs:
        real = sum(rank["real"] for rank in timed[name][0])
        seconds = [max(rank["seconds"] for rank in ranks) for ranks in timed[name]]
        rows[name] = {
            "real tokens": real,
            "positions computed": sum(rank["positions"] for rank in timed[name][0]),
            "seconds": {"best": min(seconds), "worst": max(seconds)},
            "microseconds a real token": 1e6 * min(seconds) / real,
            "peak MiB": min(max(rank["peak"] for rank in ranks) for ranks in timed[name]) / 2**20,
        }
    return {"rows": rows, "ratios": ratios(rows), "targets": TARGETS, "case": {**case, "algorithm": algorithm}}


def ratios(rows: dict[str, Any]) -> dict[str, float]:
    """Return the ratios that the targets bound."""
    cost = {name: row["microseconds a real token"] for name, row in rows.items()}
    return {
        "time ours / stock": cost["ours"] / cost["stock"],
        "time two ranks / one": cost["ours x 2"] / cost["ours"],
        "memory ours / stock": rows["ours"]["peak MiB"] / rows["stock"]["peak MiB"],
        "time ours, not compared / stock": cost["ours, not compared"] / cost["stock"],
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as an aligned table, with a verdict for each target."""
    lines = [f"{'':22}{'real tokens':>12}{'computed':>10}{'best s':>9}{'worst s':>9}{'us/token':>10}{'peak MiB':>10}"]
    for name, row in result["rows"].items():
        seconds = row["seconds"]
        lines.append(
            f"{name:22}{row['real tokens']:12}{row['positions computed']:10}{seconds['best']:9.2f}"
            f"{seconds['worst']:9.2f}{row['microseconds a real token']:10.1f}{row['peak MiB']:10.1f}"
        )
    for name, ratio in result["ratios"].items():
        target = result["targets"].get(name)
        verdict = "" if target is None else f"  (target {target:.2f}: {'met' if ratio <= target else 'MISSED'})"
        lines.append(f"{name:34}{ratio:8.3f}{verdict}")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw time per token and peak memory as bars."""
    import altair as alt
    import vl_convert

    titles = {"microseconds a real token": "µs per real token", "peak MiB": "peak memory beyond the model, MiB"}
    charts = []
    for key, title in titles.items():
        values = [{"run": name, "value": row[key]} for name, row in result["rows"].items()]
        base = alt.Chart(alt.Data(values=values)).encode(
            x=alt.X("value:Q", title=title), y=alt.Y("run:N", sort=list(result["rows"]), title=None)
        )
        numbers = base.mark_text(align="left", dx=3).encode(text=alt.Text("value:Q", format=".3~s"))
        charts.append((base.mark_bar(color="#3b82c4") + numbers).properties(width=320, height=130))
    path.write_bytes(vl_convert.vegalite_to_png(alt.hconcat(*charts).to_dict(), scale=2))


def write(result: dict[str, Any], folder: Path) -> None:
    """Write the results as a JSON file, a table and a plot."""
    packages = ("torch", "nemo-toolkit", "megatron-core", "nvidia-modelopt")
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, one thread per rank",
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ptq.json").write_text(json.dumps({**about, **result}, indent=2) + "\n")
    (folder / "ptq.txt").write_text(table(result) + "\n")
    plot(result, folder / "ptq.png")


def main() -> int:
    """Run the benchmark, write its results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="use a small model and little text")
    parser.add_argument("--samples", type=int, help="number of calibration rows")
    parser.add_argument("--batch", type=int, help="calibration batch size")
    parser.add_argument("--algorithm", default="fp8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    case = {**(QUICK if args.quick else FULL)}
    case |= {name: getattr(args, name) for name in ("samples", "batch") if getattr(args, name)}

    from test_code.support.ranks import RankPool

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pools = {
            "stock": RankPool(1, folder / "stock", {"NEMO_MODELOPT": "stock"}),
            "ours": RankPool(1, folder / "ours"),
            "ours x 2": RankPool(2, folder / "ours2"),
        }
        try:
            result = measure(pools, folder, case, args.repeats, args.algorithm)
        finally:
            for pool in pools.values():
                pool.close()
    write(result, args.output)
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compute the memory of a distillation step on one GPU, stock against ours, and check the formulas in the same run.

The table covers the last pipeline stage, which holds the logits: weights of both models, gradients and optimizer of the
student (whole, or divided over the data-parallel ranks with a distributed optimizer), the student's activations without
recomputation, logits and loss. The formulas are compared with the memory of Megatron's models on fake tensors (one rank
at a time, any size; counted by PyTorch's MemTracker), and at a small size with the allocator's own events. Activations
are those of Megatron's local layers with PyTorch's attention. Transformer Engine's layers keep somewhat less, with
stock and with ours alike.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks._measure import about
from nemo_modelopt_dropin.preflight.loss_memory import Sizes

GIB = 2**30
STOCK, CHUNKED, FUSED = "stock", "chunked", "fused"
SETTINGS: dict[str, dict[str, Any]] = {STOCK: {}, CHUNKED: {"fused_logits": "off"}, FUSED: {"fused_logits": "on"}}
DATA_PARALLEL = 8


def _model(layers: int, hidden: int, ffn: int, heads: int, groups: int, channels: int) -> dict[str, int]:
    sizes = {"num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn, "num_attention_heads": heads}
    return {**sizes, "num_query_groups": groups, "kv_channels": channels}


LLAMA_4B = _model(32, 3072, 9216, 32, 8, 128)
LLAMA_8B = _model(32, 4096, 14336, 32, 8, 128)
LLAMA_70B = _model(80, 8192, 28672, 64, 8, 128)
LLAMA = {"vocabulary": 128256, "dtype": "bfloat16"}
PAIRS = {
    "8B -> 4B": {"student": LLAMA_4B, "teacher": LLAMA_8B, **LLAMA},
    "70B -> 8B": {"student": LLAMA_8B, "teacher": LLAMA_70B, **LLAMA},
}
# (tp, pp, sequence length, micro-batch)
LAYOUTS = {
    "8B -> 4B": [(1, 1, 4096, 1), (2, 1, 4096, 1), (8, 1, 4096, 1), (8, 1, 8192, 2), (4, 2, 8192, 1)],
    "70B -> 8B": [(8, 1, 4096, 1), (8, 2, 4096, 1), (8, 4, 8192, 1), (8, 4, 8192, 2), (8, 8, 32768, 1)],
}
SIMULATED = {"8B -> 4B": [(1, 1, 4096, 1), (8, 1, 8192, 2)], "70B -> 8B": [(8, 4, 8192, 1)]}
SMALL = {"student": _model(4, 320, 960, 8, 4, 40), "teacher": _model(8, 512, 1536, 8, 4, 64), "vocabulary": 32000}
SMALL |= {"tp": 1, "pp": 1, "length": 256, "sequences": 1, "dtype": "float32"}
QUICK = {**SMALL, "student": _model(2, 64, 96, 4, 2, 16), "teacher": _model(2, 96, 128, 4, 2, 24), "vocabulary": 8000}


@dataclass(frozen=True)
class Memory:
    """Hold the memory of one rank of the last pipeline stage, in bytes except for ``trained``.

    Attributes:
        weights: weights of both models.
        trained: number of the student's weights on this rank.
        activations: activations that the student's layers keep.
        logits_and_loss: peak of logits and loss, in addition to the activations.
    """

    weights: int
    trained: int
    activations: int
    logits_and_loss: int

    @property
    def step(self) -> int:
        """Return the peak beyond weights, gradients and optimizer."""
        return self.activations + self.logits_and_loss

    def total(self, data_parallel: int = 1) -> float:
        """Return the total, with fp32 gradients, and Adam on fp32 weights divided over the data-parallel ranks."""
        return self.weights + self.trained * (4 + 12 / data_parallel) + self.step


def parameters(model: dict[str, int], case: dict[str, Any]) -> int:
    """Return the number of a model's weights on this rank: matrices are split over the TP ranks, norms are whole."""
    h, q, kv = _widths(model)
    layers = model["num_layers"] // case["pp"]
    matrices = layers * (h * (q + 2 * kv) + q * h + 3 * h * model["ffn_hidden_size"])
    matrices += case["vocabulary"] * h * (2 if case["pp"] == 1 else 1)
    return matrices // case["tp"] + (2 * layers + 1) * h


def activations(case: dict[str, Any]) -> int:
    """Return the bytes that the student keeps for the backward pass, 1/TP of them on each rank (sequence parallelism).

    Each layer keeps for each token: inputs, normalised values and outputs of two norms (6 h); queries before and after
    the rotation, keys and values repeated for them, and the attention's output twice (6 q); keys twice, values and a
    copy (4 kv); the halves of the MLP, their activation and product (4 f). The last norm follows.
    """
    student = case["student"]
    h, q, kv = _widths(student)
    layers = student["num_layers"] // case["pp"]
    elements = layers * (6 * h + 6 * q + 4 * kv + 4 * student["ffn_hidden_size"]) + 3 * h
    return _tokens(case) * elements * _width(case) // case["tp"]


def logits_and_loss(case: dict[str, Any], form: str, device: str = "cuda") -> int:
    """Return the peak of both models' logits and the loss, by the formulas of ``fused_logits: auto``.

    Args:
        case: the pair of models and its layout.
        form: `STOCK`, `CHUNKED` or `FUSED`.
        device: device that determines the size of chunks.
    """
    student, teacher = (case[who]["hidden_size"] for who in ("student", "teacher"))
    sizes = Sizes(_tokens(case), case["vocabulary"] // case["tp"], student, teacher, _width(case), case["tp"], device)
    return {STOCK: sizes.stock, CHUNKED: sizes.chunked, FUSED: sizes.fused}[form]()


def _widths(model: dict[str, int]) -> tuple[int, int, int]:
    channels = model["kv_channels"]
    return model["hidden_size"], model["num_attention_heads"] * channels, model["num_query_groups"] * channels


def _tokens(case: dict[str, Any]) -> int:
    return case["length"] * case["sequences"]


def _width(case: dict[str, Any]) -> int:
    return 4 if case["dtype"] == "float32" else 2


def memory(case: dict[str, Any], form: str, device: str = "cuda") -> Memory:
    """Return the memory of a step, computed by formula."""
    trained = parameters(case["student"], case)
    weights = (trained + parameters(case["teacher"], case)) * _width(case)
    return Memory(weights, trained, activations(case), logits_and_loss(case, form, device))


def at(pair: str, layout: tuple[int, int, int, int]) -> dict[str, Any]:
    """Return the case of a pair of models in a layout."""
    return {**PAIRS[pair], **dict(zip(("tp", "pp", "length", "sequences"), layout, strict=True))}


def check(pools: dict[str, Any], cases: dict[str, dict[str, Any]], small: str) -> list[dict[str, Any]]:
    """Compare the formula, the simulation and (for the small case) the allocator, for each case and form.

    Args:
        pools: rank pools (``test_code.support.ranks.RankPool``) with one rank each: "stock" and "ours".
        cases: cases by label.
        small: label of the case that runs on real tensors.
    """
    from benchmarks import _kd_memory_rank

    found = []
    for label, case in cases.items():
        for form, settings in SETTINGS.items():
            pool = pools["stock" if form == STOCK else "ours"]
            expected = memory(case, form, "cpu")
            simulated = pool.run(_kd_memory_rank.simulate, case, settings, timeout=1800.0)[0]
            row = {"case": label, "form": form, "formula": expected.step, "simulation": simulated["step"]}
            row["weights, formula / simulation"] = expected.weights / simulated["weights"]
            if label == small:
                row["allocator"] = pool.run(_kd_memory_rank.measured, case, settings, timeout=600.0)[0]
            row["deviation"] = expected.step / row.get("allocator", row["simulation"]) - 1.0
            found.append(row)
    return found


def rows() -> list[dict[str, Any]]:
    """Return the rows of the table that the formulas give."""
    found = []
    for pair, layouts in LAYOUTS.items():
        for layout in layouts:
            case = at(pair, layout)
            forms = {form: memory(case, form) for form in SETTINGS}
            found.append({"pair": pair, "layout": layout, **{form: vars(m) for form, m in forms.items()}})
            for name, data_parallel in (("total", 1), ("total, distributed optimizer", DATA_PARALLEL)):
                found[-1][name] = {form: m.total(data_parallel) for form, m in forms.items()}
    return found


def text(table: list[dict[str, Any]], checks: list[dict[str, Any]]) -> str:
    """Return both tables as Markdown, in GiB and MiB."""
    distributed = "total, distributed optimizer"
    lines = [
        f"GiB on one GPU of the last pipeline stage; {distributed}: divided over {DATA_PARALLEL} data-parallel ranks.",
        "",
        "| | TP | PP | s | b | weights | activations | logits and loss: stock | chunked | fused "
        f"| total: stock | chunked | fused | {distributed}: stock | chunked | fused |",
        "|---" * 16 + "|",
    ]
    for row in table:
        cells = [row["pair"], *map(str, row["layout"])]
        numbers = [row[STOCK]["weights"], row[STOCK]["activations"]]
        numbers += [row[form]["logits_and_loss"] for form in SETTINGS]
        numbers += [row[total][form] for total in ("total", distributed) for form in SETTINGS]
        lines.append("| " + " | ".join(cells + [f"{n / GIB:.1f}" for n in numbers]) + " |")
    lines += [
        "",
        "Memory of a step beyond weights, gradients and optimizer, in MiB, with the chunk sizes of a CPU:",
        "",
        "| | | formula | fake tensors | allocator | deviation of the formula | weights, formula / simulation |",
        "|---" * 7 + "|",
    ]
    for row in checks:
        sizes = [f"{row[key] / 2**20:.1f}" if key in row else "" for key in ("formula", "simulation", "allocator")]
        ratios = [f"{row['deviation']:+.1%}", f"{row['weights, formula / simulation']:.4f}"]
        lines.append("| " + " | ".join([row["case"], row["form"], *sizes, *ratios]) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Check the formulas, write the results and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="check the formulas only at a small size")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    from test_code.support.ranks import RankPool

    cases = {"small": SMALL, "small, TP=2": {**SMALL, "tp": 2}}
    if not args.quick:
        for pair, layouts in SIMULATED.items():
            for tp, pp, length, sequences in layouts:
                label = f"{pair}, TP={tp} PP={pp} s={length} b={sequences}"
                cases[label] = at(pair, (tp, pp, length, sequences))
    with tempfile.TemporaryDirectory() as temporary:
        logs = Path(temporary)
        pools = {"stock": RankPool(1, logs / "stock", {"NEMO_MODELOPT": "stock"}), "ours": RankPool(1, logs / "ours")}
        try:
            checks = check(pools, cases, "small")
        finally:
            for pool in pools.values():
                pool.close()
    table = rows()
    args.output.mkdir(parents=True, exist_ok=True)
    result = {**about(), "rows": table, "checks": checks}
    (args.output / "kd_memory.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.output / "kd_memory.md").write_text(f"{result['versions']}\n\n{text(table, checks)}")
    print(text(table, checks))
    return 0


if __name__ == "__main__":
    sys.exit(main())

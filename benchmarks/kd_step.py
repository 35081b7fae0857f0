"""Benchmark a whole distillation step on a CPU rank against stock: both forward passes, the loss, the backward pass.

Both sides use Megatron's GPT models, modelopt's hooks and Megatron's gradient buffers. Stock's subpackage runs in a
process of its own. The contestants take turns: each builds the same models from a seed and times several steps after a
first step that is not timed. Times are CPU seconds of one thread, best and worst of all steps. Memory is the peak of
what a step allocates beyond models and gradient buffers, counted by PyTorch's allocator, in units of one logits tensor.
The same run compares losses and gradients, and measures the step without any loss, which bounds the ratio.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks._measure import row, write


def _model(layers: int, hidden: int, heads: int) -> dict[str, int]:
    sizes = {"num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": 3 * hidden}
    return {**sizes, "num_attention_heads": heads, "num_query_groups": heads // 2}


MODELS = {"student": _model(4, 320, 8), "teacher": _model(8, 512, 8)}
SMALL = {"student": _model(2, 32, 4), "teacher": _model(2, 64, 4)}
SIZES: dict[str, dict[str, Any]] = {
    "full": {**MODELS, "sequences": 2, "length": 512, "vocabulary": 32000},
    "default": {**MODELS, "sequences": 2, "length": 256, "vocabulary": 32000},
    "quick": {**SMALL, "sequences": 2, "length": 64, "vocabulary": 4000},
}
STOCK, ALONE = "stock", "models without a loss"
# Settings of the DistillationConfig.
CONTESTANTS: dict[str, dict[str, Any]] = {
    STOCK: {},
    "chunked": {"fused_logits": "off"},
    "chunked in place": {"fused_logits": "off", "logit_kl_in_place": True},
    "fused": {"fused_logits": "on"},
    ALONE: {"fused_logits": "off"},
}
# Lower bounds.
TARGETS = {"time other / ours": 1.2, "peak other / ours": 2.8}


def measure(pools: dict[str, Any], case: dict[str, Any], rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Return the figures of each contestant.

    Args:
        pools: rank pools (``test_code.support.ranks.RankPool``) with one rank each: "stock" and "ours".
        case: one of `SIZES`.
        rounds: number of turns of each contestant.
        steps: number of timed steps in each turn.

    Raises:
        RuntimeError: If a contestant ran the other subpackage.
    """
    from benchmarks import _kd_step_rank

    found: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name, settings in CONTESTANTS.items():
            pool = pools["stock" if name == STOCK else "ours"]
            turn = pool.run(_kd_step_rank.steps, case, settings, steps, name == ALONE, timeout=1800.0)[0]
            if turn["package"] != ("stock" if name == STOCK else "ours"):
                raise RuntimeError(f"{name} ran the {turn['package']} subpackage.")
            first = found.setdefault(name, turn)
            if first is not turn:
                first["seconds"] += turn["seconds"]
    return {n: {**f, "worst": max(f["seconds"]), "seconds": min(f["seconds"])} for n, f in found.items()}


def compare(found: dict[str, dict[str, Any]], case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Compare each of our variants with stock, including the largest relative difference of a gradient."""
    logits = 4 * case["sequences"] * case["length"] * case["vocabulary"]
    expected = found[STOCK]["gradients"]
    rows = {}
    for name, figures in found.items():
        if name == STOCK:
            continue
        kept = ("seconds", "worst", "peak bytes", "loss")
        rows[name] = row(*({k: f[k] for k in kept} for f in (figures, found[STOCK])), logits)
        if name != ALONE:
            gradients = figures["gradients"]
            differences = [(gradients[n] - g).abs().max() / g.abs().max() for n, g in expected.items()]
            rows[name]["gradient difference"] = float(max(differences))
            rows[name]["loss difference"] = abs(figures["loss"] / found[STOCK]["loss"] - 1.0)
    return rows


def notes(rows: dict[str, dict[str, Any]]) -> str:
    """Return which targets are met, and what limits them, as Markdown."""
    alone = rows[ALONE]
    lines = [f"The models without any loss limit the speedup to {alone['time other / ours']:.2f}x."]
    for name, found in rows.items():
        if name == ALONE:
            continue
        verdicts = [
            f"{what} {found[key]:.2f}x (target {target}x: {'met' if found[key] >= target else 'missed'})"
            for (key, target), what in zip(TARGETS.items(), ("time", "memory"), strict=True)
        ]
        lines.append(f"{name}: {', '.join(verdicts)}; the loss differs by {found['loss difference']:.0e}.")
    lines.append(
        "L is the size of one logits tensor. Stock holds 7 L for its loss, in addition to both models' logits (2 L) "
        "and the student's activations. The chunked variants hold both logits tensors and write the gradient into one "
        "of them (the teacher's, or in place into the student's), so their peaks are equal. The fused variant holds "
        "neither; its peak consists of chunks, the output weight's gradient and the activations, which no variant can "
        "avoid. In all variants, most of the time is spent in the models' matrix products."
    )
    return "\n".join(f"- {line}" for line in lines)


def main() -> int:
    """Run the benchmark, write its results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="default")
    parser.add_argument("--rounds", type=int, default=3, help="number of turns of each contestant")
    parser.add_argument("--steps", type=int, default=3, help="number of timed steps in each turn")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    from test_code.support.ranks import RankPool

    with tempfile.TemporaryDirectory() as temporary:
        logs = Path(temporary)
        pools = {"stock": RankPool(1, logs / "stock", {"NEMO_MODELOPT": "stock"}), "ours": RankPool(1, logs / "ours")}
        try:
            found = measure(pools, SIZES[args.size], args.rounds, args.steps)
        finally:
            for pool in pools.values():
                pool.close()
    rows = compare(found, SIZES[args.size])
    print(write("kd_step", rows, args.output, notes(rows), {"case": SIZES[args.size], "targets": TARGETS}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

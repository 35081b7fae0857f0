"""A whole distillation step, stock against ours in one run: both forward passes, the loss, backward; on a CPU rank.

Megatron's GPT models, modelopt's hooks and Megatron's gradient buffers are the real ones in both. Stock's subpackage
runs in a process of its own. Jobs of the contestants alternate, each builds the same models from a seed and times some
steps after one that is not timed; CPU seconds of one thread, best and worst of all. Memory is the peak of what a step
allocates beyond models and gradient buffers, counted by PyTorch's allocator, in units of one logits tensor. The same
run shows that losses and gradients agree, and what the step would take without any loss, which bounds the ratio.
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
# Of the DistillationConfig.
CONTESTANTS: dict[str, dict[str, Any]] = {
    STOCK: {},
    "chunked": {"fused_logits": "off"},
    "chunked in place": {"fused_logits": "off", "logit_kl_in_place": True},
    "fused": {"fused_logits": "on"},
    ALONE: {"fused_logits": "off"},
}
# At least these.
TARGETS = {"time other / ours": 1.2, "peak other / ours": 2.8}


def measure(pools: dict[str, Any], case: dict[str, Any], rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Return the figures of each contestant.

    Args:
        pools: "stock" and "ours": ``test_code.support.ranks.RankPool`` of one rank.
        case: one of `SIZES`.
        rounds: how often the contestants take turns.
        steps: timed in each turn.
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
    """Return a row for each of ours against stock, with the largest relative difference of a weight's gradient."""
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
    """Return which targets are met, and what bounds them."""
    alone = rows[ALONE]
    lines = [f"The models without any loss bound the time: {alone['time other / ours']:.2f}x faster than stock."]
    for name, found in rows.items():
        if name == ALONE:
            continue
        verdicts = [
            f"{what} {found[key]:.2f}x (target {target}x: {'met' if found[key] >= target else 'missed'})"
            for (key, target), what in zip(TARGETS.items(), ("time", "memory"), strict=True)
        ]
        lines.append(f"{name}: {', '.join(verdicts)}; the loss differs by {found['loss difference']:.0e}.")
    lines.append(
        "L: one logits tensor. Stock holds 7 L for its loss beside both models' logits (2 L) and the student's "
        "activations. Chunked and in place hold the two logits, one of which takes the gradient (the teacher's, the "
        "student's): equal peaks. Fused holds neither: chunks, the output weight's gradient and the activations, "
        "which none of them can save, are its peak. The models' matrix products are most of the time in all of them."
    )
    return "\n".join(f"- {line}" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="default")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn")
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

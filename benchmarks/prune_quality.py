"""Benchmark pruning on real text: importance against random scores, and distillation against training from scratch.

For each seed, a small Llama-style teacher is trained on Python's help texts (the demo's corpus) and pruned to half of
its body: once by importance, and several times to the same shape with random scores. The student that was pruned by
importance is then distilled, and a model of the same shape is trained from random weights on the same samples for the
same number of steps. All losses are held-out losses in nats per token, measured on saved checkpoints. Everything runs
in one CPU process.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from nemo_modelopt_cli.compress.settings import Job, Layout, Pruning, Training
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
# Half of the parameters (45% of the body), in width only: with depth, the random choice of layers would dominate.
PRUNING = Pruning(
    target_hidden_size=96,
    target_ffn_hidden_size=200,
    target_num_attention_heads=2,
    target_num_query_groups=2,
    num_samples=128,
    micro_batch_size=16,
)
LAYOUT = Layout(cpu=True)


def training_run(steps: int, lr: float, seed: int, every: int) -> Training:
    """Return the settings of a training whose warm-up is a tenth of its steps."""
    return Training(
        steps=steps,
        global_batch_size=16,
        micro_batch_size=16,
        lr=lr,
        min_lr=lr / 20,
        warmup_steps=max(1, steps // 10),
        seed=seed,
        evaluate_every=every,
    )


def prune_at_random(teacher: Path, target: Path, seed: int) -> None:
    """Prune a checkpoint to the benchmark's shape with random scores instead of the measured importance."""
    import torch
    from megatron.core import parallel_state

    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec
    from nemo.collections.llm.modelopt.prune import _norms, _search, pruner
    from nemo_modelopt_cli.compress import training
    from nemo_modelopt_cli.compress.settings import TARGETS

    training.release()
    model, run = setup_trainer_and_restore_model_with_modelopt_spec(
        str(teacher), inference_only=True, strategy_kwargs={"sequence_parallel": False, "replace_progress_bar": False}
    )
    generator = torch.Generator().manual_seed(seed)
    core: Any = pruner._state.find_core(model)
    config = core.config
    channels = config.num_attention_heads * config.kv_channels
    activations: dict[str, Any] = {"": {0: torch.rand(config.hidden_size, generator=generator)}}
    for index in range(len(core.decoder.layers)):
        activations[f"decoder.layers.{index}.self_attention"] = torch.rand(channels, generator=generator)
        activations[f"decoder.layers.{index}.mlp"] = torch.rand(config.ffn_hidden_size, generator=generator)
    known = {
        "activations_per_rank": [activations] * parallel_state.get_pipeline_model_parallel_world_size(),
        "layer_scores": {layer.layer_number: 1.0 for layer in core.decoder.layers},
    }
    sizes = {name.removeprefix("target_"): getattr(PRUNING, name) for name in TARGETS}
    _norms.register_torch_norms()
    targets = {name: size for name, size in sizes.items() if size is not None}
    _search.prune_by_importance(core, targets, pruner._minitron, lambda _: None, known=known)
    pruner.save_pruned_model(run, str(target))
    training.release()


def one_seed(root: Path, seed: int, steps: tuple[int, int], draws: int) -> dict[str, Any]:
    """Train, prune, distill and measure with one seed; return all losses."""
    import torch

    from nemo_modelopt_cli.compress import corpus, jobs

    folders = {name: root / f"{name}-{seed}" for name in ("teacher", "importance", "distill", "scratch")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    teacher = folders["teacher"] / "checkpoint"
    pretraining = training_run(steps[0], 3e-3, seed, 0)
    corpus.pretrain(
        folders["teacher"],
        root / "corpus",
        {**TEACHER, "vocab_size": VOCABULARY},
        pretraining,
        LAYOUT,
        SEQ_LENGTH,
        sys.stderr,
    )
    job = Job(
        teacher=str(teacher),
        train_text=str(root / "corpus" / "train.jsonl"),
        heldout_text=str(root / "corpus" / "heldout.jsonl"),
        seq_length=SEQ_LENGTH,
        layout=LAYOUT,
        pruning=PRUNING,
        distillation=training_run(steps[1], 2e-3, seed, max(1, steps[1] // 8)),
    )
    tokens = folders["teacher"]
    before = jobs.measure(teacher, tokens, job)
    pruned = jobs.prune(folders["importance"], job, tokens)
    drawn = []
    for draw in range(draws):
        torch.manual_seed(seed)
        prune_at_random(teacher, root / f"random-{seed}-{draw}", 1000 * seed + draw)
        drawn.append(jobs.measure(root / f"random-{seed}-{draw}", tokens, job)["heldout_loss"])
    student = folders["importance"] / "checkpoint"
    distilled = jobs.distill(folders["distill"], job, student, tokens, sys.stderr)
    scratch = jobs.from_scratch(folders["scratch"], job, student, tokens, sys.stderr)
    per_step = job.distillation.global_batch_size * SEQ_LENGTH
    curves = {
        name: [{"tokens": p["step"] * per_step, "loss": p["heldout"]} for p in found["curve"] if "heldout" in p]
        for name, found in (("distilled", distilled), ("scratch", scratch))
    }
    return {
        "seed": seed,
        "body share": pruned["body_parameters"] / before["body_parameters"],
        "parameter share": pruned["parameters"] / before["parameters"],
        "teacher": before["heldout_loss"],
        "importance": pruned["heldout_loss"],
        "random": drawn,
        "distilled": distilled["heldout_loss"],
        "scratch": scratch["heldout_loss"],
        "curves": {**curves, "distilled": [{"tokens": 0, "loss": pruned["heldout_loss"]}, *curves["distilled"]]},
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the margins and their spread over the seeds."""
    margins = {
        "random - importance": [statistics.mean(row["random"]) - row["importance"] for row in rows],
        "best random - importance": [min(row["random"]) - row["importance"] for row in rows],
        "scratch - distilled": [row["scratch"] - row["distilled"] for row in rows],
        "recovered share of the loss": [
            (row["importance"] - row["distilled"]) / (row["importance"] - row["teacher"]) for row in rows
        ],
    }
    return {
        name: {
            "mean": statistics.mean(values),
            "standard deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
            "least": min(values),
        }
        for name, values in margins.items()
    }


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot held-out loss over training tokens: distillation, training from scratch, and the teacher as a line."""
    import altair as alt

    from nemo_modelopt_dropin.report import charts

    values = [
        {"model": name, "seed": row["seed"], **point}
        for row in rows
        for name, curve in row["curves"].items()
        for point in curve
    ]
    lines = (
        alt.Chart(alt.Data(values=values))
        .mark_line(point=True)
        .encode(
            x=alt.X("tokens:Q", title="training tokens"),
            y=alt.Y("loss:Q", title="held-out nats per token", scale=alt.Scale(zero=False)),
            color="model:N",
            detail="seed:N",
        )
    )
    teacher = alt.Chart(alt.Data(values=[{"loss": row["teacher"], "model": "teacher"} for row in rows])).mark_rule(
        strokeDash=[4, 3]
    )
    chart = lines + teacher.encode(y="loss:Q", color="model:N")
    path.write_bytes(charts.png(charts.specification(chart)))


def main() -> int:
    """Run all seeds; return 0 if the claims hold for each of them, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--teacher-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=160, help="steps of distillation and of training from scratch")
    parser.add_argument("--draws", type=int, default=3, help="number of random prunings of each teacher")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "prune_quality.json")
    arguments = parser.parse_args()
    start_on_cpu()
    import torch

    from nemo_modelopt_cli.compress import corpus, heldout

    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="prune-quality-"))
    (root / "corpus").mkdir()
    corpus.make(root / "corpus", VOCABULARY)
    run = partial(one_seed, root, steps=(arguments.teacher_steps, arguments.steps), draws=arguments.draws)
    rows = []
    for seed in arguments.seeds:
        rows.append(run(seed))
        print(json.dumps({name: value for name, value in rows[-1].items() if name != "curves"}), flush=True)
    result = {
        "machine": f"{heldout.device_name()}, {platform.machine()}, one CPU thread",
        "teacher": {**TEACHER, "vocab_size": VOCABULARY, "steps": arguments.teacher_steps},
        "steps": arguments.steps,
        "seeds": rows,
        "summary": summary(rows),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    figure(rows, arguments.output.with_suffix(".png"))
    shutil.rmtree(root)
    for name, numbers in result["summary"].items():
        print(f"{name:32}" + "".join(f"{key}: {value:8.4f}  " for key, value in numbers.items()))
    held = all(result["summary"][name]["least"] > 0 for name in ("best random - importance", "scratch - distilled"))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())

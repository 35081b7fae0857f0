"""Logits KL, stock against ours in one process: time and memory kept for the backward pass, forward + backward, TP=1.

Stock's loss module is loaded from nemo-toolkit under another name. Times are interleaved, best of n, on one thread;
memory is the exact sum of what autograd and the functions keep alive between forward and backward, in units of one
logits tensor. The same run shows that the gradients agree.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sys
import sysconfig
import time
import types
from pathlib import Path

import torch

STOCK = Path(sysconfig.get_paths()["purelib"]) / "nemo/collections/llm/modelopt/distill/loss.py"
# [s, b, v], dtype
SHAPES = {
    "512 x 2 x 32000 fp32": ((512, 2, 32000), torch.float32),
    "512 x 2 x 32000 bf16": ((512, 2, 32000), torch.bfloat16),
    "256 x 1 x 128256 fp32": ((256, 1, 128256), torch.float32),
    "256 x 1 x 128256 bf16": ((256, 1, 128256), torch.bfloat16),
}
QUICK = {
    "64 x 2 x 8000 fp32": ((64, 2, 8000), torch.float32),
    "64 x 2 x 8000 bf16": ((64, 2, 8000), torch.bfloat16),
}


def stock_loss_class():
    spec = importlib.util.spec_from_file_location("stock_distill_loss", STOCK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LogitsKLLoss


def step(loss, student, teacher):
    """Return seconds of forward + backward, bytes kept in between, and the gradient."""
    student.grad = None
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(student, teacher)[0]
    # What a function keeps on its context, as ours keeps its gradient.
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        buffer = getattr(node, "gradient", None)
        if isinstance(buffer, torch.Tensor):
            kept[buffer.untyped_storage().data_ptr()] = buffer.untyped_storage().nbytes()
        nodes.extend(following for following, _ in node.next_functions)
    value.mean().backward()
    seconds = time.perf_counter() - start
    for given in (student, teacher):  # they exist anyway
        kept.pop(given.untyped_storage().data_ptr(), None)
    return seconds, sum(kept.values()), student.grad.clone()


def compare(shape, dtype, losses, repeats):
    generator = torch.Generator().manual_seed(0)
    student = (3 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    teacher = (3 * torch.randn(shape, generator=generator)).to(dtype)
    times = {name: [] for name in losses}
    kept, grads = {}, {}
    for _ in range(repeats):
        for name, loss in losses.items():
            seconds, kept[name], grads[name] = step(loss, student, teacher)
            times[name].append(seconds)
    size = student.numel() * student.element_size()
    scale = grads["stock"].float().abs().max()
    return {
        "seconds": {name: {"best": min(values), "worst": max(values)} for name, values in times.items()},
        "time stock / ours": min(times["stock"]) / min(times["ours"]),
        "kept in units of the logits": {name: value / size for name, value in kept.items()},
        "kept stock / ours": kept["stock"] / kept["ours"],
        "largest relative gradient difference": float(
            (grads["stock"].float() - grads["ours"].float()).abs().max() / scale
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "kd_loss.json")
    args = parser.parse_args()
    torch.set_num_threads(1)

    from nemo.collections.llm.modelopt.distill.loss import LogitsKLLoss

    config = types.SimpleNamespace(tensor_model_parallel_size=1)
    losses = {"stock": stock_loss_class()(config), "ours": LogitsKLLoss(config)}
    rows = {
        name: compare(shape, dtype, losses, args.repeats)
        for name, (shape, dtype) in (QUICK if args.quick else SHAPES).items()
    }
    packages = ("torch", "nemo-toolkit", "megatron-core", "nvidia-modelopt")
    result = {
        "machine": f"{platform.machine()}, one CPU thread",
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    titles = ("stock s", "ours s", "ratio", "stock L", "ours L", "ratio", "grad diff")
    print(f"{'[s, b, v]':24}" + "".join(f"{title:>10}" for title in titles))
    for name, row in rows.items():
        seconds, kept = row["seconds"], row["kept in units of the logits"]
        print(
            f"{name:24}{seconds['stock']['best']:10.3f}{seconds['ours']['best']:10.3f}{row['time stock / ours']:10.2f}"
            f"{kept['stock']:10.2f}{kept['ours']:10.2f}{row['kept stock / ours']:10.2f}"
            f"{row['largest relative gradient difference']:10.1e}"
        )


if __name__ == "__main__":
    sys.exit(main())

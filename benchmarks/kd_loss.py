"""Benchmark the losses on logits against stock: forward and backward pass at TP=1 and TP=2, on CPU ranks.

Stock's loss module is loaded from nemo-toolkit under another name. Times are CPU seconds of one rank with one thread;
the contestants take turns, and best and worst are reported. Memory is the peak of what a step allocates in addition to
its inputs, counted by PyTorch's allocator, in units of one logits tensor in its own dtype. The same run compares the
gradients. The results are a JSON file, a table and a plot in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import socket
import sys
import sysconfig
import time
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks._measure import peak_bytes, row, write

STOCK = Path(sysconfig.get_paths()["purelib"]) / "nemo/collections/llm/modelopt/distill/loss.py"
FP32, BF16 = torch.float32, torch.bfloat16
# Shapes [s, b, v] over all ranks, and the dtype.
SIZES = {
    "full": [((512, 2, 32000), FP32), ((512, 2, 32000), BF16), ((256, 1, 128256), FP32), ((1024, 1, 151936), BF16)],
    "default": [((32, 2, 32000), FP32), ((32, 2, 32000), BF16), ((256, 2, 32000), FP32), ((256, 1, 128256), BF16)],
    "quick": [((16, 2, 8000), FP32), ((16, 2, 8000), BF16)],
}
# Shapes [n, v, h of the student, h of the teacher], for the losses that include the output layers.
LINEAR = {
    "full": [((1024, 128256, 512, 1024), BF16)],
    "default": [((256, 32000, 256, 512), FP32), ((1024, 32000, 64, 128), BF16)],
    "quick": [((64, 8000, 64, 64), FP32)],
}
TOPK = 100
# For --peers: shapes [n, v] and dtype, and [n, v, h of the student, h of the teacher] with the output layers.
PEERS = {
    "full": [((1024, 32000), FP32), ((1024, 32000), BF16), ((256, 128256), FP32), ((256, 128256), BF16)],
    "default": [((512, 32000), FP32), ((512, 32000), BF16), ((256, 128256), BF16)],
    "quick": [((64, 8000), FP32), ((64, 8000), BF16)],
}
PEERS_LINEAR = {
    "full": [((1024, 32000, 512, 512), FP32), ((1024, 32000, 1024, 1024), FP32), ((512, 32000, 2048, 2048), FP32)],
    "default": [((512, 32000, 512, 512), FP32), ((512, 32000, 1024, 1024), FP32)],
    "quick": [((64, 8000, 64, 64), FP32)],
}


def stock_loss_class():
    """Return stock's loss class, loaded from the installed nemo-toolkit."""
    spec = importlib.util.spec_from_file_location("stock_distill_loss", STOCK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LogitsKLLoss


def naive_topk(student, teacher):
    """Compute the top-k divergence naively: all log-probabilities first, then the selected entries."""
    log_p, log_q = (torch.log_softmax(x.float(), -1) for x in (student, teacher))
    kept, positions = log_q.topk(TOPK, -1)
    picked = log_p.gather(-1, positions)
    tails = [(1 - x.exp().sum(-1)).clamp(min=1e-9).log() for x in (kept, picked)]
    value = (kept.exp() * (kept - picked)).sum(-1) + tails[0].exp() * (tails[0] - tails[1])
    return value.transpose(0, 1)


class _Logits(torch.autograd.Function):
    """Replace an output layer: pass the logits on, and store their gradient the first time only."""

    @staticmethod
    def forward(ctx, anchor, logits, name, gradients):
        ctx.name, ctx.gradients = name, gradients
        return logits.detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.gradients.setdefault(ctx.name, None)
        if ctx.gradients[ctx.name] is None:
            ctx.gradients[ctx.name] = gradient.to(torch.float32, copy=True)
        return torch.zeros(1), None, None, None


def prepare(step):
    """Run the preparation of a step that has one."""
    if getattr(step, "prepare", None):
        step.prepare()


def measure(contestants, repeats):
    """Run the contestants in turn and return their figures by name.

    A first step of each is not timed. The figures are ``seconds`` (best), ``worst`` and ``peak bytes``.
    """
    times = {name: [] for name in contestants}
    peaks = {}
    for name, step in contestants.items():
        prepare(step)
        step()
        prepare(step)
        peaks[name] = peak_bytes(step)
    for _ in range(repeats):
        for name, step in contestants.items():
            prepare(step)
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    return {n: {"seconds": min(t), "worst": max(t), "peak bytes": peaks[n]} for n, t in times.items()}


def compare_logits(shape, dtype, config, repeats):
    """Compare all losses on logits at one size; a step is the forward and backward pass of the mean loss."""
    from nemo.collections.llm.modelopt.distill.loss import LogitsKLLoss

    tp = config.tensor_model_parallel_size
    shape = (*shape[:2], shape[2] // tp)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank() if tp > 1 else 0)
    student, teacher = ((3 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2))
    stock_class, scratch = stock_loss_class(), student.clone()
    gradients = {}

    def step(name, loss, in_place=False):
        def run():
            logits = scratch if in_place else student
            result = loss(_Logits.apply(torch.zeros(1, requires_grad=True), logits, name, gradients), teacher)
            (result[0] if isinstance(result, tuple) else result).mean().backward()

        run.prepare = (lambda: scratch.copy_(student)) if in_place else None
        return run

    contestants = {
        "stock forward": step("stock forward", stock_class(config)),
        "stock reverse": step("stock reverse", stock_class(config, reverse=True)),
        "forward": step("forward", LogitsKLLoss(config)),
        "forward in place": step("forward in place", LogitsKLLoss(config, in_place=True), in_place=True),
        "reverse": step("reverse", LogitsKLLoss(config, reverse=True)),
        "jsd": step("jsd", LogitsKLLoss(config, direction="jsd")),
        "topk": step("topk", LogitsKLLoss(config, topk=TOPK)),
    }
    if tp == 1:
        contestants["naive topk"] = step("naive topk", naive_topk)
    result = measure(contestants, repeats)
    logits = student.numel() * student.element_size()
    against = {"forward": "stock forward", "forward in place": "stock forward", "reverse": "stock reverse"}
    against["topk"] = "naive topk" if tp == 1 else None
    rows = {}
    for name in ("forward", "forward in place", "reverse", "jsd", "topk"):
        other = against.get(name)
        rows[name] = row(result[name], result.get(other), logits)
        if other in gradients and name in gradients:
            scale = gradients[other].abs().max()
            rows[name]["gradient difference"] = float((gradients[other] - gradients[name]).abs().max() / scale)
    return rows


def compare_linear(shape, dtype, config, repeats):
    """Compare output layers with forward KL: stock, ours on logits, ours fused, and the matrix products alone."""
    from nemo.collections.llm.modelopt._divergence.fused_linear import Objective, fused_linear_losses
    from nemo.collections.llm.modelopt.distill.loss import LogitsKLLoss

    n, v, h, h_teacher = shape
    generator = torch.Generator().manual_seed(0)
    hidden, weight, hidden_teacher, weight_teacher = (
        torch.randn(size, generator=generator).mul_(scale).to(dtype)
        for size, scale in (((n, h), 1.0), ((v, h), h**-0.5), ((n, h_teacher), 1.0), ((v, h_teacher), h_teacher**-0.5))
    )
    hidden.requires_grad_()
    weight.requires_grad_()
    ones, gradients = torch.ones(n), {}

    def unfused(name, loss):
        def run():
            hidden.grad = weight.grad = None
            teacher = (hidden_teacher @ weight_teacher.t()).view(n, 1, v)
            loss((hidden @ weight.t()).view(n, 1, v), teacher)[0].mean().backward()
            gradients[name] = weight.grad.float()

        return run

    def fused():
        hidden.grad = weight.grad = None
        losses = fused_linear_losses(hidden, weight, hidden_teacher, weight_teacher, ones, Objective())
        (losses.divergence / n).backward()
        gradients["fused"] = weight.grad.float()

    @torch.no_grad()
    def products():
        logits = hidden @ weight.t()
        hidden_teacher @ weight_teacher.t()
        logits @ weight
        logits.t() @ hidden

    result = measure(
        {
            "stock": unfused("stock", stock_loss_class()(config)),
            "chunked": unfused("chunked", LogitsKLLoss(config)),
            "fused": fused,
            "products": products,
        },
        repeats,
    )
    logits = n * v * hidden.element_size()
    found = row(result["fused"], result["stock"], logits)
    scale = gradients["stock"].abs().max()
    found["gradient difference"] = float((gradients["stock"] - gradients["fused"]).abs().max() / scale)
    found["time fused / matrix products alone"] = result["fused"]["seconds"] / result["products"]["seconds"]
    rows = {"fused with the output layers": found}
    rows["chunked with the output layers"] = row(result["chunked"], result["stock"], logits)
    return rows


def compare_peers(shape, dtype, config, repeats):
    """Compare the losses on logits with those of other projects: the fastest and the leanest of them, and each."""
    from benchmarks import _kd_peers as peers
    from nemo.collections.llm.modelopt._divergence.vocab_parallel import default_chunk_rows, kl_divergence

    student, teacher = ((3 * torch.randn(shape, generator=torch.Generator().manual_seed(i))).to(dtype) for i in (0, 1))
    scratch, gradients = teacher.clone(), {}

    def step(name, loss, reuse=False):
        def run():
            logits = _Logits.apply(torch.zeros(1, requires_grad=True), student, name, gradients)
            loss(logits, scratch if reuse else teacher).mean().backward()

        run.prepare = (lambda: scratch.copy_(teacher)) if reuse else None
        return run

    def ours(**options):
        return lambda z, y: kl_divergence(z, y, **options)

    stock, (kl, jsd, _) = stock_loss_class()(config), peers.losses()
    kl["stock"] = lambda z, y: stock(z.unsqueeze(1), y.unsqueeze(1))[0]
    mine = {
        "forward": ours(),
        "forward in a training step": ours(reuse_teacher=True),
        "topk in a training step": ours(topk=TOPK, reuse_teacher=True),
        "jsd": ours(direction="jsd"),
    }
    steps = {name: step(name, loss, "training" in name) for name, loss in (mine | kl | jsd).items()}
    # No other project has a top-k divergence with the rest as one entry.
    steps["naive topk"] = step("naive topk", lambda z, y: naive_topk(z.unsqueeze(1), y.unsqueeze(1)))
    out = torch.empty_like(student)
    rows_of_chunk = default_chunk_rows(student)
    steps["floor"] = lambda: peers.floor(student, teacher, out, rows_of_chunk)
    steps["topk floor"] = lambda: peers.floor(student, teacher, out, rows_of_chunk, TOPK)
    result, unit = measure(steps, repeats), student.numel() * student.element_size()
    rivals = dict.fromkeys(mine, kl) | {"topk in a training step": ["naive topk"], "jsd": jsd}
    rows = {}
    for name in mine:
        for other in rivals[name]:
            rows[f"{name} / {other}"] = found = row(result[name], result[other], unit)
            scale = gradients[other].abs().max()
            found["gradient difference"] = float((gradients[other] - gradients[name]).abs().max() / scale)
    bounds = {"forward": ("floor", "two softmaxes"), "topk": ("topk floor", "selection, two softmaxes")}
    for name, (bound, text) in bounds.items():
        found = row(result[f"{name} in a training step"], result[bound], unit)
        rows[f"{name} in a training step / {text} and a write"] = found
    return rows


def compare_peers_linear(shape, dtype, repeats):
    """Compare the losses fused with the output layers with Liger's, for the forward KL and the JSD."""
    from benchmarks import _kd_peers as peers
    from nemo.collections.llm.modelopt._divergence.fused_linear import Objective, fused_linear_losses

    n, v, h, h_teacher = shape
    generator = torch.Generator().manual_seed(0)
    hidden, weight, hidden_teacher, weight_teacher = (
        torch.randn(size, generator=generator).mul_(scale).to(dtype)
        for size, scale in (((n, h), 1.0), ((v, h), h**-0.5), ((n, h_teacher), 1.0), ((v, h_teacher), h_teacher**-0.5))
    )
    hidden.requires_grad_()
    weight.requires_grad_()
    ones, labels, gradients = torch.ones(n), torch.zeros(n, dtype=torch.long), {}

    def step(name, loss):
        def run():
            hidden.grad = weight.grad = None
            loss().backward()
            gradients[name] = weight.grad

        return run

    def ours(objective):
        inputs = hidden, weight, hidden_teacher, weight_teacher, ones
        return lambda: fused_linear_losses(*inputs, objective).divergence / n

    @torch.no_grad()
    def products():
        logits = hidden @ weight.t()
        hidden_teacher @ weight_teacher.t()
        logits @ weight
        logits.t() @ hidden

    steps, pairs = {"products": products}, {}
    for beta, objective in ((0.0, Objective()), (0.5, Objective(direction="jsd"))):
        mine, liger = f"fused {objective.direction}", peers.liger(beta)
        steps[mine] = step(mine, ours(objective))
        if liger is not None:
            pairs[mine] = f"Liger at beta {beta:g}"
            steps[pairs[mine]] = step(
                pairs[mine], lambda loss=liger: loss(hidden, weight, hidden_teacher, weight_teacher, labels)
            )
    result, unit, rows = measure(steps, repeats), n * v * hidden.element_size(), {}
    for mine, other in pairs.items():
        rows[f"{mine} / {other}"] = found = row(result[mine], result[other], unit)
        found["gradient difference"] = float(
            (gradients[mine] - gradients[other]).abs().max() / gradients[other].abs().max()
        )
    rows["fused forward / matrix products alone"] = row(result["fused forward"], result["products"], unit)
    return rows


def run_peers(size, repeats):
    """Return the rows of the comparison with other projects, and a note on those that are missing."""
    from benchmarks import _kd_peers as peers
    from nemo_modelopt_dropin import cpu_backend

    torch.set_num_threads(1)
    cpu_backend.enable()
    config = types.SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False)
    rows = {}
    for shape, dtype in PEERS[size]:
        label = f"{' x '.join(map(str, shape))} {str(dtype)[6:]}"
        rows |= {f"{label}: {name}": found for name, found in compare_peers(shape, dtype, config, repeats).items()}
    for shape, dtype in PEERS_LINEAR[size]:
        label = f"n={shape[0]} v={shape[1]} h={shape[2]} {str(dtype)[6:]}"
        rows |= {f"{label}: {name}": found for name, found in compare_peers_linear(shape, dtype, repeats).items()}
    missing = [*peers.losses()[2], *(["liger-kernel"] if peers.liger(0.0) is None else [])]
    return rows, peers.NOTES + (f" Not installed: {', '.join(missing)}." if missing else "")


def on_rank(rank, tp, port, size, repeats, pipe):
    """Run the measurements on one rank; rank zero sends its rows."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(tp))
    torch.set_num_threads(1)
    from megatron.core import parallel_state

    from nemo_modelopt_dropin import cpu_backend

    cpu_backend.enable()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=tp)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    config = types.SimpleNamespace(tensor_model_parallel_size=tp, sequence_parallel=False)
    rows = {}
    for shape, dtype in SIZES[size]:
        label = f"{' x '.join(map(str, shape))} {str(dtype)[6:]}, TP={tp}"
        rows |= {f"{label}: {name}": found for name, found in compare_logits(shape, dtype, config, repeats).items()}
    for shape, dtype in LINEAR[size] if tp == 1 else ():
        label = f"n={shape[0]} v={shape[1]} h={shape[2]} and {shape[3]} {str(dtype)[6:]}"
        rows |= {f"{label}: {name}": found for name, found in compare_linear(shape, dtype, config, repeats).items()}
    if rank == 0:
        pipe.send(rows)


def run_ranks(tp, size, repeats):
    """Start the ranks and return the rows of rank zero."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    ranks = [context.Process(target=on_rank, args=(r, tp, port, size, repeats, sender)) for r in range(tp)]
    for process in ranks:
        process.start()
    sender.close()
    rows = receiver.recv()
    for process in ranks:
        process.join()
    return rows


def main():
    """Run the benchmark, write its results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--size",
        choices=sorted(SIZES),
        default="default",
        help="sizes to measure; full needs 8 GB per rank (default: default)",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--peers",
        action="store_true",
        help="compare with torchtune, TRL, Liger and torch.compile instead, those that are installed",
    )
    args = parser.parse_args()
    if args.peers:
        rows, note = run_peers(args.size, args.repeats)
        print(write("kd_loss_peers", rows, args.output, note, other="other"))
        return
    rows = {}
    for tp in args.tp:
        rows |= run_ranks(tp, args.size, args.repeats)
    print(write("kd_loss", rows, args.output))


if __name__ == "__main__":
    sys.exit(main())

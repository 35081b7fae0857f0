"""What ranks execute for the distillation tests. Runs with the stock subpackage as well as with ours."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from nemo.collections import llm

from test_code import ranks, tiny


class Metrics(pl.Callback):
    """Keep what a trainer logs in every step, and the validation losses."""

    def __init__(self):
        self.steps: list[dict[str, float]] = []
        self.val_losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # The model's own hook comes after the callbacks': these are the metrics of the step before.
        if self.steps or batch_idx:
            self.steps.append(self._logged(trainer))

    def on_train_end(self, trainer, pl_module):
        self.steps.append(self._logged(trainer))

    def on_validation_end(self, trainer, pl_module):
        self.val_losses.append(float(trainer.callback_metrics["val_loss"]))

    @staticmethod
    def _logged(trainer):
        return {name: float(value) for name, value in trainer.callback_metrics.items()}


@contextlib.contextmanager
def alone():
    """Let each rank of a pool be a group of its own, to run single-rank layouts without another pool."""
    kept = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    port = int(kept["MASTER_PORT"]) + 250 + 50 * int(kept["RANK"])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_PORT=str(port))
    try:
        yield
        ranks.reset()
    finally:
        os.environ.update(kept)


def teacher(path: str, after_fit: bool = False, **overrides) -> str:
    """Train a teacher for two steps on one rank and save it, inside of ``fit`` or after it."""
    model = tiny.model(**overrides)
    if not after_fit:
        tiny.fit(model, save_to=path, max_steps=2)
        return path
    trainer = tiny.trainer(max_steps=2)
    torch.manual_seed(1234)
    trainer.fit(model, tiny.data())
    tiny.save(trainer, path)
    return path


def distillation_model(teacher_path, settings=None, student=None, teacher_overrides=None):
    """Return an unconfigured `DistillationGPTModel`: half as wide an MLP as the teacher's."""
    from nemo.collections.llm.modelopt import DistillationGPTModel

    return DistillationGPTModel(
        tiny.config(**{"ffn_hidden_size": 64, **(student or {})}),
        tiny.config(**(teacher_overrides or {})),
        teacher_path,
        settings,
        optim=tiny.optim(),
        tokenizer=tiny.tokenizer(),
    )


def distill(
    teacher_path, settings=None, student=None, steps=4, data=None, teacher_overrides=None, metrics=False, **layout
):
    """Distil and return the loss of each step, or with ``metrics`` everything logged and the validation losses."""
    model = distillation_model(teacher_path, settings, student, teacher_overrides)
    recorder = Metrics()
    losses = tiny.fit(model, tiny.data(**(data or {})), max_steps=steps, callbacks=[recorder], **layout)
    return (losses, recorder.steps, recorder.val_losses) if metrics else losses


def distill_everywhere(teacher_path, settings_path, student=None, data=None):
    """Distil in one job on one rank, with TP=2 and with PP=2 (a pool of two), and return the losses by layout."""
    results = {}
    for name, settings in (("logits", None), ("pair", settings_path)):
        with alone():
            results["1 rank", name] = distill(teacher_path, settings, student, data=data)
        for layout, arguments in (
            ("TP=2", {"tp": 2}),
            ("TP=2 SP", {"tp": 2, "sp": True}),
            ("PP=2", {"pp": 2}),
        ):
            results[layout, name] = distill(teacher_path, settings, student, data=data, **arguments)
            ranks.reset()
    return results


def which_subpackage() -> str:
    import nemo.collections.llm.modelopt as subpackage

    return str(Path(subpackage.__file__).parent)


# --- losses over a split vocabulary ---


def reference_kl(student, teacher, temperature, direction, weights):
    """Return value [...] and gradient [..., v] in fp64 by plain PyTorch, of the sum weighed by ``weights``."""
    leaf = student.detach().double().requires_grad_()
    log_p = torch.log_softmax(leaf / temperature, -1)
    log_q = torch.log_softmax(teacher.double() / temperature, -1)
    first, second = (log_q, log_p) if direction == "forward" else (log_p, log_q)
    value = (first.exp() * (first - second)).sum(-1)
    (value * weights.double()).sum().backward()
    return value.detach(), leaf.grad


def sharded_kl(sizes, direction):
    """Return, by case, this rank's value and gradient beside those of the whole vocabulary in fp64."""
    from nemo.collections.llm.modelopt.distill._vocab_parallel import kl_divergence

    tiny.init_parallel(tp=2)
    rank = torch.distributed.get_rank()
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(5, 2, sum(sizes), generator=generator) * 3 for _ in range(2))
    weights = torch.rand(5, 2, generator=generator)
    fp32 = {"rtol": 1e-5, "atol": 2e-6}
    cases = {
        "plain": (student, teacher, 1.0, fp32),
        "temperature": (student, teacher, 2.5, fp32),
        "offset of 1e4": (student, teacher + 1e4, 1.0, fp32),
        # One rounding to 8 bits of mantissa.
        "bf16": (student.bfloat16(), teacher.bfloat16(), 1.0, {"rtol": 2**-7, "atol": 1e-5}),
    }
    results = {}
    for label, (s, t, temperature, tolerance) in cases.items():
        mine = s[..., part].contiguous().requires_grad_()
        group = torch.distributed.group.WORLD
        value = kl_divergence(mine, t[..., part].contiguous(), temperature, direction, group, chunk_rows=3)
        (value * weights).sum().backward()
        expected, gradient = reference_kl(s, t, temperature, direction, weights)
        results[label] = (value.detach().double(), expected, mine.grad.double(), gradient[..., part], tolerance)
    return results


def collectives_of_kl() -> tuple[int, int]:
    """Return how many collectives a divergence over two ranks takes in its forward and backward pass."""
    from unittest import mock

    from nemo.collections.llm.modelopt.distill._vocab_parallel import kl_divergence

    tiny.init_parallel(tp=2)
    names = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")
    student, teacher = torch.randn(4, 2, 9, requires_grad=True), torch.randn(4, 2, 9)
    with contextlib.ExitStack() as stack:
        spies = [
            stack.enter_context(mock.patch.object(torch.distributed, n, wraps=getattr(torch.distributed, n)))
            for n in names
        ]
        value = kl_divergence(student, teacher, group=torch.distributed.group.WORLD)
        forward = sum(spy.call_count for spy in spies)
        value.sum().backward()
        return forward, sum(spy.call_count for spy in spies) - forward


def kl_loss_against_plugin():
    """Return our loss and modelopt's own Megatron loss on the same shards, each summed to its global value."""
    from types import SimpleNamespace

    from modelopt.torch.distill.plugins import megatron as plugin

    from nemo.collections.llm.modelopt.distill.loss import LogitsKLLoss

    tiny.init_parallel(tp=2)
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(5, 2, 32, generator=generator)[..., 16 * rank :][..., :16] for _ in range(2))
    config = SimpleNamespace(tensor_model_parallel_size=2, sequence_parallel=False)
    mine, tp_reduce, _ = LogitsKLLoss(config)(student, teacher)
    assert not tp_reduce
    theirs, tp_reduce, _ = plugin.LogitsKLLoss(config)(student, teacher)
    if tp_reduce:
        torch.distributed.all_reduce(theirs)
    return mine, theirs

"""What ranks execute for the distillation tests. Runs with the stock subpackage as well as with ours."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from pathlib import Path

import lightning.pytorch as pl
import torch

from test_code.support import devices, ranks, tiny


class Metrics(pl.Callback):
    """Keep what a trainer logs in every step, and the validation losses."""

    def __init__(self):
        self.steps: list[dict[str, float]] = []
        self.val_losses: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        # The model logs after the callbacks' own end of a step: look at a step when the next one begins.
        if trainer.global_step:
            self.steps.append(self._logged(trainer))

    def on_train_end(self, trainer, pl_module):
        self.steps.append(self._logged(trainer))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.val_losses.append(float(trainer.callback_metrics["val_loss"]))

    @staticmethod
    def _logged(trainer):
        return {name: float(value) for name, value in trainer.callback_metrics.items()}


class TeacherWeights(pl.Callback):
    """Keep a copy of the teacher's weights as they are when training starts."""

    def __init__(self):
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer, pl_module):
        teacher_model = tiny.core(pl_module).teacher_model
        self.weights.update({name: weight.clone() for name, weight in teacher_model.named_parameters()})


@contextlib.contextmanager
def alone():
    """Let each rank of a pool be a group of its own, to run single-rank layouts without another pool."""
    with ranks.world(0, 1, f"rank{os.environ['RANK']}"):
        yield


def teacher(path: str, after_fit: bool = False, **overrides) -> str:
    """Train a teacher for two steps and save it, inside ``fit`` or after it; rank 0's checkpoint is used."""
    own = path if os.environ["RANK"] == "0" else f"{path}-{os.environ['RANK']}"
    with alone():
        model = tiny.model(**overrides)
        if after_fit:
            trainer = tiny.trainer(max_steps=2)
            trainer.fit(model, tiny.data())
            tiny.save(trainer, own)
        else:
            tiny.fit(model, save_to=own, max_steps=2)
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
    teacher_path, settings=None, student=None, steps=6, data=None, teacher_overrides=None, metrics=False, **layout
):
    """Distill and return the loss of each step, or with ``metrics`` everything logged and the validation losses."""
    model = distillation_model(teacher_path, settings, student, teacher_overrides)
    recorder = Metrics()
    losses = tiny.fit(model, tiny.data(**(data or {})), max_steps=steps, callbacks=[recorder], **layout)
    return (losses, recorder.steps, recorder.val_losses) if metrics else losses


def distill_everywhere(teacher_path, settings_path, data=None):
    """Distill in every layout of two ranks, and alone, and return the losses by (layout, objective)."""
    objectives = {
        "logits": (None, {}),
        "pair": (settings_path, {}),
        "projected pair": (settings_path, {"hidden_size": 32}),
    }
    layouts = {"1 rank": {}, "TP=2": {"tp": 2}, "TP=2 SP": {"tp": 2, "sp": True}, "PP=2": {"pp": 2}}
    results = {}
    for objective, (settings, student) in objectives.items():
        for layout, arguments in layouts.items():
            with alone() if layout == "1 rank" else contextlib.nullcontext():
                results[layout, objective] = distill(teacher_path, settings, student, data=data, **arguments)
            ranks.reset()
    return results


def which_subpackage() -> str:
    import nemo.collections.llm.modelopt as subpackage

    return str(Path(subpackage.__file__).parent)


# --- losses over a split vocabulary ---


def reference_kl(student, teacher, temperature, direction, weights, topk=None):
    """Return value [...] and gradient [..., v] in fp64 by plain PyTorch, of the sum weighed by ``weights``."""
    leaf = student.detach().double().requires_grad_()
    log_p = torch.log_softmax(leaf / temperature, -1)
    log_q = torch.log_softmax(teacher.double() / temperature, -1)
    if topk is not None and topk < log_q.shape[-1]:
        chosen = log_q.topk(topk, -1).indices
        in_tail = torch.ones_like(log_q, dtype=torch.bool).scatter(-1, chosen, False)
        log_p, log_q = (
            torch.cat([x.gather(-1, chosen), x.masked_fill(~in_tail, -torch.inf).logsumexp(-1, keepdim=True)], -1)
            for x in (log_p, log_q)
        )
    if direction == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        value = 0.5 * sum((x.exp() * (x - log_m)).sum(-1) for x in (log_p, log_q))
    else:
        first, second = (log_q, log_p) if direction == "forward" else (log_p, log_q)
        value = (first.exp() * (first - second)).sum(-1)
    (value * weights.double()).sum().backward()
    return value.detach(), leaf.grad


def distinct(*shape, generator, step=0.125):
    """Return logits [..., v] that bf16 holds exactly and that are all different, so that their order is defined."""
    return torch.stack(
        [torch.randperm(shape[-1], generator=generator) * step - 8 for _ in range(torch.Size(shape[:-1]).numel())]
    ).view(shape)


def sharded_kl(all_sizes, tp):
    """Return, by case, this rank's value and gradient, and those of the whole vocabulary in fp64.

    Args:
        all_sizes: for each case the sizes of the shards.
        tp: ranks the vocabulary is split over.
    """
    from nemo.collections.llm.modelopt._divergence.vocab_parallel import DIRECTIONS, kl_divergence

    tiny.init_parallel(tp=tp)
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(3)
    fp32 = {"rtol": 1e-5, "atol": 2e-6}
    results = {}
    for sizes in all_sizes:
        part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        student = torch.randn(5, 2, sum(sizes), generator=generator) * 3
        teacher = distinct(5, 2, sum(sizes), generator=generator)
        weights = torch.rand(5, 2, generator=generator)
        student, teacher, weights = devices.place(student, teacher, weights)
        padded = [
            x.clone().index_fill_(-1, torch.arange(sum(sizes) - 4, sum(sizes), device=x.device), -1e30)
            for x in (student, teacher)
        ]
        cases = {
            "plain": (student, teacher, 1.0, fp32),
            "temperature": (student, teacher, 2.5, fp32),
            "offset of 1e4": (student, teacher + 1e4, 1.0, fp32),
            "four entries of padding": (*padded, 1.0, fp32),
            # One rounding to 8 bits of mantissa.
            "bf16": (student.bfloat16(), teacher.bfloat16(), 1.0, {"rtol": 2**-7, "atol": 1e-5}),
        }
        for (label, (s, t, temperature, tolerance)), direction, topk in itertools.product(
            cases.items(), DIRECTIONS, (None, 3, 7)
        ):
            mine = s[..., part].contiguous().requires_grad_()
            shard = t[..., part].contiguous()
            if label == "four entries of padding":
                with torch.no_grad():
                    mine[mine < -1e29] = shard[shard < -1e29] = -torch.inf
            value = kl_divergence(mine, shard, temperature, direction, group, chunk_rows=3, topk=topk)
            (value * weights).sum().backward()
            again, spent = mine.detach().clone().requires_grad_(), shard.clone()
            value_again = kl_divergence(
                again, spent, temperature, direction, group, chunk_rows=3, topk=topk, reuse_teacher=True
            )
            (value_again * weights).sum().backward()
            assert torch.equal(again.grad, mine.grad) and torch.equal(spent, again.grad)
            expected, gradient = reference_kl(s, t, temperature, direction, weights, topk)
            key = f"{sizes} {label} {direction} topk={topk}"
            results[key] = (value.detach().double(), expected, mine.grad.double(), gradient[..., part], tolerance)
    return results


def extreme_logits():
    """Return logits [n, 4] of student and teacher up to the largest fp32 numbers."""
    largest = torch.finfo(torch.float32).max
    numbers = [largest, -largest, 3e38, 1e38, -1e38, 1.0, 0.0, -1e30, -torch.inf]
    rows = torch.tensor(list(itertools.product(numbers, repeat=3)))
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=-1)
    pairs = itertools.islice(itertools.product(range(len(rows)), repeat=2), None, None, 41)
    student, teacher = torch.tensor(list(pairs)).unbind(-1)
    return rows[student], rows[teacher]


def sharded_extremes():
    """Return value and gradient over two shards and on one rank, by direction, temperature and top-k."""
    from nemo.collections.llm.modelopt._divergence.vocab_parallel import DIRECTIONS, kl_divergence

    tiny.init_parallel(tp=2)
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    found = {}
    for direction, temperature, topk in itertools.product(DIRECTIONS, (0.25, 1.0, 4.0), (None, 2)):
        student, teacher = devices.place(*extreme_logits())
        part = slice(2 * rank, 2 * rank + 2)
        own, whole = student[:, part].clone().requires_grad_(), student.clone().requires_grad_()
        value = kl_divergence(own, teacher[:, part].contiguous(), temperature, direction, group, topk=topk)
        value.sum().backward()
        expected = kl_divergence(whole, teacher, temperature, direction, topk=topk)
        expected.sum().backward()
        key = f"{direction} temperature={temperature} topk={topk}"
        found[key] = value.detach(), own.grad, expected.detach(), whole.grad[:, part]
    return found


def collectives_of_kl() -> dict[str, tuple[int, int]]:
    """Return how many collectives a divergence over two ranks takes in its forward and backward pass."""
    from unittest import mock

    from nemo.collections.llm.modelopt._divergence.vocab_parallel import kl_divergence

    tiny.init_parallel(tp=2)
    names = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")
    student, teacher = devices.place(torch.randn(4, 2, 9), torch.randn(4, 2, 9))
    student.requires_grad_()
    counts = {}
    for direction, topk in itertools.product(("forward", "reverse", "jsd"), (None, 3)):
        with contextlib.ExitStack() as stack:
            spies = [
                stack.enter_context(mock.patch.object(torch.distributed, n, wraps=getattr(torch.distributed, n)))
                for n in names
            ]
            group = torch.distributed.group.WORLD
            value = kl_divergence(student, teacher, direction=direction, group=group, topk=topk, chunk_rows=3)
            forward = sum(spy.call_count for spy in spies)
            value.sum().backward()
            counts[f"{direction} topk={topk}"] = (forward, sum(spy.call_count for spy in spies) - forward)
    return counts


def kl_loss_against_plugin():
    """Return our loss and modelopt's own Megatron loss on the same shards, each summed to its global value."""
    from types import SimpleNamespace

    from modelopt.torch.distill.plugins import megatron as plugin

    from nemo.collections.llm.modelopt.distill.loss import LogitsKLLoss

    tiny.init_parallel(tp=2)
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(5, 2, 32, generator=generator)[..., 16 * rank :][..., :16] for _ in range(2))
    student, teacher = devices.place(student, teacher)
    config = SimpleNamespace(tensor_model_parallel_size=2, sequence_parallel=False)
    mine, tp_reduce, _ = LogitsKLLoss(config)(student, teacher)
    assert not tp_reduce
    theirs, tp_reduce, _ = plugin.LogitsKLLoss(config)(student, teacher)
    if tp_reduce:
        torch.distributed.all_reduce(theirs)
    return mine, theirs


# --- behaviour of whole trainings ---


def two_stage_training(teacher_path, settings):
    """Distill at PP=2 with a sanity check and validations in between; return (losses, metrics, validation losses)."""
    # Lightning counts micro-batches: two make a global batch.
    extra = {"limit_val_batches": 2, "num_sanity_val_steps": 2, "val_check_interval": 2}
    return distill(teacher_path, settings, steps=4, metrics=True, pp=2, **extra)


def first_logits_loss(teacher_path, settings_paths):
    """Return the logged parts of the first step for each settings file: the models are the same ones."""
    first = []
    for path in settings_paths:
        first.append(distill(teacher_path, path, steps=1, metrics=True, tp=2)[1][0])
        ranks.reset()
    return first


class TECrossEntropy(pl.Callback):
    """Let a model use Transformer Engine's cross entropy, which the CPU backend replaces by Megatron's."""

    def on_train_start(self, trainer, pl_module):
        config = tiny.core(pl_module).config
        config.cross_entropy_loss_fusion, config.cross_entropy_fusion_impl = True, "te"


def first_logits_loss_in_bf16(teacher_path, settings_paths):
    """Return what `first_logits_loss` does for bf16 models whose cross entropy overwrites the logits, as TE's does."""
    from megatron.core.models.common.language_module import language_module
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from nemo import lightning as nl

    def overwriting(logits, labels, group, is_cg_capturable=False):
        loss = vocab_parallel_cross_entropy(logits.float().clone(), labels)
        logits.data.zero_()
        return loss

    kept, language_module.te_parallel_cross_entropy = language_module.te_parallel_cross_entropy, overwriting
    te = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    first = []
    try:
        for path in settings_paths:
            bf16 = nl.MegatronMixedPrecision("bf16-mixed", params_dtype=torch.bfloat16, autocast_enabled=False)
            model, recorder = distillation_model(teacher_path, path, te, te), Metrics()
            tiny.fit(model, tiny.data(), max_steps=1, callbacks=[recorder, TECrossEntropy()], tp=2, plugins=bf16)
            first.append(recorder.steps[0])
            ranks.reset()
    finally:
        language_module.te_parallel_cross_entropy = kept
    return first


def curves_by_micro_batch(teacher_path, per_token):
    """Return loss curves for micro-batches of 1, 2 and 4 sequences, on data whose masks are of unequal length."""
    curves = []
    for size in (1, 2, 4):
        data = {"micro_batch_size": size, "global_batch_size": 8}
        student = {"calculate_per_token_loss": per_token}
        curves.append(distill(teacher_path, student=student, data=data, steps=3, tp=2))
        ranks.reset()
    return curves


def checkpoint_of_student(teacher_path, settings, path):
    """Distil, save, and return (keys in the file, loss when a plain model trains on from it, numbers of parameters)."""
    from nemo.collections.llm.modelopt import _saved_keys

    student = {"hidden_size": 32}
    model = distillation_model(teacher_path, settings, student)
    snapshot = TeacherWeights()
    losses = tiny.fit(model, max_steps=2, save_to=path, callbacks=[snapshot], tp=2)
    core = tiny.core(model)
    moved = [n for n, p in core.teacher_model.named_parameters() if not torch.equal(p, snapshot.weights[n])]
    in_buffers = sum(buffer.numel_unpadded for buffer in model.module.buffers)
    trainable = sum(p.numel() for p in core.parameters() if p.requires_grad)
    teacher_trains = any(p.requires_grad for p in core.teacher_model.parameters())
    ranks.reset()
    plain = tiny.model(ffn_hidden_size=64, **student)
    continued = tiny.fit(plain, max_steps=1, restore=path, tp=2)
    return _saved_keys.saved_keys(path), losses, continued, moved, in_buffers - trainable, teacher_trains


def refusals(teacher_path, settings):
    """Return, by what is wrong, the type and text of the error; nothing may have been loaded for it."""
    from unittest import mock

    from nemo.collections.llm.modelopt.distill import model as module

    cases = {
        "vpp in the strategy": ({}, {}, None, {"virtual_pipeline_model_parallel_size": 2}),
        "vocabulary": ({"vocab_size": 4096}, {}, None, {}),
        "layer": ({}, {}, settings["layer"], {}),
        "stage": ({}, {}, settings["stage"], {}),
        "recompute": (
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
            {},
            settings["inside"],
            {},
        ),
        "setting": ({}, {}, settings["setting"], {}),
        "fused with fsdp": ({}, {}, settings["fused"], {"fsdp": "megatron"}),
    }
    answers = {}
    for label, (student, teacher_overrides, path, strategy) in cases.items():
        with mock.patch.object(module, "teacher_provider") as provider:
            try:
                distill(teacher_path, path, student, 1, None, teacher_overrides, pp=2, strategy_kwargs=strategy)
                answers[label] = ("no error", "")
            except Exception as error:
                answers[label] = (type(error).__name__, str(error))
            assert not provider.called
        ranks.reset()
    return answers


def multi_token_prediction(teacher_path, mtp_teacher_path, settings):
    """Return weights of the student's multi-token-prediction block after one step, by layout and training.

    ``plain`` trains the student alone, on the next-token loss; ``distilled`` against a teacher without such a block;
    ``both`` against one with a block, of which the logged losses are returned.
    """
    from functools import partial

    from nemo.collections.llm.gpt.model.base import gpt_data_step

    block = {
        "mtp_num_layers": 1,
        "mtp_loss_scaling_factor": 0.1,
        # The block embeds the tokens on the last stage.
        "data_step_fn": partial(gpt_data_step, use_mtp=True),
    }
    layouts = {"1 rank": {}, "TP=2": {"tp": 2}, "PP=2": {"pp": 2}}
    results = {}
    for layout, arguments in layouts.items():
        with alone() if layout == "1 rank" else contextlib.nullcontext():
            # Clipping would scale the gradients of both trainings by different numbers.
            plain = tiny.model(ffn_hidden_size=64, optimizer=tiny.optim(clip_grad=0.0), **block)
            tiny.fit(plain, max_steps=1, **arguments)
            results[layout, "plain"] = _mtp_weights(plain)
            ranks.reset()
            model = distillation_model(teacher_path, settings, block)
            model.optim = tiny.optim(clip_grad=0.0)
            tiny.fit(model, max_steps=1, **arguments)
            results[layout, "distilled"] = _mtp_weights(model)
            ranks.reset()
            for name, overrides in (("both", block), ("without", {})):
                recorded = distill(
                    mtp_teacher_path, settings, block, 1, teacher_overrides=overrides, metrics=True, **arguments
                )
                results[layout, name] = recorded[1][0]
                ranks.reset()
    return results


def _mtp_weights(model):
    named = tiny.core(model).named_parameters()
    return {name: value.detach().clone() for name, value in named if name.startswith("mtp.")}


def reduction_over_context_parallel(per_token):
    """Return this rank's results of a reduction at CP=2 and those of one process over whole sequences.

    Each rank has half of each sequence and a mask of its own length; the second micro-batch is fully masked.
    """
    from nemo.collections.llm.modelopt.distill.model import _DistillationLossReduction

    tiny.init_parallel(cp=2)
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(7)
    token_losses = torch.rand(2, 2, 8, generator=generator)  # micro-batches, b, s
    masks = (torch.rand(2, 2, 8, generator=generator) < 0.6).float()
    masks[1] = 0
    token_losses, masks = devices.place(token_losses, masks)
    half = slice(4 * rank, 4 * rank + 4)
    results = []
    for tokens, mask in zip(token_losses, masks, strict=True):
        leaf = tokens[:, half].clone().requires_grad_()
        reduction = _DistillationLossReduction(
            lambda student_loss, loss_reduction_fn, leaf=leaf: {"kd_loss": loss_reduction_fn(leaf)},
            per_token_loss=per_token,
        )
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss, *count, report = reduction.forward(
                {"loss_mask": mask[:, half]}, torch.zeros(2, 4, device=mask.device)
            )
        reductions = sum(event.name == "c10d::allreduce_" for event in profile.events())
        assert reductions == 3, "the number of tokens, the language-model loss and the distillation loss"
        loss.backward()
        reduced = reduction.reduce([report])
        local = mask[:, half]
        expected_mean = (tokens * mask).sum() / mask.sum().clamp(min=1)
        expected_gradient = local if per_token else local / mask.sum().clamp(min=1)
        expected_loss = (tokens * mask).sum() if per_token else expected_mean
        if per_token:
            assert int(count[0]) == int(local.sum())
        results.append((loss.detach(), expected_loss, leaf.grad, expected_gradient, reduced, expected_mean))
    return results


def through_nemo_api(teacher_path, folder):
    """Run ``llm.distill`` from two checkpoints on one rank, and return the weights' change and the files."""
    from nemo import lightning as nl
    from nemo.collections import llm

    folder = Path(f"{folder}-{os.environ['RANK']}")
    with alone():
        tiny.fit(tiny.model(ffn_hidden_size=64), save_to=folder / "student", max_steps=1)
        ranks.reset()
        recorder = Metrics()
        llm.distill(
            student_model_path=str(folder / "student"),
            teacher_model_path=teacher_path,
            data=tiny.data(),
            trainer=tiny.trainer(max_steps=2, callbacks=[recorder]),
            log=nl.NeMoLogger(log_dir=str(folder / "logs"), use_datetime_version=False, ckpt=None),
            optim=tiny.optim(),
        )
    return recorder.steps

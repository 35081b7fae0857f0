"""What ranks execute for the tests of the loss fused with the output layers."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F

from test_code.support import jobs_distill, ranks, tiny


def problem(n=11, h=6, h_teacher=9, v=40, seed=0, dtype=torch.float32):
    """Return (student [n, h], weight [v, h], teacher, teacher's weight, token weights [n], labels [n])."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((n, h), (v, h), (n, h_teacher), (v, h_teacher))]
    mask = (torch.rand(n, generator=generator) < 0.7).float()
    labels = torch.randint(v, (n,), generator=generator)
    return [*(x.to(dtype) for x in tensors), mask, labels]


def reference(tensors, labels, scales, temperature=1.0, direction="forward", topk=None, cap=None):
    """Return (divergence, LM loss, agreement, d_hidden, d_weight) in fp64; the gradients of their sum by ``scales``."""
    student, weight, teacher, teacher_weight, mask = (x.detach().double() for x in tensors)
    student.requires_grad_()
    weight.requires_grad_()
    z, y = student @ weight.t(), teacher @ teacher_weight.t()
    if cap:
        z, y = (cap * torch.tanh(x / cap) for x in (z, y))
    # The divergence and its gradient by jobs_distill's plain formulas, carried on by autograd.
    value, d_z = jobs_distill.reference_kl(z, y, temperature, direction, mask, topk)
    divergence = (value * mask).sum()
    total = scales[0] * (z * d_z).sum()
    lm = torch.zeros(())
    if labels is not None:
        lm = (F.cross_entropy(z, labels, reduction="none") * mask).sum()
        total = total + scales[1] * lm
    total.backward()
    agreement = ((z.argmax(-1) == y.argmax(-1)) * mask).sum()
    return divergence, lm.detach(), agreement, student.grad, weight.grad


def split_vocabulary():
    """Return, by case, this rank's losses and gradients over two shards beside those of one process in fp64."""
    from nemo.collections.llm.modelopt._divergence.fused_linear import Objective, fused_linear_losses

    tiny.init_parallel(tp=2)
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    results = {}
    for direction in ("forward", "reverse", "jsd"):
        for topk in (None, 5):
            for with_lm in (False, True):
                *tensors, labels = problem()
                labels = labels if with_lm else None
                shards = [x.clone() for x in tensors]
                shards[1], shards[3] = (x[20 * rank :][:20].clone() for x in (tensors[1], tensors[3]))
                shards[0].requires_grad_()
                shards[1].requires_grad_()
                objective = Objective(2.0, direction, topk, group=group, chunk_rows=4)
                losses = fused_linear_losses(*shards, objective, labels)
                (0.5 * losses.divergence + 3.0 * losses.lm).backward()
                # A layer's hidden states are copied to all ranks: their gradient is the sum of the ranks'.
                torch.distributed.all_reduce(shards[0].grad)
                expected = reference(tensors, labels, (0.5, 3.0), 2.0, direction, topk)
                mine = (*losses, shards[0].grad, shards[1].grad)
                part = slice(20 * rank, 20 * rank + 20)
                key = f"{direction} topk={topk} lm={with_lm}"
                results[key] = ([x.detach() for x in mine], [*expected[:4], expected[4][part]])
    return results


def fused_and_chunked(teacher_path, cases):
    """Return the metrics of each step, fused and not, by (layout, case).

    Args:
        teacher_path: checkpoint.
        cases: label -> ((fused settings, other settings), overrides of the student).
    """
    layouts = {"1 rank": {}, "TP=2": {"tp": 2}, "TP=2 SP": {"tp": 2, "sp": True}, "PP=2": {"pp": 2}}
    results = {}
    for layout, arguments in layouts.items():
        for label, (settings, student) in cases.items():
            pair = []
            for path in settings:
                with jobs_distill.alone() if layout == "1 rank" else contextlib.nullcontext():
                    pair.append(
                        jobs_distill.distill(teacher_path, path, student, steps=3, metrics=True, **arguments)[1]
                    )
                ranks.reset()
            results[layout, label] = pair
    return results


def output_layers(cases):
    """Return, for output layers changed as ``cases`` say, why they are not fused; None where they are."""
    from unittest import mock

    import modelopt.torch.quantization as mtq

    from nemo.collections.llm.modelopt.distill import _fusion
    from nemo.collections.llm.modelopt.distill.loss import LogitsKLLoss
    from nemo.collections.llm.modelopt.distill.utils import DistillationConfig

    tiny.init_parallel(tp=2)
    config = tiny.config(tensor_model_parallel_size=2)
    reasons = {}
    for case in cases:
        student, teacher = (config.configure_model(tiny.tokenizer()) for _ in range(2))
        settings = DistillationConfig(skip_lm_loss=False)
        if case == "quantized":
            mtq.quantize(teacher, mtq.INT8_DEFAULT_CFG, lambda model: None)
        elif case == "hooked":
            student.output_layer.register_forward_hook(lambda *_: None)
            student.output_layer.register_forward_hook(lambda *_: None)
        elif case == "gathered":
            student.output_layer.gather_output = True
        elif case == "bias":
            student.output_layer.bias = torch.nn.Parameter(torch.zeros(4))
        elif case == "layers":
            settings = DistillationConfig(logit_layers=("decoder.final_layernorm", "decoder.final_layernorm"))
        with mock.patch.object(_fusion, "logging"):
            settings.criterion = {settings.logit_layers: LogitsKLLoss(config)}
            reasons[case] = _fusion.why_not_fused(student, teacher, settings.criterion[settings.logit_layers], settings)
    return reasons

"""The generalized Jensen-Shannon divergence: against TRL's formula, at its ends, in fp64, over shards and top-k."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo.collections.llm.modelopt._divergence.fused_linear import Objective, fused_linear_losses
from nemo.collections.llm.modelopt._divergence.recorded_topk import RecordedLogits, recorded_divergence, top_entries
from nemo.collections.llm.modelopt._divergence.vocab_parallel import kl_divergence
from nemo.collections.llm.modelopt.distill import loss as losses
from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from test_code.distill.test_distill_loss import FP32, logits, model_config
from test_code.support import jobs_distill, tiny

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def reference(student, teacher, beta, temperature=1.0, topk=None):
    """Return value [...] and gradient of the sum in fp64, by TRL's formula for GKD: the mixture in logarithms."""
    leaf = student.detach().double().requires_grad_()
    log_p, log_q = (torch.log_softmax(x.double() / temperature, -1) for x in (leaf, teacher))
    if topk is not None and topk < log_q.shape[-1]:
        chosen = log_q.topk(topk, -1).indices
        in_tail = torch.ones_like(log_q, dtype=torch.bool).scatter(-1, chosen, False)
        log_p, log_q = (
            torch.cat([x.gather(-1, chosen), x.masked_fill(~in_tail, -torch.inf).logsumexp(-1, keepdim=True)], -1)
            for x in (log_p, log_q)
        )

    def kl(first, second):
        return (first.exp() * (first - second)).sum(-1)

    if beta == 0:
        value = kl(log_q, log_p)
    elif beta == 1:
        value = kl(log_p, log_q)
    else:
        mixture = torch.logsumexp(torch.stack([log_p + math.log1p(-beta), log_q + math.log(beta)]), 0)
        value = beta * kl(log_q, mixture) + (1 - beta) * kl(log_p, mixture)
    value.sum().backward()
    return value.detach(), leaf.grad


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 9),
    v=st.integers(2, 90),
    beta=st.floats(0, 1) | st.sampled_from(BETAS),
    temperature=st.floats(0.5, 4.0),
    topk=st.none() | st.integers(1, 95),
    scale=st.sampled_from([1e-2, 3.0, 50.0]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    memory=st.sampled_from([{}, {"in_place": True}, {"reuse_teacher": True}]),
)
def test_values_and_gradients_are_trls(n, v, beta, temperature, topk, scale, seed, dtype, memory):
    student, teacher = (logits(n, v, seed=seed + i, scale=scale).to(dtype) for i in (0, 100))
    leaf = student.clone().requires_grad_()
    value = kl_divergence(leaf * 1, teacher.clone(), temperature, "jsd", chunk_rows=4, beta=beta, topk=topk, **memory)
    value.sum().backward()
    expected, gradient = reference(student, teacher, beta, temperature, topk)
    # Logits of 50 / 0.5 are rounded to 1e-5 in fp32; sums of fp64 are exact to 1e-12.
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    assert value.dtype == leaf.grad.dtype == dtype
    torch.testing.assert_close(value.double(), expected, **tolerance)
    torch.testing.assert_close(leaf.grad.double(), gradient, **tolerance)


@pytest.mark.parametrize("topk", [None, 5])
def test_the_ends_are_the_kl_divergences_and_the_middle_is_the_default(topk):
    student, teacher = logits(6, 2, 40), logits(6, 2, 40, seed=1)
    results = []
    cases = [("forward", 0.5), ("jsd", 0.0), ("reverse", 0.5), ("jsd", 1.0), ("jsd", 0.5), ("jsd", None)]
    for direction, beta in cases:
        leaf = student.clone().requires_grad_()
        options = {} if beta is None else {"beta": beta}
        value = kl_divergence(leaf, teacher, 1.5, direction, topk=topk, **options)
        value.sum().backward()
        results.append((value.detach(), leaf.grad))
    for first, second in zip(results[::2], results[1::2], strict=True):
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("beta", [0.1, 0.9])
@pytest.mark.parametrize("topk", [None, 2])
def test_logits_near_the_end_of_fp32_give_finite_gradients(beta, topk):
    student, teacher = jobs_distill.extreme_logits()
    leaf = student.clone().requires_grad_()
    value = kl_divergence(leaf, teacher, direction="jsd", beta=beta, topk=topk)
    value.sum().backward()
    assert value.isfinite().all() and leaf.grad.isfinite().all()
    # Of an entry that only one model allows, at most the logarithm of its own weight in the mixture remains.
    assert (value >= -1e-6).all() and (value <= -math.log(min(beta, 1 - beta)) + 1e-6).all()


class _Fresh(torch.autograd.Function):
    """Compute a scalar again for each backward pass: gradcheck takes several, and the losses allow one."""

    @staticmethod
    def forward(ctx, function, *tensors):
        ctx.function, ctx.tensors = function, tensors
        return function(*tensors).detach()

    @staticmethod
    def backward(ctx, grad):
        leaves = [x.detach().clone().requires_grad_() for x in ctx.tensors]
        with torch.enable_grad():
            return None, *torch.autograd.grad(ctx.function(*leaves), leaves, grad)


@pytest.mark.parametrize("direction, beta", [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1)])
@pytest.mark.parametrize("form", ["whole", "topk", "recorded", "fused", "fused topk with LM loss"])
def test_gradcheck_in_fp64(direction, beta, form):
    generator = torch.Generator().manual_seed(0)
    student, teacher, hidden, weight, teacher_weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 1, 9), (3, 1, 9), (3, 4), (9, 4), (9, 4))
    )
    each = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    labels = torch.tensor([1, 8, 3]) if "LM" in form else None
    entries, values, rest = top_entries(teacher.flatten(0, 1), 3, 1.5)
    record = RecordedLogits(entries[:, None], values[:, None], rest[:, None], 1.5)

    def of_logits(leaf):
        if form == "recorded":
            return (recorded_divergence(leaf, record, direction, beta=beta)[:, 0] * each).sum()
        topk = 3 if form == "topk" else None
        return (kl_divergence(leaf, teacher, 1.5, direction, beta=beta, topk=topk)[:, 0] * each).sum()

    def fused(hidden, weight):
        objective = Objective(1.5, direction, 3 if "topk" in form else None, student_cap=2.0, chunk_rows=2, beta=beta)
        found = fused_linear_losses(hidden, weight, teacher[:, 0, :4], teacher_weight, each, objective, labels)
        return found.divergence + (found.lm if labels is not None else 0.0)

    function, leaves = (fused, (hidden, weight)) if "fused" in form else (of_logits, (student,))
    leaves = [x.clone().requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(lambda *x: _Fresh.apply(function, *x), leaves)


def on_shards(sizes, betas):
    """Return by case this rank's value and gradient over two shards, and those of the whole vocabulary in fp64."""
    tiny.init_parallel(tp=2)
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    generator = torch.Generator().manual_seed(3)
    student = 3 * torch.randn(5, 2, sum(sizes), generator=generator)
    teacher = jobs_distill.distinct(5, 2, sum(sizes), generator=generator)
    found = {}
    for beta, topk, offset in itertools.product(betas, (None, 3), (0.0, 1e4)):
        own = student[..., part].clone().requires_grad_()
        shard = (teacher + offset)[..., part].contiguous()
        value = kl_divergence(own, shard, 1.5, "jsd", group, chunk_rows=3, topk=topk, beta=beta)
        value.sum().backward()
        expected, gradient = reference(student, teacher + offset, beta, 1.5, topk)
        found[beta, topk, offset] = value.detach().double(), own.grad.double(), expected, gradient[..., part]
    return found


@pytest.mark.parametrize("sizes", [(17, 17), (1, 12)])
def test_split_vocabularies(ranks, sizes):
    for found in ranks(2).run(on_shards, sizes, BETAS):
        assert len(found) == 20
        for value, gradient, expected, expected_gradient in found.values():
            torch.testing.assert_close(value, expected, **FP32)
            torch.testing.assert_close(gradient, expected_gradient, **FP32)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_loss_uses_it_for_logits_and_recorded_teachers(beta):
    student, teacher = logits(6, 2, 50), logits(6, 2, 50, seed=1)
    loss = losses.LogitsKLLoss(model_config(), 2.0, direction="jsd", beta=beta)
    expected = reference(student, teacher, beta, 2.0)[0].t()
    torch.testing.assert_close(loss(student, teacher)[0].double(), expected, **FP32)
    entries, values, rest = top_entries(teacher.flatten(0, 1), 7, 2.0)
    record = RecordedLogits(entries.view(6, 2, 7), values.view(6, 2, 7), rest.view(6, 2), 2.0)
    expected = reference(student, teacher, beta, 2.0, 7)[0].t()
    torch.testing.assert_close(loss(student, record)[0].double(), expected, **FP32)


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_other_numbers_are_refused(beta):
    with pytest.raises(ModelOptConfigError, match=f"beta={beta!r} must be a number between 0 and 1"):
        losses.LogitsKLLoss(model_config(), direction="jsd", beta=beta)

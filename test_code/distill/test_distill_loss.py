"""Losses of the distillation against fp64 PyTorch: values and gradients, whole and split vocabularies, odd inputs."""

from __future__ import annotations

from types import SimpleNamespace

import modelopt.torch.distill as mtd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo.collections.llm.modelopt._divergence import topk as _topk
from nemo.collections.llm.modelopt._divergence.fused_linear import Objective, fused_linear_losses
from nemo.collections.llm.modelopt._divergence.vocab_parallel import DIRECTIONS, kl_divergence
from nemo.collections.llm.modelopt.distill import loss as losses
from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from test_code.support import jobs_distill as jobs

# fp32 arithmetic on up to some hundred entries; gradients are at most 1 in size.
FP32 = {"rtol": 1e-5, "atol": 2e-6}
# The stored gradient is rounded to 8 bits of mantissa, once when formed and once when scaled.
BF16_GRADIENT = {"rtol": 2**-7, "atol": 1e-5}


def model_config(**overrides):
    return SimpleNamespace(
        **{
            "tensor_model_parallel_size": 1,
            "sequence_parallel": False,
            "hidden_size": 8,
            "init_method": lambda weight: torch.nn.init.normal_(weight, std=0.02),
            **overrides,
        }
    )


def logits(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def check(student, teacher, temperature=1.0, direction="forward", gradient=None, topk=None, **kwargs):
    """Compare ours with the fp64 reference, in value and in gradient."""
    gradient = FP32 if gradient is None else gradient
    weights = torch.rand(student.shape[:-1], generator=torch.Generator().manual_seed(5))
    mine = student.clone().requires_grad_()
    # In place, a copy is overwritten: a leaf that needs its gradient may not be.
    given_logits = mine.clone() if kwargs.get("in_place") else mine
    given_teacher = teacher.clone() if kwargs.get("reuse_teacher") else teacher
    value = kl_divergence(given_logits, given_teacher, temperature, direction, topk=topk, **kwargs)
    (value * weights).sum().backward()
    expected, expected_gradient = jobs.reference_kl(student, teacher, temperature, direction, weights, topk)
    torch.testing.assert_close(value.double(), expected, **FP32)
    torch.testing.assert_close(mine.grad.double(), expected_gradient, **gradient)
    assert mine.grad.dtype == student.dtype


@settings(max_examples=150, deadline=None)
@given(
    s=st.integers(1, 7),
    b=st.integers(1, 3),
    v=st.integers(1, 130),
    temperature=st.floats(0.25, 8.0),
    direction=st.sampled_from(DIRECTIONS),
    rows=st.integers(1, 9),
    seed=st.integers(0, 99),
    topk=st.none() | st.integers(1, 140),
    memory=st.sampled_from([{}, {"in_place": True}, {"reuse_teacher": True}]),
)
def test_kl_equals_fp64_for_any_shape_temperature_and_chunk(s, b, v, temperature, direction, rows, seed, topk, memory):
    student, teacher = logits(s, b, v, seed=seed), logits(s, b, v, seed=seed + 100)
    # Cold temperatures blow logits, and with them fp32 rounding, up by their inverse.
    slack = max(1.0, 1 / temperature) ** 2
    tolerances = {"rtol": 1e-5, "atol": 2e-6 * slack}
    check(student, teacher, temperature, direction, tolerances, topk, chunk_rows=rows, **memory)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("topk", [None, 4])
def test_logits_of_ten_thousand_lose_nothing(direction, offset, topk):
    student, teacher = logits(6, 2, 33), logits(6, 2, 33, seed=1)
    # The offset itself rounds the teacher's logits: the reference gets the rounded ones.
    check(student, teacher + offset, direction=direction, topk=topk)
    check(student * 1e4, teacher * 1e4, direction=direction, gradient={"rtol": 1e-4, "atol": 1e-4}, topk=topk)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("topk", [None, 4, 17])
def test_entries_masked_in_both_models_do_not_count(direction, topk):
    student, teacher = logits(5, 2, 20), logits(5, 2, 20, seed=1)
    whole = student.clone().requires_grad_()
    masked_student, masked_teacher = whole.clone(), teacher.clone()
    masked_student[..., 15:] = masked_teacher[..., 15:] = -torch.inf
    value = kl_divergence(masked_student, masked_teacher, direction=direction, topk=topk)
    value.sum().backward()
    kept = student[..., :15].clone().requires_grad_()
    expected = kl_divergence(kept, teacher[..., :15].contiguous(), direction=direction, topk=topk)
    expected.sum().backward()
    torch.testing.assert_close(value, expected, **FP32)
    torch.testing.assert_close(whole.grad[..., :15], kept.grad, **FP32)
    assert (whole.grad[..., 15:] == 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("whose", ["student", "teacher", "both rows"])
@pytest.mark.parametrize("topk", [None, 2, 20])
def test_minus_infinity_never_makes_nan(direction, whose, topk):
    student, teacher = logits(4, 1, 12), logits(4, 1, 12, seed=1)
    if whose == "both rows":
        student[0] = teacher[0] = -torch.inf
    else:
        (student if whose == "student" else teacher)[..., 3] = -torch.inf
    student.requires_grad_()
    value = kl_divergence(student, teacher, 1.5, direction, topk=topk)
    value.sum().backward()
    assert not value.isnan().any() and not student.grad.isnan().any()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("topk", [None, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_logits_near_the_end_of_fp32_give_finite_gradients(direction, temperature, topk, fused):
    student, teacher = jobs.extreme_logits()
    leaf = student.clone().requires_grad_()
    if fused:  # an identity as output weight, which other entries of a row may not multiply by infinity
        finite = student.isfinite().all(-1) & teacher.isfinite().all(-1)
        leaf, teacher = student[finite].requires_grad_(), teacher[finite]
        one, each = torch.eye(student.shape[-1]), torch.ones(len(leaf))
        objective = Objective(temperature, direction, topk, chunk_rows=100)
        fused_linear_losses(leaf, one, teacher, one, each, objective).divergence.backward()
    else:
        value = kl_divergence(leaf, teacher, temperature, direction, topk=topk)
        value.sum().backward()
        assert value.isfinite().all() and (value >= -1e-6).all()
    assert leaf.grad.isfinite().all()


def test_logits_near_the_end_of_fp32_on_shards(ranks):
    for found in ranks(2).run(jobs.sharded_extremes):
        for label, (value, gradient, whole, whole_gradient) in found.items():
            assert value.isfinite().all() and gradient.isfinite().all(), label
            ordinary = whole < 1e6
            if "topk=None" in label:  # the tail of a top-k is added up in fp64, which cannot represent it here
                torch.testing.assert_close(value[ordinary], whole[ordinary], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(gradient[ordinary], whole_gradient[ordinary], rtol=1e-5, atol=1e-5)
                assert (value[~ordinary] > 1e6).all(), label


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("topk", [None, 20])
def test_bf16_logits_are_accumulated_in_fp32(direction, temperature, topk):
    student = logits(6, 2, 200).bfloat16()
    teacher = jobs.distinct(6, 2, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
    check(student, teacher, temperature, direction, BF16_GRADIENT, topk)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("topk", [None, 20])
def test_under_autocast_fp32_logits_stay_fp32(direction, dtype, topk):
    """Autocast would round the exponentials in the expectations to half precision."""
    with torch.autocast("cpu", dtype=dtype):
        check(logits(6, 2, 200), logits(6, 2, 200, seed=1), 2.0, direction, topk=topk)


@pytest.mark.parametrize("v", [16 * 20, 16 * 20 + 7, 5000, 16 * 20 - 1])
@pytest.mark.parametrize("values", ["distinct", "few", "masked", "all in one block"])
def test_the_likeliest_entries_are_found_by_blocks(v, values):
    source = logits(5, v)
    if values == "few":  # ties at the edge
        source = source.round()
    elif values == "masked":
        source[:, 3:] = -torch.inf
    elif values == "all in one block":  # entries i, i + blocks, ..
        source[:, 2 :: v // _topk._BLOCK] += 100.0
    found = _topk.likeliest(source, 10)
    assert found.sort(-1).values.diff(dim=-1).gt(0).all(), "an entry was taken twice"
    torch.testing.assert_close(source.gather(-1, found).sort(-1, descending=True).values, source.topk(10).values)


def test_topk_of_a_large_vocabulary():
    """So large that blocks are sorted out first, with entries left over; chunks of several sizes."""
    teacher = jobs.distinct(7, 3, 3011, generator=torch.Generator().manual_seed(1))
    for direction in DIRECTIONS:
        check(logits(7, 3, 3011), teacher, 1.5, direction, topk=50, chunk_rows=3)


def test_equal_models_have_no_divergence_and_no_gradient():
    student = logits(4, 2, 40).requires_grad_()
    value = kl_divergence(student, student.detach().clone())
    value.sum().backward()
    assert (value.abs() < 1e-6).all() and (student.grad.abs() < 1e-7).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("topk", [None, 5])
def test_inputs_need_not_be_contiguous(direction, topk):
    student, teacher = (logits(6, 2, 80, seed=seed)[..., ::2] for seed in (0, 1))
    check(student, teacher, 1.5, direction, topk=topk)
    check(student.transpose(0, 1), teacher.transpose(0, 1), 1.5, direction, topk=topk)
    expanded = logits(6, 1, 40).expand(6, 2, 40)
    check(expanded, teacher, 1.5, direction, topk=topk)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("topk", [None, 5])
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_reruns_and_compiled_callers_get_the_same_bits(direction, topk, backend):
    def step(student, teacher):
        return (kl_divergence(student * 2.0, teacher, 1.5, direction, topk=topk) * 3.0).sum()

    results = []
    for function in (step, step if backend is None else torch.compile(step, backend=backend)):
        leaf = logits(6, 2, 50).requires_grad_()
        with torch.compiler.set_stance("default"):  # the CPU backend compiles nothing
            value = function(leaf, logits(6, 2, 50, seed=1))
            value.backward()
        results.append((value.detach(), leaf.grad))
    torch._dynamo.reset()
    assert all(map(torch.equal, *results))


def test_a_second_backward_pass_is_refused():
    student = logits(2, 1, 5).requires_grad_()
    value = kl_divergence(student, logits(2, 1, 5, seed=1)).sum()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second forward pass"):
        value.backward()


def test_nothing_but_one_gradient_buffer_is_kept():
    student, teacher = logits(64, 2, 1000).requires_grad_(), logits(64, 2, 1000, seed=1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        value = kl_divergence(student, teacher)
    assert max(saved, default=0) <= 64 * 2  # at most something of one number a token
    assert value.grad_fn is not None


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("topk", [None, 5])
def test_in_place_the_gradient_takes_the_memory_of_the_logits(direction, topk):
    student, teacher = logits(8, 2, 100).requires_grad_(), logits(8, 2, 100, seed=1)
    overwritten = student * 1.0
    gradients = []
    overwritten.register_hook(gradients.append)
    kl_divergence(overwritten, teacher, direction=direction, topk=topk, in_place=True).sum().backward()
    assert gradients[0].data_ptr() == overwritten.data_ptr()
    gradients.clear()
    overwritten = student * 1.0
    overwritten.register_hook(gradients.append)
    kl_divergence(overwritten, teacher, direction=direction, topk=topk, reuse_teacher=True).sum().backward()
    assert gradients[0].data_ptr() == teacher.data_ptr()
    # Another type cannot hold it.
    kl_divergence(student, teacher.bfloat16(), direction=direction, topk=topk, reuse_teacher=True).sum().backward()
    assert student.grad.dtype == torch.float32


# Even shards, uneven ones, and shards with fewer entries than are compared.
@pytest.mark.parametrize("sizes", [[(17, 17), (5, 30), (1, 12)], [(9, 9, 9, 9), (3, 20, 1, 9)]], ids=["TP=2", "TP=4"])
def test_split_vocabulary_equals_fp64(ranks, sizes):
    tp = len(sizes[0])
    for values in ranks(tp).run(jobs.sharded_kl, sizes, tp):
        assert len(values) == len(sizes) * 5 * 3 * 3
        for label, (value, expected, gradient, expected_gradient, tolerance) in values.items():
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=2e-6, msg=lambda m, x=label: f"{x}: {m}")
            torch.testing.assert_close(gradient, expected_gradient, **tolerance, msg=lambda m, x=label: f"{x}: {m}")


def test_split_vocabulary_takes_one_collective_and_no_backward_one(ranks):
    for counts in ranks(2).run(jobs.collectives_of_kl):
        # The Jensen-Shannon divergence needs both models' sums before its expectations, except over k + 1 buckets.
        assert counts.pop("jsd topk=None") == (2, 0)
        assert set(counts.values()) == {(1, 0)} and len(counts) == 5


def test_losses_over_ranks_equal_stock_loss(ranks):
    for mine, stock in ranks(2).run(jobs.kl_loss_against_plugin):
        torch.testing.assert_close(mine, stock, **FP32)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None)], ids=["tensor", "tuple"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logits_loss_is_stocks(wrap, reverse, temperature):
    student, teacher = logits(6, 2, 50), logits(6, 2, 50, seed=1)
    value, tp_reduce, is_sequence_parallel = losses.LogitsKLLoss(model_config(), temperature, reverse)(
        wrap(student), wrap(teacher)
    )
    first, second = (student, teacher) if not reverse else (teacher, student)
    expected = F.kl_div(
        F.log_softmax(first / temperature, -1), F.softmax(second / temperature, -1), reduction="none"
    ).sum(-1)
    torch.testing.assert_close(value, expected.transpose(0, 1), **FP32)
    assert value.shape == (2, 6) and not tp_reduce and not is_sequence_parallel


def test_temperature_squared_keeps_the_size_of_gradients():
    student, teacher = logits(6, 2, 50), logits(6, 2, 50, seed=1)
    plain, squared = (losses.LogitsKLLoss(model_config(), 4.0, temperature_squared=on) for on in (False, True))
    torch.testing.assert_close(squared(student, teacher)[0], 16 * plain(student, teacher)[0])


@pytest.mark.parametrize("loss", [losses.LogitsKLLoss, losses.MSELoss, losses.HiddenStateCosineLoss])
def test_different_sizes_are_refused_with_both(loss):
    with pytest.raises(ModelOptConfigError, match=r"50 and 56"):
        loss(model_config())(logits(3, 2, 50), logits(3, 2, 56))


def test_an_unknown_direction_is_refused():
    with pytest.raises(ModelOptConfigError, match="direction.*sideways.*jsd"):
        losses.LogitsKLLoss(model_config(), direction="sideways")


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ModelOptConfigError, match="positive"):
        losses.LogitsKLLoss(model_config(), temperature)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_intermediate_losses(sequence_parallel):
    student, teacher = logits(5, 2, 8).requires_grad_(), logits(5, 2, 8, seed=1).requires_grad_()
    config = model_config(sequence_parallel=sequence_parallel)
    mse, _, split = losses.MSELoss(config)(student, teacher)
    torch.testing.assert_close(mse, ((student - teacher) ** 2).sum(-1).transpose(0, 1))
    assert split is sequence_parallel
    cosine, _, split = losses.HiddenStateCosineLoss(config)((student, None), (teacher, None))
    expected = F.cosine_embedding_loss(student.view(-1, 8), teacher.view(-1, 8), torch.ones(1), reduction="none").view(
        5, 2
    )
    torch.testing.assert_close(cosine, expected.transpose(0, 1), **FP32)
    assert split is sequence_parallel
    (mse.sum() + cosine.sum()).backward()
    assert teacher.grad is None


def test_projection_is_the_identity_or_trainable():
    same = losses.ProjectionLayer(model_config(), model_config())
    assert not list(same.parameters())
    wider = losses.ProjectionLayer(model_config(sequence_parallel=True), model_config(hidden_size=12))
    assert {p.sequence_parallel for p in wider.parameters()} == {True}
    assert (wider._fit.bias == 0).all() and wider(logits(2, 1, 8)).shape == (2, 1, 12)
    loss = losses.MSELoss(model_config(), projection_layer=wider)(logits(2, 1, 8), logits(2, 1, 12))[0]
    loss.sum().backward()
    assert wider._fit.weight.grad is not None


LM = mtd.loss_balancers.STUDENT_LOSS_KEY


@pytest.mark.parametrize("skip, expected", [(True, 0.5 + 0.5), (False, 3.0 + 3.0)])
def test_dynamic_balance_reproduces_stocks_rule(skip, expected):
    parts = {LM: 3.0, "LogitsKLLoss_0": 0.5, "HiddenStateCosineLoss_1": 0.1, "MSELoss_2": 0.3}
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in parts.items()}
    out = losses.LogitsAndIntermediatesLossBalancer(skip_original_loss=skip)(dict(tensors))
    assert out["kd_loss"].item() == pytest.approx(expected)
    assert out["logits_loss"].item() == pytest.approx(0.5)
    assert out["intermediate_loss"].item() == pytest.approx(0.2)
    out["kd_loss"].backward()
    # The logits loss counts once (rescaled by 3 / 1 with a language-model loss), intermediates by 0.5 / 0.2 and by
    # their number; scales carry no gradient.
    scale = 1.0 if skip else 3.0
    assert tensors["LogitsKLLoss_0"].grad.item() == pytest.approx(scale)
    assert tensors["MSELoss_2"].grad.item() == pytest.approx(scale * 2.5 / 2)


@pytest.mark.parametrize("skip", [True, False])
def test_scale_of_the_distillation_loss_counts_with_and_without_lm_loss(skip):
    parts = {LM: torch.tensor(3.0), "LogitsKLLoss_0": torch.tensor(0.5)}
    balancer = losses.LogitsAndIntermediatesLossBalancer(kd_loss_scale=4.0, skip_original_loss=skip)
    assert balancer(parts)["kd_loss"].item() == pytest.approx(4 * 0.5 if skip else 3.0 + 4 * 3.0)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("intermediate", [0.0, 0.7])
def test_equal_models_and_masked_batches_divide_by_nothing(skip, intermediate):
    parts = {LM: torch.tensor(1.5), "LogitsKLLoss_0": torch.zeros((), requires_grad=True)}
    parts["MSELoss_1"] = torch.tensor(intermediate, requires_grad=True)
    out = losses.LogitsAndIntermediatesLossBalancer(skip_original_loss=skip)(parts)
    assert out["kd_loss"].isfinite()
    out["kd_loss"].backward()
    assert parts["MSELoss_1"].grad.isfinite()


@pytest.mark.parametrize("skip", [True, False])
def test_fixed_weights_are_the_weighed_sum(skip):
    parts = {LM: 3.0, "LogitsKLLoss_0": 0.5, "HiddenStateCosineLoss_1": 0.1, "MSELoss_2": 0.3}
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in parts.items()}
    balancer = losses.LogitsAndIntermediatesLossBalancer(
        skip_original_loss=skip, weights={"kd_logits": 2.0, "lm": 0.25, "intermediate": 0.0}
    )
    out = balancer(tensors)
    assert out["kd_loss"].item() == pytest.approx(2.0 * 0.5 + (0.0 if skip else 0.25 * 3.0))
    out["kd_loss"].backward()
    assert tensors["LogitsKLLoss_0"].grad.item() == 2.0 and tensors["MSELoss_2"].grad.item() == 0.0


@pytest.mark.parametrize("names", [[], ["MSELoss_0"], ["LogitsKLLoss_0", "LogitsKLLoss_1"]])
def test_balancer_needs_one_loss_on_logits(names):
    parts = {name: torch.tensor(1.0) for name in names}
    with pytest.raises(ModelOptConfigError, match="exactly one loss on logits"):
        losses.LogitsAndIntermediatesLossBalancer()(parts)

"""Output layers and logits loss in one: against fp64 PyTorch, its memory, and trainings with and without it."""

from __future__ import annotations

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo.collections.llm.modelopt._divergence.fused_linear import Objective, fused_linear_losses
from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from test_code.support import jobs_distill, ranks, tiny

# fp32 sums of some hundred products of unit size.
FP32 = {"rtol": 2e-5, "atol": 2e-5}


def problem(n=11, h=6, h_teacher=9, v=40, seed=0, dtype=torch.float32):
    """Return (student [n, h], weight [v, h], teacher, teacher's weight, token weights [n], labels [n])."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((n, h), (v, h), (n, h_teacher), (v, h_teacher))]
    mask = (torch.rand(n, generator=generator) < 0.7).float()
    labels = torch.randint(v, (n,), generator=generator)
    return [*(x.to(dtype) for x in tensors), mask, labels]


def reference_on_ranks(tensors, labels, scales, temperature=1.0, direction="forward", topk=None, cap=None):
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
    """Return, by case, this rank's losses and gradients over two shards, and those of one process in fp64."""
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
                expected = reference_on_ranks(tensors, labels, (0.5, 3.0), 2.0, direction, topk)
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
        for label, (paths, student) in cases.items():
            pair = []
            for path in paths:
                with jobs_distill.alone() if layout == "1 rank" else contextlib.nullcontext():
                    pair.append(
                        jobs_distill.distill(teacher_path, path, student, steps=3, metrics=True, **arguments)[1]
                    )
                ranks.reset()
            results[layout, label] = pair
    return results


def own_reduction(teacher_path, paths, tp):
    """Distill with a loss reduction of the user's own; return what is logged, or the error, for each settings file."""
    from unittest import mock

    from nemo.collections.llm.modelopt.distill import _fusion
    from nemo.collections.llm.modelopt.distill import model as module

    class Own(module._DistillationLossReduction):
        """Takes a tuple whose first element is the loss of every token, as modelopt's losses return it."""

        def _masked_token_loss(self, loss_output, mask):
            loss = loss_output[0] if isinstance(loss_output, tuple) else loss_output
            assert loss.shape == mask.shape
            return (loss * mask).sum() / mask.sum()

    results = []
    worth_it = mock.patch.object(_fusion, "_not_worth_it", return_value=None)
    for path in paths:
        with mock.patch.object(module, "_DistillationLossReduction", Own), worth_it:
            try:
                results.append(jobs_distill.distill(teacher_path, path, steps=3, metrics=True, tp=tp)[1])
            except ModelOptConfigError as error:
                results.append(str(error))
        ranks.reset()
    return results


def unknown_length():
    """Return whether a loss is fused for a student without a sequence length, by ``fused_logits``."""
    from unittest import mock

    from nemo.collections.llm.modelopt.distill import _fusion
    from nemo.collections.llm.modelopt.distill.loss import LogitsKLLoss
    from nemo.collections.llm.modelopt.distill.utils import DistillationConfig

    tiny.init_parallel()
    config = tiny.config()
    student, teacher = (config.configure_model(tiny.tokenizer()) for _ in range(2))
    config.seq_length = 0
    found = {}
    for choice in ("auto", "on"):
        settings = DistillationConfig(fused_logits=choice)
        settings.criterion = {settings.logit_layers: LogitsKLLoss(config)}
        with mock.patch.object(_fusion, "logging") as logging:
            found[choice] = _fusion.choose_fused(student, teacher, settings), logging.info.call_args.args[0]
    return found


def output_layers(cases):
    """Return, for each case of a changed output layer, the reason why it is not fused, or None."""
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


def compare(tensors, labels, objective, scales=(0.5, 3.0), tolerance=None, **reference):
    """Compare losses and gradients with the fp64 reference."""
    mine = [x.clone() for x in tensors]
    mine[0].requires_grad_()
    mine[1].requires_grad_()
    losses = fused_linear_losses(*mine, objective, labels)
    (scales[0] * losses.divergence + scales[1] * losses.lm).backward()
    expected = reference_on_ranks(
        tensors, labels, scales, objective.temperature, objective.direction, objective.topk, objective.student_cap
    )
    for value, wanted in zip((*losses, mine[0].grad, mine[1].grad), expected, strict=True):
        torch.testing.assert_close(value.double(), wanted.double(), **(tolerance or FP32))
    assert not losses.agreement.requires_grad


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 20),
    h=st.integers(1, 9),
    v=st.integers(2, 60),
    rows=st.integers(1, 9),
    temperature=st.floats(0.5, 4.0),
    direction=st.sampled_from(["forward", "reverse", "jsd"]),
    topk=st.none() | st.integers(1, 70),
    with_lm=st.booleans(),
    cap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 99),
)
def test_losses_and_gradients_equal_fp64(n, h, v, rows, temperature, direction, topk, with_lm, cap, seed):
    *tensors, labels = problem(n, h, h + 2, v, seed)
    objective = Objective(temperature, direction, topk, student_cap=cap, teacher_cap=cap, chunk_rows=rows)
    compare(tensors, labels if with_lm else None, objective)


@pytest.mark.parametrize("with_lm", [False, True])
def test_bf16_weights_are_accumulated_in_fp32(with_lm):
    *tensors, labels = problem(64, 16, 24, 120, dtype=torch.bfloat16)
    # Logits, their gradient and the results are rounded to 8 bits of mantissa each.
    tolerance = {"rtol": 2e-2, "atol": 6e-2}
    tensors[:4] = [x * 0.5 for x in tensors[:4]]
    tensors[4] = torch.ones(64)
    mine = [x.clone() for x in tensors]
    for x in mine[:2]:
        x.requires_grad_()
    losses = fused_linear_losses(*mine, Objective(chunk_rows=5), labels if with_lm else None)
    (losses.divergence + losses.lm).backward()
    expected = reference_on_ranks(tensors, labels if with_lm else None, (1.0, 1.0))
    for value, wanted in zip((losses.divergence, losses.lm), expected[:2], strict=True):
        torch.testing.assert_close(value.double(), wanted.double(), rtol=1e-2, atol=1e-2)
    for x, wanted in zip(mine[:2], expected[3:], strict=True):
        assert x.grad.dtype == torch.bfloat16
        torch.testing.assert_close(x.grad.double(), wanted, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_lm", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("rounded", [False, True], ids=["fp32 hidden states", "hidden states of an autocast layer"])
def test_autocast_computes_what_an_output_layer_would(dtype, with_lm, cap, inside, rounded):
    """Products in autocast's type, and fp32 gradients of fp32 weights as close to fp64 as those of plain layers."""
    *tensors, labels = problem(64, 16, 24, 120)
    tensors[:4] = [x * 0.5 for x in tensors[:4]]
    if rounded:
        tensors[0], tensors[2] = tensors[0].to(dtype), tensors[2].to(dtype)
    labels = labels if with_lm else None

    def gradients(loss):
        leaves = [x.clone() for x in tensors]
        for x in leaves[:2]:
            x.requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            value = loss(*leaves)
            if inside:
                value.backward()
        if not inside:
            value.backward()
        return value.detach(), leaves[0].grad, leaves[1].grad

    def fused(*leaves):
        losses = fused_linear_losses(*leaves, Objective(chunk_rows=5, student_cap=cap, teacher_cap=cap), labels)
        return losses.divergence + losses.lm

    def plain(student, weight, teacher, teacher_weight, mask):
        z, y = F.linear(student, weight), F.linear(teacher, teacher_weight)
        assert z.dtype == dtype
        if cap:
            z, y = (cap * torch.tanh(x / cap) for x in (z, y))
        log_p, log_q = (x.float().log_softmax(-1) for x in (z, y))
        value = ((log_q.exp() * (log_q - log_p)).sum(-1) * mask).sum()
        return value if labels is None else value + (F.cross_entropy(z.float(), labels, reduction="none") * mask).sum()

    exact = reference_on_ranks(tensors, labels, (1.0, 1.0), cap=cap)
    wanted = [exact[0] + exact[1], *exact[3:]]
    for mine, theirs, true in zip(gradients(fused), gradients(plain), wanted, strict=True):
        assert mine.dtype == theirs.dtype
        own, other = ((x.double() - true).norm() / true.norm() for x in (mine, theirs))
        # Both round logits and their gradient, in another order.
        assert own < 1.5 * other + 1e-4, (float(own), float(other))


@pytest.mark.parametrize("with_lm", [False, True])
def test_inputs_need_not_be_contiguous(with_lm):
    *tensors, labels = problem()
    tensors[:4] = [x.repeat(1, 2)[:, ::2] for x in tensors[:4]]
    assert not tensors[0].is_contiguous()
    compare(tensors, labels if with_lm else None, Objective(chunk_rows=4))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("with_lm", [False, True])
def test_a_compiled_caller_gets_the_same_bits(backend, with_lm):
    *tensors, labels = problem()

    def step(hidden, weight):
        losses = fused_linear_losses(
            hidden * 1.5, weight, *tensors[2:], Objective(chunk_rows=4), labels if with_lm else None
        )
        return 0.5 * losses.divergence + 3.0 * losses.lm

    results = []
    for function in (step, torch.compile(step, backend=backend)):
        leaves = [x.clone().requires_grad_() for x in tensors[:2]]
        with torch.compiler.set_stance("default"):  # the CPU backend compiles nothing
            value = function(*leaves)
            value.backward()
        results.append((value.detach(), *(x.grad for x in leaves)))
    torch._dynamo.reset()
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("with_lm", [False, True])
def test_a_frozen_output_layer_gets_no_gradient(with_lm):
    *tensors, labels = problem()
    student = tensors[0].clone().requires_grad_()
    losses = fused_linear_losses(student, *tensors[1:], Objective(chunk_rows=4), labels if with_lm else None)
    (0.5 * losses.divergence + 3.0 * losses.lm).backward()
    expected = reference_on_ranks(tensors, labels if with_lm else None, (0.5, 3.0))
    torch.testing.assert_close(student.grad.double(), expected[3], **FP32)


@pytest.mark.parametrize("with_lm", [False, True])
def test_accumulation_fusion_adds_to_main_grad(with_lm):
    *tensors, labels = problem()
    weight = torch.nn.Parameter(tensors[1].clone())
    weight.main_grad = torch.ones_like(weight)
    weight.grad_added_to_main_grad = False
    for _ in range(2):
        losses = fused_linear_losses(
            tensors[0], weight, *tensors[2:], Objective(main_grad=True), labels if with_lm else None
        )
        (0.5 * losses.divergence + 3.0 * losses.lm).backward()
    expected = reference_on_ranks(tensors, labels if with_lm else None, (0.5, 3.0))[4]
    torch.testing.assert_close(weight.main_grad.double(), 1 + 2 * expected, **FP32)
    # Megatron's hook requires a gradient, and does not add it.
    assert weight.grad_added_to_main_grad and (weight.grad == 0).all()


def test_a_second_backward_pass_is_refused():
    *tensors, _ = problem()
    tensors[0].requires_grad_()
    losses = fused_linear_losses(*tensors, Objective())
    losses.divergence.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second forward pass"):
        losses.divergence.backward()


@pytest.mark.parametrize("with_lm", [False, True])
def test_memory_does_not_grow_with_the_logits(with_lm):
    v, h, rows = 2000, 16, 8

    def extra(n):
        *tensors, labels = problem(n, h, h, v)
        for x in tensors[:2]:
            x.requires_grad_()

        def step():
            losses = fused_linear_losses(*tensors, Objective(chunk_rows=rows), labels if with_lm else None)
            (losses.divergence + losses.lm).backward()

        return tiny.peak_bytes(step)

    small, large = extra(64), extra(512)
    # What grows is d_hidden and a few numbers a token: 448 tokens' logits would take 3.6 MB.
    assert large - small < 448 * (4 * h + 200)
    assert small < 4 * v * (h + 12 * rows)


def test_a_split_vocabulary_equals_fp64(ranks):
    for results in ranks(2).run(split_vocabulary):
        assert len(results) == 12
        for label, (mine, expected) in results.items():
            for value, wanted in zip(mine, expected, strict=True):
                torch.testing.assert_close(value.double(), wanted.double(), **FP32, msg=lambda m, x=label: f"{x}: {m}")


def test_what_is_not_exact_is_not_fused_and_named(ranks):
    expected = {
        "plain": None,
        "quantized": "the teacher's output layer is a QuantColumnParallelLinear",
        "hooked": "the student's output layer has hooks",
        "gathered": "the student's output layer gathers the logits",
        "bias": "the student's output layer has a bias",
        "layers": "are not the output layers",
    }
    for reasons in ranks(2).run(output_layers, list(expected)):
        for case, text in expected.items():
            assert reasons[case] is None if text is None else text in reasons[case], (case, reasons[case])


SLOWER = "computed a second time"


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "options", "slower", "reason"),
    [
        # The gradient of the output weight in fp32 is more than the logits of few tokens.
        (4096, 128256 // 8, {"tensor_parallel": 8}, None, r"take about 298 MiB.* would take 566 MiB"),
        (4096, 128256 // 8, {"tensor_parallel": 8, "trained": False}, None, r"take about 298 MiB"),
        (32768, 128256, {}, None, None),
        (8192, 128256, {"trained": False}, None, None),
        (8192, 128256, {"lm_loss": True}, SLOWER, None),
        (2048, 32000, {"lm_loss": True}, SLOWER, r"take about 562 MiB.* would take 826 MiB"),
        (4096, 64000, {"lm_loss": True}, SLOWER, r"computed a second time, and only \d+ MiB would be saved"),
    ],
)
def test_auto_goes_by_memory(cpu_backend, tokens, vocabulary, options, slower, reason):
    from nemo.collections.llm.modelopt.distill._fusion import _not_worth_it
    from nemo_modelopt_dropin.preflight.loss_memory import Sizes

    found = _not_worth_it(Sizes(tokens, vocabulary, 3072, 4096, 2, **options), slower)
    assert found is None if reason is None else re.search(reason, found)


# --- trainings ---


@pytest.fixture(scope="module")
def teacher_path(ranks_factory, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "checkpoint"
    return ranks_factory(2).run(jobs_distill.teacher, str(path))[0]


CASES = {
    "with a language-model loss": ("skip_lm_loss: false\n", {}),
    "tied, topk, fixed weights": (
        "skip_lm_loss: false\nlogit_kl_topk: 20\nlogit_kl_direction: jsd\nlogit_kl_temperature: 2\n"
        "loss_weights: {kd_logits: 2.0, lm: 0.3}\n",
        {"share_embeddings_and_output_weights": True},
    ),
    "a pair of layers, per-token loss": (
        "intermediate_layer_pairs: [[decoder.final_layernorm, decoder.final_layernorm]]\n",
        {"calculate_per_token_loss": True},
    ),
}


@pytest.fixture(scope="module")
def trainings(ranks_factory, teacher_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    cases = {}
    for number, (label, (text, student)) in enumerate(CASES.items()):
        paths = [folder / f"{number}-{fused}.yaml" for fused in ("on", "off")]
        for path in paths:
            path.write_text(f"{text}fused_logits: {path.stem.split('-')[1]}\n")
        cases[label] = ([str(path) for path in paths], student)
    return ranks_factory(2).run(fused_and_chunked, teacher_path, cases)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["1 rank", "TP=2", "TP=2 SP", "PP=2"])
def test_trainings_are_the_same_with_and_without(trainings, layout, case):
    for results in trainings:
        fused, chunked = results[layout, case]
        assert len(fused) == len(chunked) == 3
        for mine, theirs in zip(fused, chunked, strict=True):
            # Counted in the fused pass, and with the logits at hand.
            assert mine["kd_top1_agreement"] == pytest.approx(theirs["kd_top1_agreement"], abs=1e-6)
            assert 0.0 <= mine["kd_top1_agreement"] <= 1.0 and mine["teacher_lm_loss"] > 1.0
            # fp32 sums in another order. Adam carries the rounding of the smallest gradients on at full size.
            common = {name: value for name, value in theirs.items() if "loss" in name}
            assert {name: mine[name] for name in common} == pytest.approx(common, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_reduction_of_ones_own_gets_the_loss_of_every_token(ranks, teacher_path, tmp_path, tp):
    paths = [str(tmp_path / f"{fused}.yaml") for fused in ("auto", "off", "on")]
    for path in paths:
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"skip_lm_loss: false\nlogit_kl_direction: reverse\nfused_logits: {path.split('/')[-1][:-5]}\n")
    for auto, off, on in ranks(tp).run(own_reduction, teacher_path, paths, tp):
        assert len(auto) == len(off) == 3
        for mine, theirs in zip(auto, off, strict=True):
            common = {name: value for name, value in theirs.items() if "loss" in name}
            assert {name: mine[name] for name in common} == pytest.approx(common, rel=1e-5)
            assert mine["lm_loss"] > 1.0
        assert "fused_logits='on' needs the loss reduction of DistillationGPTModel" in on


def test_an_unknown_length_of_the_samples_is_not_worth_it(ranks):
    (found,) = ranks(1).run(unknown_length)
    assert found["auto"][0] is False and "the length of the samples is unknown" in found["auto"][1]
    assert found["on"][0] is True


@pytest.mark.parametrize(("cap", "expected"), [(30.0, 30.0), (None, None)])
def test_the_cap_of_gemma_is_found(cpu_backend, cap, expected):
    from nemo.collections.llm.gpt.model import gemma2

    from nemo.collections.llm.modelopt.distill._deferred_logits import softcap

    layer = gemma2.Gemma2OutputLayer.__new__(gemma2.Gemma2OutputLayer)
    torch.nn.Module.__init__(layer)
    layer.config = gemma2.Gemma2Config2B(final_logit_softcapping=cap)
    assert softcap(layer) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (SimpleNamespace(data_sampler=SimpleNamespace(seq_len=32), seq_length=64), 32),
        (SimpleNamespace(seq_length=64), 64),
        (SimpleNamespace(seq_length=None), None),
        (None, None),
    ],
)
def test_the_estimate_takes_the_length_of_the_samples(cpu_backend, data, expected):
    """A model's own ``seq_length`` is the most that it can process; models from Mistral's importer have None."""
    from nemo.collections.llm.modelopt.distill import _fusion

    length = _fusion.sample_length(data)
    assert length == expected
    layer = SimpleNamespace(weight=torch.zeros(8, 4), output_size_per_partition=8)
    fields = {"context_parallel_size": 1, "hidden_size": 4, "params_dtype": torch.float32}
    model = SimpleNamespace(
        config=SimpleNamespace(seq_length=None, tensor_model_parallel_size=1, **fields), output_layer=layer
    )
    sizes = _fusion._sizes(model, model, SimpleNamespace(sample_length=length, skip_lm_loss=True))
    assert (None if sizes is None else sizes.tokens) == expected


@pytest.mark.parametrize("option", ["fsdp", "use_megatron_fsdp", "use_custom_fsdp"])
def test_megatron_fsdp_is_not_fused(cpu_backend, option):
    """Its output weights are whole only while their layers run."""
    from nemo.collections.llm.modelopt.distill import _fusion
    from nemo.collections.llm.modelopt.distill._config import DistillationConfig

    strategy = tiny.strategy(fsdp="megatron") if option == "fsdp" else tiny.strategy()
    if option != "fsdp":
        setattr(strategy.ddp_config, option, True)
    with pytest.raises(ModelOptConfigError, match="'on' is not supported with Megatron-FSDP .* Use 'auto' or 'off'"):
        _fusion.settings_for(strategy, DistillationConfig(fused_logits="on"))
    settings = DistillationConfig(logit_kl_topk=8)
    assert _fusion.settings_for(strategy, settings) == DistillationConfig(logit_kl_topk=8, fused_logits="off")
    assert settings.fused_logits == "auto"
    assert _fusion.settings_for(tiny.strategy(), settings) is settings

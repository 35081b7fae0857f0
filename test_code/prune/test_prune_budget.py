"""Pruning to a number of parameters, importance under a loss mask, and mixtures of experts."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from test_code.support import installed, tolerances
from test_code.support import jobs_prune as jobs

needs_experts = pytest.mark.skipif(
    not installed.EXPERTS_PRUNE,
    reason="refused on this modelopt: see test_experts_are_refused_where_modelopt_prunes_none",
)
SIZES = {
    "num_layers": 12,
    "hidden_size": 1024,
    "ffn_hidden_size": 4096,
    "num_attention_heads": 16,
    "num_query_groups": 4,
}

MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_shared_expert_intermediate_size": 32,
    "moe_grouped_gemm": False,
    "moe_token_dispatcher_type": "alltoall",
    "num_layers": 3,
}


def counts(models: list[tuple[dict, dict]]) -> list[dict]:
    """Return, for each model and request, counted and real numbers of parameters before and after pruning."""
    from nemo.collections.llm.modelopt.prune import _checks, _count, _report, describe_pruning
    from test_code.support import ranks, tiny

    out = []
    for sizes, request in models:
        model, module, run = jobs.build(**sizes)
        core = tiny.core(model)
        terms, before = _count.model_terms(core), _checks.model_sizes(core)
        found = {"before": (_count.count(terms, before, range(1, before["num_layers"] + 1)), _report.measure(core))}
        jobs.run_prune(model, request, module, run)
        after = _checks.model_sizes(core)
        kept = describe_pruning(model)["kept_layers"]
        real = sum(parameter.numel() for parameter in core.parameters())
        out.append(found | {"after": (_count.count(terms, after, kept), _report.measure(core)), "real": real})
        ranks.reset()
    return out


def budget_on_ranks(request: dict, **settings) -> dict:
    """Prune to a budget; return report, sizes, the data's tokens, and logits on held-out data before and after."""
    from nemo.collections.llm.modelopt.prune import describe_pruning
    from test_code.support import tiny

    model, module, run = jobs.build(**settings)
    forwards: list[int] = []
    handle = tiny.core(model).register_forward_pre_hook(lambda *_: forwards.append(1))
    whole = torch.distributed.get_world_size() == 1
    heldout = [module.val_dataloader().dataset[i] for i in range(8)]
    tokens = torch.stack([row["tokens"] for row in heldout])
    before = jobs.logits(model, tokens) if whole else None
    forwards.clear()
    jobs.run_prune(model, request, module, run)
    handle.remove()
    return {
        "report": describe_pruning(model),
        "sizes": jobs.sizes(model),
        "forwards": len(forwards),
        "weights": jobs.weights(model),
        "labels": torch.stack([row["labels"] for row in heldout]),
        "mask": torch.stack([row["loss_mask"] for row in heldout]),
        "before": before,
        "after": jobs.logits(model, tokens) if whole else None,
    }


def broken_candidate() -> tuple[str, list[str], bool, dict]:
    """Fail while candidates are tried; return the error, what changed, whether weights stayed, and sizes pruned to."""
    from nemo.collections.llm.modelopt.prune import _heldout
    from test_code.support import tiny

    model, module, run = jobs.build()
    before, old = jobs.fingerprint_of_state(model, module, run), jobs.weights(model)
    config = dict(vars(tiny.core(model).config))
    evaluate, error = _heldout.evaluate, ""
    request = {"target_params": "70%", "max_candidates": 3, "heldout_batches": 1}

    def break_down(*_):
        raise OSError("the disk is gone")

    _heldout.evaluate = break_down
    try:
        jobs.run_prune(model, request, module, run)
    except OSError as problem:
        error = str(problem)
    finally:
        _heldout.evaluate = evaluate
    after, new = jobs.fingerprint_of_state(model, module, run), jobs.weights(model)
    changed = [name for name in before if name != "loader" and before[name] != after[name]]
    changed += [name for name, value in vars(tiny.core(model).config).items() if config[name] is not value]
    same = old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    jobs.run_prune(model, request, module, run)
    return error, changed, same, jobs.sizes(model)


class Padded(torch.utils.data.Dataset):
    """Samples of unequal length in windows of ``seq_length``, or of one short length; padding is loud noise."""

    def __init__(self, length: int, seq_length: int, short: int):
        self.length, self.seq_length, self.short = length, seq_length, short

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(int(index))
        ids = torch.randint(3, 250, (self.seq_length + 1,), generator=generator)
        if self.seq_length > self.short:
            ids[self.short :] = 7 + index % 3
        mask = (torch.arange(self.seq_length) < self.short).float()
        return {
            "tokens": ids[:-1],
            "labels": ids[1:],
            "loss_mask": mask,
            "position_ids": torch.arange(self.seq_length),
            "attention_mask": torch.ones(1, self.seq_length, self.seq_length, dtype=torch.bool).triu(1),
        }


def pruned_on_padding(seq_length: int, short: int, request: dict, ignore_mask: bool = False, **settings) -> dict:
    """Prune on samples of ``short`` tokens in windows of ``seq_length``."""
    from nemo.collections.llm.modelopt.prune import _weights, describe_pruning
    from test_code.support import tiny

    model, module, run = jobs.build(data={"seq_length": seq_length}, seq_length=32, **settings)
    # The same tokens in both: the generator draws as many as the window is long.
    dataset = Padded(16, seq_length, short)
    module.train_dataloader = lambda: torch.utils.data.DataLoader(dataset, num_workers=0)
    before, see = jobs.weights(model), _weights.MicroBatch.see
    if ignore_mask:
        _weights.MicroBatch.see = lambda *_: None
    try:
        jobs.run_prune(model, request, module, run)
    finally:
        _weights.MicroBatch.see = see
    return {
        "before": before,
        "after": jobs.weights(model),
        "report": describe_pruning(model),
        "core": type(tiny.core(model)).__name__,
    }


def moe(request: dict, silent_expert: int | None = None, **settings) -> dict:
    """Prune a mixture of experts; one of them may never get a token."""
    from nemo.collections.llm.modelopt.prune import describe_pruning
    from test_code.support import tiny

    model, module, run = jobs.build(**{**MOE, **settings})
    core = tiny.core(model)
    if silent_expert is not None:
        with torch.no_grad():
            for layer in core.decoder.layers:
                # Of two opposite rows one has a positive score, so that a row of zeros is never the best.
                rows = layer.mlp.router.weight
                rows[silent_expert] = 0
                rows[silent_expert - 1] = -rows[silent_expert + 1]
    before = jobs.weights(model)
    jobs.run_prune(model, request, module, run)
    names = ("num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
    result = {
        "before": before,
        "after": jobs.weights(model),
        "sizes": {**jobs.sizes(model), **{name: getattr(core.config, name) for name in names}},
        "report": describe_pruning(model),
    }
    with torch.no_grad():
        result["logits"] = jobs.logits(model)
    return result


def counted(sizes) -> int:
    """Return the parameters of a gated GPT of these sizes with 64 channels a head and a vocabulary of 1000."""
    h, heads, groups = sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_query_groups"]
    layer = h * 64 * (2 * heads + 2 * groups) + 3 * h * sizes["ffn_hidden_size"] + 2 * h
    return sizes["num_layers"] * layer + 2000 * h + h


@pytest.fixture(scope="module")
def candidates(cpu_backend):
    from nemo.collections.llm.modelopt.prune import _candidates

    return _candidates


class TestBudgets:
    @pytest.mark.parametrize(
        ("value", "number"),
        [("70%", 0.7), (0.7, 0.7), (5.6e9, 5.6e9), ("5.6B", 5.6e9), (" 700m ", 7e8), (123456, 123456), ("1e6", 1e6)],
    )
    def test_shares_and_numbers(self, candidates, value, number):
        assert candidates.parse_budget("target_params", value) == pytest.approx(number)

    @pytest.mark.parametrize("value", [0, -1, "0%", "100%", "140%", "many", "", True, float("nan"), float("inf"), [7]])
    def test_refused(self, cpu_backend, value):
        from nemo.collections.llm.modelopt.prune import PruningConfig

        with pytest.raises(ValueError, match=r"target_params=.* is not a valid parameter budget; use a fraction"):
            PruningConfig(target_params=value)

    @pytest.mark.parametrize("value", [60, "60", 99.5, "100"])
    def test_per_cent_without_the_sign_are_refused(self, cpu_backend, value):
        from nemo.collections.llm.modelopt.prune import PruningConfig

        with pytest.raises(
            ValueError, match=rf"target_params=.* parameters; for a fraction .* use '{float(value):g}%'"
        ):
            PruningConfig(target_params=value)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"target_params": "50%", "drop_layers": [1]}, r"cannot be used.*drop_layers=\[1\], target_params"),
            ({"target_params": "50%", "max_candidates": 0}, "max_candidates=0; pass a whole number of at least 1"),
            ({"target_params": "50%", "max_candidates": 2.5}, r"max_candidates=2\.5"),
            ({"target_params": "50%", "heldout_batches": 0}, "heldout_batches=0; pass a whole number"),
            ({"target_active_params": "none"}, "target_active_params='none' is not a valid parameter budget"),
        ],
    )
    def test_contradictions_refused(self, cpu_backend, fields, message):
        from nemo.collections.llm.modelopt.prune import PruningConfig

        with pytest.raises(ValueError, match=message):
            PruningConfig(**fields)

    @settings(deadline=None, max_examples=25)
    @given(share=st.floats(0.3, 0.95), layers=st.sampled_from([None, 9]), count=st.integers(1, 12))
    def test_candidates_keep_the_budget_and_use_it(self, candidates, share, layers, count):
        budget = int(share * counted(SIZES))
        fixed = {} if layers is None else {"num_layers": layers}
        found = candidates.choose(SIZES, fixed, counted, counted, (budget, None), count)
        assert 1 <= len(found) <= count
        assert len({tuple(candidate.sizes.values()) for candidate in found}) == len(found)
        for candidate in found:
            sizes = candidate.sizes
            assert counted(sizes) == candidate.parameters <= budget
            assert all(1 <= sizes[name] <= SIZES[name] for name in SIZES)
            assert sizes["hidden_size"] % 64 == sizes["ffn_hidden_size"] % 64 == 0
            assert sizes["num_attention_heads"] % sizes["num_query_groups"] == 0
            assert layers in (None, sizes["num_layers"])
            wider = {**sizes, "ffn_hidden_size": sizes["ffn_hidden_size"] + 64}
            assert counted(wider) > budget or sizes["ffn_hidden_size"] == SIZES["ffn_hidden_size"]

    def test_depth_and_width_are_both_tried(self, candidates):
        found = candidates.choose(SIZES, {}, counted, counted, (counted(SIZES) // 2, None), 16)
        assert len(found) == 16
        assert len({candidate.sizes["num_layers"] for candidate in found}) > 3
        assert len({candidate.sizes["hidden_size"] for candidate in found}) > 3

    def test_heads_without_groups_go_with_their_groups(self, candidates):
        sizes = {**SIZES, "num_query_groups": 16}
        found = candidates.choose(sizes, {}, counted, counted, (counted(sizes) // 2, None), 16)
        assert {c.sizes["num_query_groups"] - c.sizes["num_attention_heads"] for c in found} == {0}
        assert len({c.sizes["num_attention_heads"] for c in found}) > 1

    def test_what_cannot_be_reached_is_refused_with_the_least(self, candidates):
        with pytest.raises(ValueError, match=r"at most 2,000 parameters; the smallest has [\d,]+ .*larger budget"):
            candidates.choose(SIZES, {}, counted, counted, (2000, None), 4)
        with pytest.raises(ValueError, match="nothing left to choose"):
            candidates.choose(SIZES, SIZES, counted, counted, (counted(SIZES) // 2, None), 4)
        with pytest.raises(ValueError, match=r"not fewer than the model's 1,000"):
            candidates.resolve_budget("target_params", 1000, 1000)


REQUEST = {"target_params": "70%", "max_candidates": 4, "heldout_batches": 2}


@pytest.fixture(scope="module")
def searched(ranks_factory):
    """A model pruned to 70% by search, on one rank; eight micro-batches of two."""
    return ranks_factory(1).run(budget_on_ranks, REQUEST, batches=8)[0]


class TestSearch:
    def test_the_candidate_of_lowest_loss_is_kept(self, searched):
        report, sizes = searched["report"], searched["sizes"]
        tried = report["candidates"]
        (chosen,) = [candidate for candidate in tried if candidate["chosen"]]
        assert len(tried) == 4
        assert chosen["loss"] == min(candidate["loss"] for candidate in tried)
        assert all(sizes[name] == size for name, size in chosen["sizes"].items())
        assert chosen["parameters"] == report["after"]["parameters"] <= 0.7 * report["before"]["parameters"]

    def test_loss_and_divergence_are_those_of_the_logits(self, searched):
        (chosen,) = [candidate for candidate in searched["report"]["candidates"] if candidate["chosen"]]
        mask = searched["mask"].double()
        logs = {name: searched[name].double().log_softmax(-1) for name in ("before", "after")}
        losses = {
            name: -(value.gather(-1, searched["labels"][..., None])[..., 0] * mask).sum() / mask.sum()
            for name, value in logs.items()
        }
        kl = ((logs["before"].exp() * (logs["before"] - logs["after"])).sum(-1) * mask).sum() / mask.sum()
        # fp32 logits of another matmul.
        assert chosen["loss"] == pytest.approx(float(losses["after"]), rel=tolerances.of("loss"))
        assert searched["report"]["original_heldout_loss"] == pytest.approx(
            float(losses["before"]), rel=tolerances.of("loss")
        )
        assert chosen["kl"] == pytest.approx(float(kl), rel=1e-4)

    def test_importance_is_measured_once(self, searched):
        # 8 to measure importance, 2 global batches of 2 for the original, and as many for each candidate.
        assert searched["forwards"] == 8 + 4 + 4 * 4

    def test_same_as_the_sizes_given(self, ranks, searched):
        before = searched["report"]["before"]
        sizes = {f"target_{name}": size for name, size in searched["sizes"].items() if size != before.get(name, size)}
        given = ranks(1).run(jobs.prune, sizes, batches=8)[0]["after"]
        assert all(torch.equal(given[name], value) for name, value in searched["weights"].items())

    @pytest.mark.parametrize(("layout", "batches"), [({"pp": 2}, 8), ({}, 4)], ids=["two stages", "two replicas"])
    def test_two_ranks_choose_as_one(self, ranks, searched, layout, batches):
        for rank in ranks(2).run(budget_on_ranks, REQUEST, batches=batches, **layout):
            tried = rank["report"]["candidates"]
            for mine, other in zip(tried, searched["report"]["candidates"], strict=True):
                assert mine["sizes"] == other["sizes"]
                assert mine["chosen"] == other["chosen"]
                # The same sums in another order.
                assert (mine["loss"], mine["kl"]) == pytest.approx(
                    (other["loss"], other["kl"]), rel=tolerances.of("loss")
                )
            assert all(torch.equal(value, searched["weights"][name]) for name, value in rank["weights"].items())

    def test_a_stage_that_loses_all_its_layers(self, ranks, tmp_path):
        request = {"target_params": "60%", "target_num_layers": 2, "max_candidates": 2, "heldout_batches": 1}
        one = ranks(1).run(budget_on_ranks, request, batches=4)[0]
        request["report_path"] = str(tmp_path / "report")
        for rank in ranks(4).run(budget_on_ranks, request, batches=4, pp=4):
            assert rank["sizes"] == one["sizes"]
            for mine, other in zip(rank["report"]["candidates"], one["report"]["candidates"], strict=True):
                assert mine["loss"] == pytest.approx(other["loss"], rel=tolerances.of("loss"))
            assert rank["report"]["cost"] == one["report"]["cost"]
            assert all(torch.equal(value, one["weights"][name]) for name, value in rank["weights"].items())

    def test_sizes_given_too_stay_fixed(self, ranks):
        request = {"target_params": 100_000, "target_num_layers": 3, "max_candidates": 2, "heldout_batches": 1}
        report = ranks(1).run(budget_on_ranks, request)[0]["report"]
        assert {candidate["sizes"]["num_layers"] for candidate in report["candidates"]} == {3}
        assert report["after"]["parameters"] <= 100_000

    def test_a_failure_leaves_the_model_untouched(self, ranks):
        error, changed, same, sizes = ranks(1).run(broken_candidate)[0]
        assert error == "the disk is gone"
        assert changed == []
        assert same
        assert sizes["num_layers"] <= 4

    def test_refused_before_anything_runs(self, ranks):
        cases = [
            ({"target_params": 10_000_000}, "not fewer than the model's 180,800"),
            ({"target_params": 5000}, "no combination of sizes has at most 5,000 parameters; the smallest has"),
            ({"target_active_params": "50%"}, "is for mixture-of-experts models"),
            ({"target_params": "50%", "target_hidden_size": 65}, "above the model's 64"),
        ]
        messages = ranks(1).run(jobs.refused_all, [request for request, _ in cases])[0]
        for (request, expected), message in zip(cases, messages, strict=True):
            assert expected in message, request

    @pytest.mark.parametrize(
        ("model", "request_"),
        [
            ({}, {"target_hidden_size": 48, "target_ffn_hidden_size": 64, "target_num_layers": 2}),
            (
                {"share_embeddings_and_output_weights": True, "qk_layernorm": True},
                {"target_num_attention_heads": 2, "target_num_query_groups": 1, "target_hidden_size": 40},
            ),
            (
                {
                    "normalization": "LayerNorm",
                    "gated_linear_unit": False,
                    "add_bias_linear": True,
                    "add_qkv_bias": True,
                    "position_embedding_type": "learned_absolute" if installed.LEARNED_POSITIONS_PRUNE else "none",
                },
                {"target_ffn_hidden_size": 72, "target_hidden_size": 32},
            ),
            pytest.param(
                MOE,
                {"target_num_moe_experts": 3, "target_moe_ffn_hidden_size": 24, "target_hidden_size": 48},
                marks=needs_experts,
            ),
        ],
        ids=["plain", "tied embeddings", "biases and positions", "experts"],
    )
    def test_parameters_are_counted_as_they_are(self, ranks, model, request_):
        (found,) = ranks(1).run(counts, [(model, request_)])[0]
        for when in ("before", "after"):
            number, measured = found[when]
            assert number == measured["parameters"]
        assert found["real"] == found["after"][0]


class TestLossMask:
    """Samples of 16 tokens alone, and the same with 16 tokens of padding behind them that the loss mask leaves out."""

    @pytest.mark.parametrize(
        ("request_", "model"),
        [
            (
                {"target_num_layers": 3, "target_ffn_hidden_size": 64, "target_hidden_size": 40},
                {"num_layers": 4},
            ),
            ({"target_num_attention_heads": 2, "target_num_query_groups": 1}, {}),
            pytest.param(
                {"target_num_moe_experts": 3, "target_moe_ffn_hidden_size": 24, "target_num_layers": 2},
                MOE,
                marks=needs_experts,
            ),
        ],
        ids=["width and depth", "query groups", "experts"],
    )
    def test_padding_does_not_count(self, ranks, request_, model):
        alone = ranks(1).run(pruned_on_padding, 16, 16, request_, **model)[0]
        padded = ranks(1).run(pruned_on_padding, 32, 16, request_, **model)[0]
        # Sums over other shapes.
        assert padded["report"]["layer_scores"] == pytest.approx(alone["report"]["layer_scores"], rel=1e-4)
        assert padded["report"]["kept_layers"] == alone["report"]["kept_layers"]
        assert all(torch.equal(value, padded["after"][name]) for name, value in alone["after"].items())

    def test_padding_would_have_changed_the_result(self, ranks):
        request = {"target_ffn_hidden_size": 64}
        alone = ranks(1).run(pruned_on_padding, 16, 16, request)[0]["after"]
        counting = ranks(1).run(pruned_on_padding, 32, 16, request, ignore_mask=True)[0]["after"]
        assert any(not torch.equal(value, counting[name]) for name, value in alone.items())


class TestExperts:
    REQUEST = {
        "target_num_moe_experts": 3,
        "target_moe_ffn_hidden_size": 24,
        "target_moe_shared_expert_intermediate_size": 16,
        "target_hidden_size": 48,
        "target_num_layers": 2,
    }

    @needs_experts
    def test_experts_and_their_layers_shrink(self, ranks):
        out = ranks(1).run(moe, self.REQUEST)[0]
        for name, size in self.REQUEST.items():
            assert out["sizes"][name.removeprefix("target_")] == size
        assert torch.isfinite(out["logits"]).all()
        experts = {name.split("local_experts.")[1][0] for name in out["after"] if "local_experts" in name}
        assert experts == {"0", "1", "2"}
        assert out["after"]["decoder.layers.0.mlp.router.weight"].shape == (3, 48)
        assert out["after"]["decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight"].shape == (48, 48)
        assert out["after"]["decoder.layers.1.mlp.shared_experts.linear_fc2.weight"].shape == (48, 16)

    @needs_experts
    def test_an_expert_that_gets_no_token_goes_and_the_router_loses_its_row(self, ranks):
        one = {"moe_router_topk": 1, "moe_router_pre_softmax": True}
        out = ranks(1).run(moe, {"target_num_moe_experts": 3}, silent_expert=1, **one)[0]
        for layer in range(3):
            rows = out["before"][f"decoder.layers.{layer}.mlp.router.weight"]
            kept = out["after"][f"decoder.layers.{layer}.mlp.router.weight"]
            numbers = [int((rows == row).all(dim=1).nonzero()[0]) for row in kept]
            assert 1 not in numbers
            for new, old in enumerate(numbers):
                prefix = f"decoder.layers.{layer}.mlp.experts.local_experts."
                for linear in (".linear_fc1.weight", ".linear_fc2.weight"):
                    assert torch.equal(
                        out["after"][prefix + str(new) + linear], out["before"][prefix + str(old) + linear]
                    )

    @needs_experts
    def test_a_budget_of_active_parameters(self, ranks):
        request = {"target_active_params": "75%", "max_candidates": 3, "heldout_batches": 1}
        report = ranks(1).run(moe, request)[0]["report"]
        used = report["before"]["active_parameters"]
        assert used < report["before"]["parameters"]
        assert all(candidate["active_parameters"] <= 0.75 * used for candidate in report["candidates"])

    @pytest.mark.skipif(installed.EXPERTS_PRUNE, reason="this modelopt prunes them: the other tests of this class")
    def test_experts_are_refused_where_modelopt_prunes_none(self, ranks, tmp_path):
        requests = [
            ({"target_num_moe_experts": 3}, "target_num_moe_experts"),
            ({"target_moe_ffn_hidden_size": 24, "target_num_layers": 2}, "target_moe_ffn_hidden_size"),
            ({"target_moe_shared_expert_intermediate_size": 16}, "target_moe_shared_expert_intermediate_size"),
            # Their inputs would stay as wide as they were.
            ({"target_hidden_size": 48}, "target_hidden_size"),
            ({"target_params": "75%"}, "target_params"),
            ({"target_active_params": "75%"}, "target_active_params"),
        ]
        said = ranks(1).run(jobs.refused_all, [request for request, _ in requests], **MOE)[0]
        unloaded = [(request, 1) for request, _ in requests]
        early = ranks(1).run(jobs.refused_by_checkpoint, str(tmp_path / "moe"), unloaded, **MOE)[0]
        assert early == said
        for (_, name), message in zip(requests, said, strict=True):
            assert "This modelopt prunes no experts" in message and "install modelopt 0.43" in message
            assert name in message

    def test_heads_and_layers_go_from_around_experts(self, ranks):
        request = {"target_num_attention_heads": 2, "target_num_query_groups": 1, "target_num_layers": 2}
        out = ranks(1).run(moe, request)[0]
        assert {f"target_{name}": size for name, size in out["sizes"].items() if f"target_{name}" in request} == request
        assert torch.isfinite(out["logits"]).all()
        kept = out["report"]["kept_layers"]
        for name, value in out["after"].items():
            if ".mlp." in name:
                number = int(name.split("layers.")[1].split(".")[0])
                assert torch.equal(value, out["before"][name.replace(f".{number}.", f".{kept[number] - 1}.", 1)]), name

    @needs_experts
    def test_too_few_experts_are_refused(self, ranks):
        (message,) = ranks(1).run(jobs.refused_all, [{"target_num_moe_experts": 1}], **MOE)[0]
        assert "a token is sent to 2 experts" in message
        assert "allowed: [2, 3, 4]" in message


class TestReport:
    def test_costs_are_counted_by_hand(self, searched):
        cost, before = searched["report"]["cost"], searched["report"]["before"]
        body = before["parameters"] - 256 * 64  # the embedding is looked up
        assert cost["before"]["flops_per_token"] == 2 * body + 4 * 32 * 4 * 16 * 4
        assert cost["before"]["weight_bytes"] == 4 * before["parameters"]
        assert cost["before"]["kv_cache_bytes_per_token"] == 2 * 4 * 2 * 16 * 4
        assert cost["after"]["flops_per_token"] < cost["before"]["flops_per_token"]

    def test_page_and_json_show_candidates_scores_and_times(self, ranks, tmp_path):
        folder = tmp_path / "report"
        request = {"target_params": "70%", "max_candidates": 2, "heldout_batches": 1, "report_path": str(folder)}
        report = ranks(2).run(budget_on_ranks, request, pp=2)[0]["report"]
        written = json.loads((folder / "report.json").read_text())
        assert written["candidates"] == report["candidates"]
        assert written["after"] == report["after"]
        assert set(written["hparam_scores"]) == {"hidden_size", "ffn_hidden_size", "num_attention_heads"}
        assert set(written["hparam_scores"]["ffn_hidden_size"]) == {"1", "2", "3", "4"}
        assert all(curve == sorted(curve, reverse=True) for curve in written["hparam_scores"]["hidden_size"].values())
        assert min(written["forward_seconds"].values()) > 0
        page = (folder / "report.html").read_text()
        for text in ("flops per token", "Candidates", "Importance of layers", "kept"):
            assert text in page
        figures = {path.stem for path in (folder / "figures").glob("*.png")}
        assert {"candidates", "layer_scores", "scores_ffn_hidden_size"} <= figures

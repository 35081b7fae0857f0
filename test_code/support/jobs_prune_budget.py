"""What ranks execute for the tests of pruning to a budget, of loss masks and of mixtures of experts."""

from __future__ import annotations

import torch

from test_code.support import jobs_prune as jobs

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
    for settings, request in models:
        model, module, run = jobs.build(**settings)
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


def budget(request: dict, **settings) -> dict:
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


def refused(requests: list[dict], **settings) -> list[str]:
    return jobs.refused_all(requests, **settings)


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
    before, see = jobs.weights(model), _weights.Microbatch.see
    if ignore_mask:
        _weights.Microbatch.see = lambda *_: None
    try:
        jobs.run_prune(model, request, module, run)
    finally:
        _weights.Microbatch.see = see
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

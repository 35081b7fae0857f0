"""modelopt's Minitron search on a real Megatron model: sizes, activation sums over data-parallel ranks, way back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn
from torch.distributed import all_reduce

from .. import _batches, _parallel
from ..errors import ModelOptConfigError
from . import _checks, _groups, _layer_kinds, _norms, _output, _scores, _snapshot, _uncut, _weights

# A layer that changes nothing has a score of zero, which modelopt reads as "not measured".
_LOWEST_SCORE = 1e-30
# Before and after the first micro-batch.
_SCORES = (float, torch.Tensor)
# What modelopt measures.
_MEASURED = ("activations_per_rank", "layer_scores")


def search_mode() -> list[tuple[str, Any]]:
    """Return modelopt's mode with every size allowed.

    By default modelopt allows multiples only (0.43: hidden 256, ffn 512, layers 2; 0.37: 64 and 64). Where that leaves
    nothing but the original size, a target is ignored silently although the configuration then claims it. Our checks
    have refused what is illegal by now, so the grid is 1.
    """
    from modelopt.torch.prune.plugins.mcore_minitron import MCoreMinitronConfig

    rules = MCoreMinitronConfig().model_dump()
    return [("mcore_minitron", _with_divisors_of_one(rules))]


def _with_divisors_of_one(rules: Any) -> Any:
    if not isinstance(rules, dict):
        return rules
    return {key: 1 if str(key).endswith("_divisor") else _with_divisors_of_one(value) for key, value in rules.items()}


def prunes_query_groups() -> bool:
    """Return whether this modelopt prunes query groups (up to 0.40 it does)."""
    from modelopt.torch.prune.plugins import mcore_minitron

    return "num_query_groups" in mcore_minitron.SUPPORTED_HPARAMS


def prunes_experts() -> bool:
    """Return whether this modelopt prunes experts, and the hidden size of a model that has them (0.37 does not)."""
    from modelopt.torch.prune.plugins import mcore_minitron

    return "num_moe_experts" in mcore_minitron.SUPPORTED_HPARAMS


def check_positions(core: Any) -> None:
    """Raise an error for a model whose positions this modelopt does not prune.

    Raises:
        ModelOptConfigError: on modelopt up to 0.40, for positions other than rotary ones or none.
    """
    positions = getattr(core, "position_embedding_type", "none")
    if prunes_query_groups() and positions not in ("rope", "none"):
        raise ModelOptConfigError(
            f"This modelopt prunes no model with position_embedding_type={positions!r}, only 'rope' and 'none'; "
            "install modelopt 0.43."
        )


def check(
    core: nn.Module, targets: Mapping[str, Any], data_module: Any, trainer: Any, may_be_empty: bool = False
) -> dict[str, int]:
    """Check a request by importance against the model, and return its targets as whole numbers.

    Args:
        core: the Megatron-Core model.
        targets: hparam -> size or ratio.
        data_module: the data.
        trainer: runs the forward passes.
        may_be_empty: whether other sizes will be chosen for it.

    Raises:
        ModelOptConfigError: for a layout, size, norm or amount of data that cannot work.
    """
    model: Any = core
    _checks.check_layout(model.config, by_importance=True)
    check_positions(model)
    _layer_kinds.check_family(targets, model.config, may_be_empty)
    resolved = _checks.resolve_targets(targets, _checks.model_sizes(core), may_be_empty)
    _checks.check_prunes_experts(resolved, model.config, may_be_empty, prunes_experts())
    _checks.check_experts(resolved, model.config)
    _checks.check_multi_token_prediction(resolved, model.config, may_be_empty)
    _layer_kinds.check_targets(resolved, model.config, may_be_empty)
    _checks.check_batches(data_module, trainer)
    _norms.register_torch_norms()
    _norms.register_extended(core)
    _norms.check_norms(core)
    _norms.check_attention(core)
    return resolved


def prune_by_importance(
    core: nn.Module,
    targets: Mapping[str, int],
    minitron: Callable,
    measure: Callable,
    scores_path: str | None = None,
    data: Mapping[str, Any] | None = None,
    known: Mapping[str, Any] | None = None,
) -> Mapping[str, Any]:
    """Run modelopt's search on a Megatron model; query groups are pruned here.

    Args:
        core: the model without wrappers, pruned in place.
        targets: what `check` returned; none to measure only.
        minitron: runs the search: ``minitron(model, mode, export_config, forward_loop)``.
        measure: runs the forward passes.
        scores_path: folder of the scores, None to keep none.
        data: `_scores.describe_data` of what ``measure`` reads.
        known: what an earlier call on this very model returned; then nothing is measured.

    Returns:
        What modelopt measured: ``activations_per_rank`` and ``layer_scores``.

    Raises:
        ModelOptConfigError: if nothing was measured, or the scores belong to another model; the model is as before.
        RuntimeError: if cutting failed half-way.
    """
    config: Any = core.config
    ours, export_config = _shared_work(core, targets)
    attentions = {name: part for name, part in core.named_modules() if hasattr(part, "linear_qkv")}
    identity: dict[str, Any] = {}
    if scores_path is not None:
        identity = _scores.fingerprint(core, dict(data or {}))
        known = _scores.prepare(scores_path, identity, _parallel.device_of(core))
    hooks, measured, uncut = forward_hooks(core), False, _uncut.Uncut(core, export_config)

    def forward_loop(converted: nn.Module) -> None:
        nonlocal measured
        if known is not None:
            _give_scores(core, known)
        else:
            micro_batch = _weights.MicroBatch()
            handles = _weights.weigh(core, hooks, micro_batch)
            shown = _batches.shown_batches(config, micro_batch.see)
            with counted_forwards(core) as count, shown, _output.left_out(core):
                measure(converted)
            for handle in handles:
                handle.remove()
            finish_scores(core, count[0])
        measured = True
        uncut.set_aside()

    try:
        with own_hparams():
            result = minitron(core, search_mode(), export_config, forward_loop)
    except BaseException as error:
        if measured:
            raise RuntimeError("Pruning failed half-way: the model is no longer usable, restore it again.") from error
        try:
            undo(core, hooks)
        except Exception:
            raise RuntimeError(
                "modelopt failed while it converted the model, which is no longer usable: restore it again."
            ) from error
        raise
    finally:
        uncut.put_back()
    forget_conversion(core)
    if scores_path is not None and known is None:
        _scores.record(scores_path, identity, {name: result[1][name] for name in _MEASURED})
    if ours:
        squares = result[1]["activations_per_rank"][parallel_state.get_pipeline_model_parallel_rank()]
        _groups.prune_groups(attentions, squares, targets["num_attention_heads"], targets["num_query_groups"], config)
    correct_copies(core)
    return result[1]


def _shared_work(core: nn.Module, targets: Mapping[str, int]) -> tuple[bool, dict[str, int]]:
    """Return whether this package cuts heads and query groups, and the targets to pass to modelopt."""
    sizes = _checks.model_sizes(core)
    ours = set() if prunes_query_groups() else {"num_query_groups"}
    shrink = targets.get("num_query_groups", sizes["num_query_groups"]) != sizes["num_query_groups"]
    if shrink:
        # Also if modelopt would: 0.37 ranks the groups with the axes of groups and heads exchanged.
        ours = {"num_query_groups", "num_attention_heads"}
    # A search for query groups alone has nothing else to cut: the present depth is passed.
    export_config = {name: size for name, size in targets.items() if name not in ours}
    return shrink, export_config or {"num_layers": sizes["num_layers"]}


def correct_copies(core: nn.Module) -> None:
    """Write the new sizes into the copies of the configuration that experts of an MoE model keep."""
    config: Any = core.config
    for module in core.modules():
        copy: Any = _snapshot.module_config(module)
        if copy is None or copy is config or not hasattr(copy, "hidden_size"):
            continue
        for name in (*_checks.model_sizes(core), "kv_channels"):
            setattr(copy, name, getattr(config, name))
        holder: Any = module
        first = next(iter(getattr(holder, "local_experts", [])), holder)
        if hasattr(first, "linear_fc2"):
            copy.ffn_hidden_size = first.linear_fc2.weight.shape[1]


def _give_scores(core: nn.Module, known: Mapping[str, Any]) -> None:
    """Hand a converted model the importance that was measured on it before."""
    model: Any = core
    activations = known["activations_per_rank"][parallel_state.get_pipeline_model_parallel_rank()]
    for name, module in core.named_modules():
        if hasattr(module, "_activations"):
            module._activations = activations[name]
    for layer in model.decoder.layers:
        layer._scores = known["layer_scores"][layer.layer_number]


@contextlib.contextmanager
def counted_forwards(core: nn.Module) -> Iterator[list[int]]:
    """Yield a list of one number: how often the model was called."""
    count = [0]

    def add_one(*_: Any) -> None:
        count[0] += 1

    handle = core.register_forward_pre_hook(add_one)
    try:
        yield count
    finally:
        handle.remove()


def finish_scores(core: nn.Module, forwards: int) -> None:
    """Add the sums of activations up over data-parallel ranks and make them fit for ranking.

    Each rank has seen its share of the data; modelopt would rank on that share alone, and the replicas of the model
    would lose different channels.

    Args:
        core: the converted model, whose modules hold ``_activations`` and ``_scores``.
        forwards: number of forward passes since the conversion.

    Raises:
        ModelOptConfigError: if nothing was measured or the measurement is not finite.
    """
    if forwards == 0:
        raise ModelOptConfigError(
            "No batch reached the model, so there is no importance to prune by: the training loader holds less than "
            "one global batch. Give more samples or a smaller global batch size. The model is as it was."
        )
    for module in core.modules():
        for expert in getattr(module, "local_experts", ()):
            if hasattr(expert, "_activations") and expert._activations is None:  # no token came to it
                width = expert.linear_fc2.weight.shape[1]
                expert._activations = torch.zeros(width, device=expert.linear_fc2.weight.device)
    finite = []
    for module in core.modules():
        measured = getattr(module, "_activations", None)
        if isinstance(measured, dict):
            module._activations = {key: _over_data(sums) for key, sums in measured.items()}
            finite += [torch.isfinite(sums).all() for sums in module._activations.values()]
        elif isinstance(measured, torch.Tensor):
            module._activations = _over_data(measured)
            finite.append(torch.isfinite(module._activations).all())
    layers = [module for module in core.modules() if isinstance(getattr(module, "_scores", None), _SCORES)]
    scores: list[float] = []
    if layers:
        device = _parallel.device_of(core)
        sums = [torch.as_tensor(layer._scores, dtype=torch.float64, device=device) for layer in layers]
        scores = _over_data(torch.stack(sums)).tolist()
    # All are on the host after two reads, however many layers there are.
    if not all(map(math.isfinite, scores)) or (finite and not bool(torch.stack(finite).all())):
        raise ModelOptConfigError(
            "An activation is infinite or not a number, so importance cannot be ranked; check the weights and the "
            "precision of the checkpoint. The model is as it was."
        )
    for layer, score in zip(layers, scores, strict=True):
        layer._scores = max(score, _LOWEST_SCORE)


def _over_data(sums: torch.Tensor) -> torch.Tensor:
    """Return sums over the data-parallel ranks, as an ordinary tensor (Lightning measures in inference mode)."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sums = sums.clone()
    if torch.distributed.get_world_size(group) > 1:
        all_reduce(sums, group=group)
    return sums


def forward_hooks(core: nn.Module) -> dict[nn.Module, tuple[dict, dict, dict]]:
    """Return each module's forward hooks, to put back later with `undo`."""
    return {
        module: (dict(module._forward_hooks), dict(module._forward_pre_hooks), dict(module._forward_hooks_with_kwargs))
        for module in core.modules()
    }


def undo(core: nn.Module, hooks: dict[nn.Module, tuple[dict, dict, dict]]) -> None:
    """Turn a converted, not yet pruned model back into the one it was.

    Args:
        core: the model, all sizes still at their maximum.
        hooks: what `forward_hooks` returned before the conversion.
    """
    import modelopt.torch.nas as mtn
    from modelopt.torch.opt.dynamic import DynamicModule

    for module, (after, before, with_kwargs) in hooks.items():
        module._forward_hooks.clear()
        module._forward_hooks.update(after)
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks.update(before)
        module._forward_hooks_with_kwargs.clear()
        module._forward_hooks_with_kwargs.update(with_kwargs)
    if isinstance(core, DynamicModule):
        mtn.export(core)
    forget_conversion(core)


def forget_conversion(core: nn.Module) -> None:
    """Drop modelopt's record of the search.

    The pruned model is an ordinary one that its configuration describes in full. With the record it could not be
    pruned again, and its checkpoints would repeat the conversion, which needs TP=1, when they are restored.
    """
    from modelopt.torch.opt.conversion import ModeloptStateManager

    if ModeloptStateManager.is_converted(core, is_root=True):
        ModeloptStateManager.remove_state(core)


@contextlib.contextmanager
def own_hparams() -> Iterator[None]:
    """Let each first pipeline stage keep its own record of the hidden size while modelopt converts.

    modelopt broadcasts rank 0's to all ranks. The first stages of further data-parallel replicas would then slice their
    embedding by another record than the layers, and stop at an assertion while the others wait.
    """
    from modelopt.torch.nas.plugins import megatron as plugin

    original = plugin.dist

    class KeepsOwn:
        def __getattr__(self, name: str) -> Any:
            return getattr(original, name)

        @staticmethod
        def broadcast(record: Any, src: int = 0, group: Any = None) -> Any:
            received = original.broadcast(record, src=src, group=group)
            return received if record is None else record

    plugin.dist = KeepsOwn()
    try:
        yield
    finally:
        plugin.dist = original

"""Checks of a pruning request: all of them run before the first forward pass."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from nemo.utils import logging

from nemo_modelopt_dropin import versions
from nemo_modelopt_dropin.preflight import families
from nemo_modelopt_dropin.preflight.model_checks import ROUNDED, TENSOR_CORE_MULTIPLE, legal_heads, size_step

from ..errors import ModelOptConfigError
from . import _layer_kinds

MOE_SIZES = ("num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")


def check_installed(plugins: Any, by_importance: bool) -> None:
    """Raise an error if the installed modelopt cannot prune Megatron's models.

    Args:
        plugins: ``modelopt.torch.prune.plugins``: its functions for Megatron are there only if their imports work.
        by_importance: whether importance is measured; False: given layers are dropped.

    Raises:
        ModelOptConfigError: with what is missing, and the modelopt that prunes.
    """
    reason = versions.pruning_problem(by_importance=by_importance)
    if not hasattr(plugins, "drop_mcore_language_model_layers"):
        reason = reason or "modelopt's pruning plugin for Megatron cannot be imported."
    if reason:
        raise ModelOptConfigError(f"This model cannot be pruned here: {reason} The model is as it was.")


def check_target(name: str, value: Any) -> None:
    """Raise an error for a target that no model could satisfy.

    Args:
        name: the field, such as ``target_hidden_size``.
        value: the size, or the ratio of the original size.

    Raises:
        ModelOptConfigError: if it is neither a whole number of at least 1 nor a ratio between 0 and 1.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ModelOptConfigError(
            f"{name}={value!r} is not a number; pass a size (a whole number of at least 1), "
            "or a ratio of the original size between 0 and 1."
        )
    legal = value >= 1 if isinstance(value, int) else 0.0 < float(value) < 1.0
    if not legal:
        raise ModelOptConfigError(
            f"{name}={value!r} is out of range; pass a size (a whole number of at least 1), "
            "or a ratio of the original size between 0 and 1 (None leaves the dimension as it is)."
        )


def check_targets(targets: Mapping[str, Any]) -> None:
    """Raise an error for targets that contradict each other whatever the model is.

    Args:
        targets: hparam name without ``target_`` -> requested size or ratio; nothing for dimensions left alone.

    Raises:
        ModelOptConfigError: for an illegal value, query groups without heads, or heads not divisible by groups.
    """
    for name, value in targets.items():
        check_target(f"target_{name}", value)
    heads, groups = targets.get("num_attention_heads"), targets.get("num_query_groups")
    if groups is not None and heads is None:
        raise ModelOptConfigError(
            f"target_num_query_groups={groups} needs target_num_attention_heads: removing a query group removes its "
            "attention heads. Give both, with heads divisible by groups."
        )
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ModelOptConfigError(
            f"target_num_attention_heads={heads} is not divisible by target_num_query_groups={groups}; "
            f"allowed number of heads: multiples of {groups}."
        )


def check_drop_layers(drop_layers: Sequence[int], num_layers: int) -> None:
    """Raise an error for layer numbers that the model does not have.

    Args:
        drop_layers: 1-indexed numbers of the layers to remove.
        num_layers: number of layers of the whole model.

    Raises:
        ModelOptConfigError: for a number out of range, given twice, or when no layer would be left.
    """
    wrong = [n for n in drop_layers if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= num_layers]
    if wrong:
        raise ModelOptConfigError(
            f"drop_layers={list(drop_layers)}: {wrong} not among the model's layers; "
            f"allowed: whole numbers from 1 to {num_layers} (the first layer is 1)."
        )
    twice = sorted({n for n in drop_layers if list(drop_layers).count(n) > 1})
    if twice:
        raise ModelOptConfigError(
            f"drop_layers={list(drop_layers)}: {twice} listed more than once; name each layer once."
        )
    if len(drop_layers) >= num_layers:
        raise ModelOptConfigError(
            f"drop_layers={list(drop_layers)} removes all {num_layers} layers; keep at least one."
        )


def model_sizes(core: Any) -> dict[str, int]:
    """Return the prunable sizes that a model has.

    A model whose layers all have experts has no ``ffn_hidden_size``: that field of its configuration sizes nothing.

    Args:
        core: the Megatron-Core model.
    """
    config = core.config
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    sizes = {name: getattr(config, name, None) for name in names}
    if sizes["num_query_groups"] is None:
        sizes["num_query_groups"] = sizes["num_attention_heads"]
    if getattr(config, "num_moe_experts", None):
        sizes |= {name: getattr(config, name, None) for name in MOE_SIZES}
    # A Mamba configuration may leave its sizes to the mixer; every Megatron configuration has the fields.
    mixer = next((layer.mixer for layer in core.decoder.layers if hasattr(layer, "mixer")), None)
    if mixer is not None:
        sizes["mamba_num_heads"], sizes["mamba_head_dim"] = mixer.nheads, mixer.headdim
    elif _layer_kinds.all_have_experts(config):
        del sizes["ffn_hidden_size"]
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def resolve_targets(targets: Mapping[str, Any], sizes: Mapping[str, int], may_be_empty: bool = False) -> dict[str, int]:
    """Return the requested sizes as whole numbers, ratios rounded to a legal size.

    Args:
        targets: hparam -> requested size, or ratio of the original.
        sizes: hparam -> size of the model as it is.
        may_be_empty: whether it is right that these targets alone change nothing.

    Raises:
        ModelOptConfigError: if the model cannot be pruned to a target; the message names what is allowed.
    """
    missing = [name for name in targets if name not in sizes]
    if missing:
        raise ModelOptConfigError(
            f"{[f'target_{name}' for name in missing]}: the model has no such dimension; allowed: "
            f"{[f'target_{name}' for name in sizes]}."
        )
    resolved = {
        name: value if isinstance(value, int) else _rounded(name, value, sizes) for name, value in targets.items()
    }
    for name, value in resolved.items():
        if value > sizes[name]:
            raise ModelOptConfigError(
                f"target_{name}={value} is above the model's {sizes[name]}; allowed: 1 to {sizes[name]}."
            )
        if name in ROUNDED and value % TENSOR_CORE_MULTIPLE and sizes[name] % TENSOR_CORE_MULTIPLE == 0:
            logging.warning(
                f"target_{name}={value} is not a multiple of {TENSOR_CORE_MULTIPLE}: GPUs compute slowly with it."
            )
    if "num_attention_heads" in resolved:
        resolved = _resolve_heads(resolved, targets, sizes)
    if not may_be_empty and all(resolved[name] == sizes[name] for name in resolved):
        raise ModelOptConfigError(f"All targets equal the model's sizes ({resolved}): there is nothing to prune.")
    return resolved


def _rounded(name: str, ratio: float, sizes: Mapping[str, int]) -> int:
    """Return the legal size nearest to a ratio of the original one."""
    original = sizes[name]
    step = size_step(name, original)
    size = min(original, max(step, round(ratio * original / step) * step))
    logging.info(f"target_{name}={ratio} of {original} is {size}")
    return size


def _resolve_heads(resolved: dict[str, int], targets: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the targets with query groups filled in, and heads from a ratio made divisible by them."""
    groups = resolved.get("num_query_groups", sizes["num_query_groups"])
    heads = resolved["num_attention_heads"]
    allowed = legal_heads(sizes["num_attention_heads"], sizes["num_query_groups"], groups)
    if not isinstance(targets["num_attention_heads"], int):
        heads = min(allowed, key=lambda legal: (abs(legal - heads), -legal))
        logging.info(f"target_num_attention_heads is {heads}: a multiple of {groups} query groups")
    if heads not in allowed:
        given = "" if "num_query_groups" in resolved else " (target_num_query_groups is not set)"
        raise ModelOptConfigError(
            f"target_num_attention_heads={heads} with {groups} query groups{given} is impossible for a model of "
            f"{sizes['num_attention_heads']} heads in {sizes['num_query_groups']} groups; allowed: {allowed}."
        )
    return {**resolved, "num_attention_heads": heads, "num_query_groups": groups}


def check_prunes_experts(resolved: Mapping[str, int], config: Any, by_budget: bool, supported: bool) -> None:
    """Raise an error for targets that cut experts if modelopt cannot: it would leave them at their old sizes.

    Args:
        resolved: hparam -> requested size.
        config: the model's ``TransformerConfig``.
        by_budget: whether further sizes will be chosen to keep a number of parameters.
        supported: whether the installed modelopt prunes experts.

    Raises:
        ModelOptConfigError: naming the targets and the modelopt that prunes them.
    """
    if supported or not getattr(config, "num_moe_experts", None):
        return
    wrong = [f"target_{name}" for name in ("hidden_size", *MOE_SIZES) if name in resolved]
    wrong += ["target_params, target_active_params"] if by_budget else []
    if wrong:
        raise ModelOptConfigError(
            f"This modelopt prunes no experts, so a mixture of {config.num_moe_experts} experts cannot be pruned by "
            f"{', '.join(wrong)}; install modelopt 0.43, or set target_num_layers, target_num_attention_heads or "
            "drop_layers."
        )


def check_experts(resolved: Mapping[str, int], config: Any) -> None:
    """Raise an error for a number of experts that a token cannot be sent to.

    Raises:
        ModelOptConfigError: if there are fewer than the router chooses, or they do not divide into its groups, of which
            it chooses some.
    """
    experts = resolved.get("num_moe_experts")
    if experts is None:
        return
    topk, groups = getattr(config, "moe_router_topk", 1) or 1, getattr(config, "moe_router_num_groups", None) or 1
    chosen = getattr(config, "moe_router_group_topk", None) or groups
    allowed = [n for n in range(1, config.num_moe_experts + 1) if n % groups == 0 and n // groups * chosen >= topk]
    if experts not in allowed:
        some = f"{chosen} of {groups}" if chosen != groups else f"{groups}"
        raise ModelOptConfigError(
            f"target_num_moe_experts={experts}: a token is sent to {topk} experts in {some} groups; allowed: {allowed}."
        )


def check_multi_token_prediction(resolved: Mapping[str, int], config: Any, by_budget: bool) -> None:
    """Raise an error for targets that would leave a multi-token-prediction block at its old sizes.

    modelopt measures and cuts only the decoder; whole layers of it can be removed.

    Args:
        resolved: hparam -> requested size.
        config: the model's ``TransformerConfig``.
        by_budget: whether further sizes will be chosen to keep a number of parameters.

    Raises:
        ModelOptConfigError: naming the targets, and what can be pruned.
    """
    wrong = families.kept_by_mtp(config, resolved, by_budget)
    if wrong:
        raise ModelOptConfigError(
            f"The model has a multi-token-prediction block (mtp_num_layers={families.mtp_layers(config)}), which "
            "modelopt does not prune: "
            f"{', '.join(wrong)} would leave it at its old size. Set target_num_layers or drop_layers, or restore the "
            "model without the block (mtp_num_layers=None)."
        )


def check_layout(config: Any, by_importance: bool) -> None:
    """Raise an error for parallel layouts in which the model would be pruned wrongly.

    Args:
        config: the model's ``TransformerConfig``.
        by_importance: whether activations are measured (else layers are dropped by number).

    Raises:
        ModelOptConfigError: naming the setting and what to use instead.
    """
    if (getattr(config, "virtual_pipeline_model_parallel_size", None) or 1) > 1:
        raise ModelOptConfigError(
            f"virtual_pipeline_model_parallel_size={config.virtual_pipeline_model_parallel_size}: pruning handles one "
            "model chunk a rank; restore the checkpoint without virtual pipeline stages."
        )
    if not by_importance:
        return
    for name, what in (
        ("tensor_model_parallel_size", "tensor"),
        ("context_parallel_size", "context"),
        ("expert_model_parallel_size", "expert"),
    ):
        size = getattr(config, name, 1) or 1
        if size > 1:
            raise ModelOptConfigError(
                f"{name}={size}: importance is measured on whole layers, so {what} parallelism must be 1; restore the "
                "checkpoint with pipeline parallelism instead (any size), or use drop_layers."
            )
    if getattr(config, "sequence_parallel", False):
        raise ModelOptConfigError(
            "sequence_parallel=True: importance pruning needs it off; set sequence_parallel=False."
        )


def check_batches(data_module: Any, trainer: Any) -> None:
    """Raise an error for a trainer that would measure nothing.

    Raises:
        ModelOptConfigError: if the trainer's limit leaves no validation batch.
    """
    limit = getattr(trainer, "limit_val_batches", None)
    if isinstance(limit, numbers.Real) and not isinstance(limit, bool) and limit <= 0:
        batch = getattr(data_module, "global_batch_size", None)
        batch = f" ({batch})" if isinstance(batch, int) else ""
        raise ModelOptConfigError(
            f"trainer.limit_val_batches={limit}: no batch would be measured. llm.prune takes num_train_samples // "
            f"global_batch_size batches, so set num_train_samples to at least the global batch size{batch}; with a "
            "trainer of your own, set limit_val_batches to 1 or more."
        )

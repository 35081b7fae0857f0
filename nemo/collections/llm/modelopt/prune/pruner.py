"""Structured pruning of a NeMo language model: the configuration, the run, and the checkpoint of the result."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import dist_checkpointing, parallel_state
from nemo.lightning.ckpt_utils import ckpt_to_context_subdir
from nemo.lightning.io.pl import TrainerContext, ckpt_to_weights_subdir
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero

import modelopt.torch.prune as mtp
from nemo import lightning as nl
from nemo.collections import llm
from nemo_modelopt_dropin import files
from nemo_modelopt_dropin.console import progress, screen

from .. import _batches, _parallel, _real, _saved_keys
from ..errors import ModelOptConfigError
from . import _budget, _checks, _cost, _hybrid, _layer_kinds, _report, _scores, _search, _state

SUPPORTED_PRUNING_HPARAMS = {
    # width
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "mamba_num_heads",
    "mamba_head_dim",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    # depth
    "num_layers",
}


@dataclass
class PruningConfig:
    """What to prune a model to; None leaves a dimension as it is.

    Each ``target_*`` is a size, or a ratio of the original size between 0 and 1 that is rounded to a legal size.

    Args:
        target_ffn_hidden_size: size of the MLP's inner layer.
        target_hidden_size: size of the residual stream.
        target_num_attention_heads: number of attention heads, divisible by the number of query groups.
        target_num_query_groups: number of query groups; needs ``target_num_attention_heads`` too.
        target_mamba_num_heads: number of Mamba heads.
        target_mamba_head_dim: size of a Mamba head.
        target_num_layers: number of layers; the least important go.
        drop_layers: 1-indexed layers to remove without measuring anything; excludes all targets.
        scores_path: folder that keeps the measured importance. If it holds scores of this very model they are used and
            no forward pass is run.
        target_num_moe_experts: number of experts of an MoE model, at least as many as a token is sent to.
        target_moe_ffn_hidden_size: size of an expert's inner layer.
        target_moe_shared_expert_intermediate_size: size of the shared expert's inner layer.
        target_params: number of parameters to stay at or below: a share of the original's ("70%", 0.7) or a number
            (5.6e9, "5.6B"). Sizes are chosen among candidates by held-out loss; other targets that are set stay fixed.
        target_active_params: the same for the parameters that one token of an MoE model uses.
        max_candidates: how many combinations of sizes to try for ``target_params``.
        heldout_batches: how many batches of the data module's validation loader to try them on.
        report_path: folder for ``report.json`` and ``report.html`` about what was pruned and by which scores.
        size_multiples: hparam (such as ``ffn_hidden_size``) -> number that the size chosen for ``target_params`` must
            be a multiple of, such as the block size of a quantized format times the tensor-parallel size.

    Raises:
        ModelOptConfigError: for settings that no model can satisfy.
    """

    target_ffn_hidden_size: int | None = None
    target_hidden_size: int | None = None
    target_num_attention_heads: int | None = None
    target_num_query_groups: int | None = None
    target_mamba_num_heads: int | None = None
    target_mamba_head_dim: int | None = None
    target_num_layers: int | None = None
    drop_layers: list[int] | None = None
    scores_path: str | None = None
    target_num_moe_experts: int | None = None
    target_moe_ffn_hidden_size: int | None = None
    target_moe_shared_expert_intermediate_size: int | None = None
    target_params: str | float | None = None
    target_active_params: str | float | None = None
    max_candidates: int = 16
    heldout_batches: int = 16
    report_path: str | None = None
    size_multiples: dict[str, int] | None = None

    def __post_init__(self):
        targets, budget = _requested(self), _budget_of(self)
        if self.drop_layers and (targets or budget):
            names = [f"target_{name}" for name in targets] + ["target_params"] * (budget is not None)
            raise ModelOptConfigError(
                f"drop_layers cannot be used with other pruning parameters: drop_layers={self.drop_layers}, "
                f"{', '.join(names)}. Prune twice to do both."
            )
        _checks.check_targets(targets)
        if (
            isinstance(self.heldout_batches, bool)
            or not isinstance(self.heldout_batches, int)
            or self.heldout_batches < 1
        ):
            raise ModelOptConfigError(f"heldout_batches={self.heldout_batches!r}; pass a whole number of at least 1.")


def _budget_of(config: PruningConfig) -> _budget.Budget | None:
    """Return the limits of the numbers of parameters, or None; a stand-in for the configuration has none."""
    if not issubclass(type(config), PruningConfig):
        return None
    return _budget.checked_budget(
        config.target_params, config.target_active_params, config.max_candidates, config.size_multiples
    )


def _complete(config: Any) -> PruningConfig:
    """Return the configuration itself, or one with the fields that a stand-in for it has, checked like any other."""
    if issubclass(type(config), PruningConfig):
        return config
    given = {field.name: getattr(config, field.name, None) for field in fields(PruningConfig)}
    known: dict[str, Any] = {
        name: value for name, value in given.items() if isinstance(value, (int, float, str, list, tuple))
    }
    return PruningConfig(**known)


def _requested(config: PruningConfig) -> dict[str, Any]:
    """Return hparam -> requested size or ratio, for the dimensions to prune."""
    targets = {}
    for name in sorted(SUPPORTED_PRUNING_HPARAMS):
        is_ours = name in _checks.MOE_SIZES
        value = getattr(config, f"target_{name}", None) if is_ours else getattr(config, f"target_{name}")
        # A stand-in for the configuration has stock's fields only, or answers any name with a mock.
        if value is not None and (
            not is_ours or issubclass(type(config), PruningConfig) or isinstance(value, (int, float))
        ):
            targets[name] = value
    return targets


def prune_language_model(
    model: llm.GPTModel,
    pruning_config: PruningConfig,
    data_module: pl.LightningDataModule | None = None,
    trainer: nl.Trainer | None = None,
) -> llm.GPTModel:
    """Prune a GPT or Mamba model in place: whole layers, or width and depth by importance measured on its data.

    Importance is that of Minitron (arXiv 2407.14679), as modelopt computes it from forward passes over the training
    loader. Loaders, trainer limits, random states and train/eval modes are as before afterwards, and the model too
    where the measurement fails. A trainer that has trained this model keeps an optimizer of the old parameters: train
    the pruned model with a new one.

    Args:
        model: the model, with weights.
        pruning_config: what to prune.
        data_module: data to measure importance on; not needed for ``drop_layers``.
        trainer: runs the measurement for ``limit_val_batches`` batches; not needed for ``drop_layers``.

    Returns:
        The model that was given.

    Raises:
        ModelOptConfigError: for a request that this model, data or layout cannot satisfy, before any forward pass.
    """
    if not _real.holds_core(model) and not _real.is_nemo_model(model):
        return _prune_stand_in(model, pruning_config, data_module, trainer)
    pruning_config = _complete(pruning_config)
    drop_layers, targets = pruning_config.drop_layers, _requested(pruning_config)
    _checks.check_installed(mtp.plugins, by_importance=not drop_layers)
    budget = _budget_of(pruning_config)
    if not drop_layers:
        _require({**targets, **({"params": budget} if budget else {})}, data_module, trainer)
    core: Any = _state.find_core(model)
    _hybrid.check_packages(core)
    if drop_layers:
        _checks.check_layout(core.config, by_importance=False)
        _checks.check_drop_layers(drop_layers, core.config.num_layers)
        _layer_kinds.check_drop(drop_layers, core.config)
    else:
        targets = _search.check(core, targets, data_module, trainer, may_be_empty=budget is not None)
    with _reported(model, core, trainer) as report:
        if drop_layers:
            mtp.plugins.drop_mcore_language_model_layers(model, layers_to_drop=list(drop_layers))
        else:
            _prune_by_importance(model, core, pruning_config, targets, data_module, trainer, report)
    if pruning_config.report_path is not None and is_global_rank_zero():
        from nemo_modelopt_dropin.report import pruning

        page = pruning.write(describe_pruning(model), Path(pruning_config.report_path))
        with screen.results():
            logging.info(f"The report of the pruning is {page}")
    return model


def _prune_stand_in(model: Any, config: Any, data_module: Any, trainer: Any) -> Any:
    """Prune what is not a real model exactly as stock does, down to the loader that it leaves in the data module."""
    if config.drop_layers:
        mtp.plugins.drop_mcore_language_model_layers(model, layers_to_drop=config.drop_layers)
        return model
    targets = _requested(config)
    _require(targets, data_module, trainer)
    data_module.val_dataloader = data_module.train_dataloader
    with screen.results():
        logging.info("Pruning model...")
    _minitron(
        model, "mcore_minitron", targets, partial(llm.validate, data=data_module, trainer=trainer, tokenizer="model")
    )
    return model


def _prune_by_importance(
    model: Any,
    core: Any,
    config: PruningConfig,
    targets: dict[str, int],
    data_module: Any,
    trainer: Any,
    report: dict[str, Any],
) -> None:
    """Prune to sizes or to a budget, and add what was measured to the report."""
    measure = partial(_validate_on_training_data, model, data_module, trainer)
    data = _scores.describe_data(data_module, trainer)
    budget = _budget_of(config)
    terms = {} if budget is None else _budget.check(core, budget, targets)
    numbers, channels = [number for number, _ in _report.numbered_layers(core)], core.config.kv_channels
    batches = []
    if config.report_path is not None:
        batches = _cost.one_batch(core, partial(_validate_on_heldout_data, model, data_module, trainer, 1))
    if batches:
        report["forward_seconds"] = {"before": _cost.forward_seconds(core, batches)}
    if budget is None:
        known = _search.prune_by_importance(core, targets, _minitron, measure, config.scores_path, data)
    else:
        heldout = partial(_validate_on_heldout_data, model, data_module, trainer, config.heldout_batches)
        steps = _budget.Steps(_minitron, measure, heldout)
        candidates, known, loss = _budget.prune_to_budget(core, budget, targets, terms, steps, config.scores_path, data)
        report |= {"candidates": [candidate.as_dict() for candidate in candidates], "original_heldout_loss": loss}
        with screen.results():
            logging.info(f"Candidates:\n{_budget.table(candidates, loss)}")
    if batches:
        report["forward_seconds"]["after"] = _cost.forward_seconds(core, batches)
    if config.report_path is not None:
        report["hparam_scores"] = _cost.all_curves(known, numbers, channels)
    report["layer_scores"] = {number: float(score) for number, score in sorted(known["layer_scores"].items())}


def describe_pruning(model: llm.GPTModel) -> dict[str, Any]:
    """Return what pruning did to a model in this process.

    Args:
        model: what `prune_language_model` returned.

    Returns:
        ``before`` and ``after``: number of parameters over all ranks and the prunable sizes; ``cost``: bytes of the
        weights, FLOPs of a token's forward pass and bytes of its KV cache, before and after; ``kept_layers``: the
        1-indexed original numbers of the layers that are left; by importance also ``layer_scores``, and with
        ``target_params`` the ``candidates`` and the original model's held-out loss.

    Raises:
        ModelOptConfigError: if the model was not pruned in this process.
    """
    report = getattr(model, "pruning_report", None)
    if not isinstance(report, dict):
        raise ModelOptConfigError("The model was not pruned in this process; call prune_language_model first.")
    return {**report}


def _require_data(data_module: Any, trainer: Any) -> None:
    """Raise if there is nothing to measure importance with."""
    if data_module is None:
        raise ModelOptConfigError("data_module is required to prune the model.")
    if trainer is None:
        raise ModelOptConfigError("trainer is required to prune the model.")


def _require(targets: dict[str, Any], data_module: Any, trainer: Any) -> None:
    """Raise if there is nothing to measure importance with, or nothing to prune by it."""
    _require_data(data_module, trainer)
    if not targets:
        names = sorted(f"target_{name}" for name in {*SUPPORTED_PRUNING_HPARAMS, "params", "active_params"})
        raise ModelOptConfigError(f"The pruning configuration is empty; set drop_layers or at least one of {names}.")


def _minitron(model: Any, mode: Any, export_config: dict[str, Any], forward_loop: Callable) -> Any:
    """Measure, rank and cut with modelopt; return what it returns."""
    config = {"forward_loop": forward_loop}
    return mtp.prune(model, mode=mode, constraints={"export_config": export_config}, dummy_input=None, config=config)


def _validate_on_training_data(model: Any, data_module: Any, trainer: Any, converted: Any = None) -> None:
    """Run the forward passes. modelopt passes its unwrapped model, and NeMo needs its own wrapper around it."""
    with screen.results():
        logging.info("Measuring the importance of the model's parts...")
    # modelopt calls this without gradients, but setting a trainer up may build Megatron's DDP, which needs them;
    # the validation loop switches them off again by itself.
    shown = progress.validation_shown(trainer, "importance")
    data, callbacks = _training_data_for_validation(data_module), _own_callbacks(trainer)
    with torch.enable_grad(), data, shown, callbacks, _state.stays_configured(model):
        llm.validate(model, data=data_module, trainer=trainer, tokenizer="model")


def _validate_on_heldout_data(model: Any, data_module: Any, trainer: Any, batches: int) -> None:
    """Run the first global batches of held-out data."""
    limit = trainer.limit_val_batches
    wanted = batches * _micro_batches(data_module)  # NeMo counts micro-batches here
    trainer.limit_val_batches = min(limit, wanted) if type(limit) is int else wanted
    try:
        callbacks = _own_callbacks(trainer)
        with torch.enable_grad(), _batches.own_data(data_module), callbacks, _state.stays_configured(model):
            llm.validate(model, data=data_module, trainer=trainer, tokenizer="model")
    finally:
        trainer.limit_val_batches = limit


@contextlib.contextmanager
def _own_callbacks(trainer: Any) -> Iterator[None]:
    """Take callbacks off again that were added inside: ``llm.validate`` adds NeMo's telemetry, each time once more.

    With two of them the telemetry meets itself and fails.
    """
    own = list(trainer.callbacks) if isinstance(getattr(trainer, "callbacks", None), list) else None
    try:
        yield
    finally:
        if own is not None:
            trainer.callbacks[:] = own


def _micro_batches(data_module: Any) -> int:
    """Return in how many micro-batches a data-parallel rank sees its part of a global batch."""
    whole, part = (getattr(data_module, name, None) for name in ("global_batch_size", "micro_batch_size"))
    if not isinstance(whole, int) or not isinstance(part, int):
        return 1
    return max(1, whole // (part * parallel_state.get_data_parallel_world_size()))


def _training_data_for_validation(data_module: Any) -> contextlib.AbstractContextManager[None]:
    """Let validation read the training loader."""
    return _batches.own_data(data_module, val_dataloader=data_module.train_dataloader)


@contextlib.contextmanager
def _reported(model: Any, core: Any, trainer: Any) -> Iterator[dict[str, Any]]:
    """Restore what pruning must not change, and record what it changed in ``model.pruning_report``.

    Yields a dictionary for what else belongs there.
    """
    before, layers = _report.measure(core), _report.numbered_layers(core)
    cost = {"before": _cost.describe(core, before["parameters"])}
    more: dict[str, Any] = {}
    with _state.kept(model, core, trainer), _hybrid.spelled_out(core):
        yield more
    _state.unwrap_data_parallel(model)
    kept = _report.kept_layers(layers, core)
    if len(kept) != core.config.num_layers:
        raise RuntimeError(
            f"modelopt left {len(kept)} layers although {core.config.num_layers} were requested: the model is no "
            "longer usable, restore it again."
        )
    _report.keep_layer_patterns(core, kept, before["num_layers"])
    _layer_kinds.follow(core.config, kept, before)
    after = _report.measure(core)
    cost["after"] = _cost.describe(core, after["parameters"])
    model.pruning_report = {"before": before, "after": after, "cost": cost, "kept_layers": kept, **more}
    with screen.results():
        logging.info(f"Pruned the model; layers kept: {kept}\n{_report.table(before, after)}")


def save_pruned_model(trainer: nl.Trainer, save_path: str) -> None:
    """Save the pruned model of a trainer as a NeMo checkpoint that loads at any parallel layout.

    The folder is complete or not there. Weights of the optimizer are not saved.

    Args:
        trainer: the trainer that holds the pruned model.
        save_path: the checkpoint's folder; an earlier checkpoint of this package in it is replaced.

    Raises:
        ModelOptConfigError: if the folder holds something that this package did not write.
    """
    with screen.results():
        logging.info(f"Saving pruned model to {save_path}...")
    _state.write_sizes(trainer.model.__io__.config, trainer.model.config, SUPPORTED_PRUNING_HPARAMS)
    if not _real.holds_core(trainer.model):
        _write_checkpoint(trainer, save_path)
        with screen.results():
            logging.info(f"Pruned model saved to {save_path}\n")
        return
    with files.written(Path(save_path), files.checkpoint("nemo"), writes=is_global_rank_zero()) as folder:
        _parallel.barrier()
        _write_checkpoint(trainer, folder)
        _parallel.barrier()
    _parallel.barrier()
    with screen.results():
        logging.info(f"Pruned model saved to {save_path}\n")


def _write_checkpoint(trainer: Any, folder: Any) -> None:
    """Write the weights on all ranks, then the context on rank zero."""
    weights = ckpt_to_weights_subdir(folder, is_saving=True)
    weights.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(
        _saved_keys.complete_extra_state(trainer.strategy.megatron_parallel.sharded_state_dict()),
        weights,
        content_metadata=trainer.strategy.sharded_state_dict_metadata,
    )
    if is_global_rank_zero():
        TrainerContext.from_trainer(trainer).io_dump(ckpt_to_context_subdir(folder), yaml_attrs=["model"])

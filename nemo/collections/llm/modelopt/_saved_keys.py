"""The keys of NeMo checkpoints: what is asked for when loading, and what is written, apart from the weights themselves.

Keys have as many ``module.`` in front as wrappers were on when saving, and norms of some layer specs lack the
``_extra_state`` that those of others ask for.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import check_is_distributed_checkpoint
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from torch import nn

from ._in_place import merge_in_place

_MODULE = "module."
_EXTRA_STATE = "_extra_state"
_SHARDED = "sharded_state_dict"
_SEPARATE = "singleton_local_shards"
_ORIGINAL = "_replaces"
# Of norms, and of the projections of multi-latent attention that every rank holds whole.
_WITHOUT_EXTRA_STATE = ("norm.weight", "down_proj.weight")


def strip_module_prefix(key: str) -> str:
    """Return a key without the ``module.`` that each wrapper put in front of it; inside, the word is left alone."""
    while key.startswith(_MODULE):
        key = key[len(_MODULE) :]
    return key


def saved_keys(ckpt_path: Any) -> list[str]:
    """Return the keys of the tensors and objects in a distributed checkpoint; empty if there is no such checkpoint."""
    if not isinstance(ckpt_path, (str, os.PathLike)):
        return []
    return keys_in(ckpt_to_weights_subdir(ckpt_path, is_saving=False))


def keys_in(folder: Path) -> list[str]:
    """Return the keys in a folder of weights; empty if it is not a distributed checkpoint."""
    if not folder.is_dir() or not check_is_distributed_checkpoint(str(folder)):
        return []
    return list(load_sharded_metadata(str(folder)))


def saved_prefix(keys: list[str]) -> str:
    """Return what the keys of a checkpoint's weights begin with: ``module.`` once for each wrapper, once by default.

    NeMo's callbacks save inside ``fit`` (``module.``); afterwards the DDP wrapper is off or on, and
    ``trainer.save_checkpoint`` writes ``module.module.`` or ``module.``. Optimizer entries do not count.
    """
    depths: collections.Counter[int] = collections.Counter()
    for key in keys:
        name = strip_module_prefix(key)
        if not name.startswith("optimizer."):
            depths[(len(key) - len(name)) // len(_MODULE)] += 1
    return _MODULE * depths.most_common(1)[0][0] if depths else _MODULE


def adapt_next_load(strategy: Any, core: Any = None) -> None:
    """Let a strategy's next load ask for weights under the keys that the checkpoint has, and read them in place.

    NeMo itself asks for ``module.`` alone, and so cannot load what its own ``trainer.save_checkpoint`` writes after
    ``fit``. It also asks for every ``_extra_state`` of Transformer Engine, see `drop_missing_extra_state`.

    Args:
        strategy: the ``MegatronStrategy`` that is about to load.
        core: the model, if `ask_as_saved` may have changed what it asks for: that ends with the load.
    """
    checkpoint_io = strategy.checkpoint_io
    vars(checkpoint_io).pop("load_checkpoint", None)  # if no load followed an earlier call
    load = checkpoint_io.load_checkpoint

    def load_once(path, sharded_state_dict=None, *args, **kwargs):
        vars(checkpoint_io).pop("load_checkpoint", None)
        if core is not None:
            ask_as_installed(core)
        keys = saved_keys(path)
        request = (sharded_state_dict or {}).get("state_dict", {})
        prefix = saved_prefix(keys)
        if prefix != _MODULE:
            for value in nested_values(request):
                if isinstance(value, ShardedBase):
                    value.key = prefix + strip_module_prefix(value.key)
        dropped = drop_missing_extra_state(request, keys)
        merge_in_place(request)
        loaded = load(path, sharded_state_dict, *args, **kwargs)
        if dropped and isinstance(loaded, dict) and "state_dict" in loaded:
            _put_back(loaded["state_dict"], dropped)
        return loaded

    checkpoint_io.load_checkpoint = load_once


def drop_missing_extra_state(request: Any, keys: list[str]) -> dict[str, Any]:
    """Remove entries of Transformer Engine's ``_extra_state`` that the checkpoint lacks from a request, in place.

    They hold scaling histories, which a checkpoint written without FP8 or by another layer implementation lacks.

    Args:
        request: what a checkpoint is asked for, by the model's keys; in parts if the pipeline is interleaved.
        keys: the result of `saved_keys`.

    Returns:
        The names that were removed, each with None, nested as the request is. None is the state of a layer without
        FP8: a model that is loaded strictly then misses nothing.
    """
    if not keys or not isinstance(request, dict):
        return {}
    saved, dropped = set(keys), {}
    for name, value in list(request.items()):
        if isinstance(value, dict):
            inner = drop_missing_extra_state(value, keys)
            if inner:
                dropped[name] = inner
        elif name.endswith(_EXTRA_STATE):
            stored = {getattr(value, "unique_key", name), getattr(value, "key", name)}
            if not stored & saved:
                dropped[name] = request.pop(name)
    return {name: value if isinstance(value, dict) else None for name, value in dropped.items()}


def _put_back(loaded: dict[str, Any], dropped: dict[str, Any]) -> None:
    """Add the names of `drop_missing_extra_state` to what was loaded."""
    for name, value in dropped.items():
        if isinstance(value, dict):
            _put_back(loaded.setdefault(name, {}), value)
        else:
            loaded[name] = None


def complete_extra_state(weights: Any) -> Any:
    """Add an empty ``_extra_state`` for layers that are saved without one, in place; return the same dictionary.

    Transformer Engine's layers have one, and models that are built from them ask for it. Model Optimizer's layer spec
    removes that of norms from their state dicts and has plain linear layers in multi-latent attention; torch's norms
    have none. Norms that Transformer Engine fuses into a linear layer (``layer_norm_weight``) share that of the layer.

    Args:
        weights: a sharded state dict that is about to be saved; anything else is returned as it is.
    """
    if not isinstance(weights, dict):
        return weights
    for name, value in list(weights.items()):
        other = f"{name.removesuffix('weight')}{_EXTRA_STATE}"
        if not (isinstance(value, ShardedTensor) and value.key.endswith(_WITHOUT_EXTRA_STATE)) or other in weights:
            continue
        key = f"{value.key.removesuffix('weight')}{_EXTRA_STATE}"
        layers = value.prepend_axis_num  # layers of one kind are saved as slices of one tensor
        shape, offset = (value.global_shape[:layers], value.global_offset[:layers]) if layers else ((1,), (0,))
        empty = torch.empty(0, dtype=torch.uint8)
        weights[other] = ShardedObject(key, empty, tuple(shape), tuple(offset), replica_id=value.replica_id)
    return weights


class _Unchanged(dict):
    """Settings of sharded keys in which modelopt's layers cannot change whether they are separate."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name != _SEPARATE:
            super().__setitem__(name, value)


def ask_as_saved(core: nn.Module, saved: list[str]) -> None:
    """Let a model ask for its weights without separate keys, if that is how a checkpoint has them.

    It lasts until `adapt_next_load` has loaded the weights.

    Args:
        core: The converted Megatron-Core model.
        saved: The keys of the checkpoint.
    """
    known = {strip_module_prefix(key) for key in saved}
    sharded = getattr(core, _SHARDED, None)
    if sharded is None or not known:
        return

    def in_one(*args: Any, metadata: Any = None, **kwargs: Any) -> Any:
        return sharded(*args, metadata=_Unchanged({**(metadata or {}), _SEPARATE: False}), **kwargs)

    if _share_missing(in_one, known) < _share_missing(sharded, known):
        setattr(in_one, _ORIGINAL, vars(core).get(_SHARDED))
        setattr(core, _SHARDED, in_one)


def _share_missing(sharded: Callable[[], Any], known: set[str]) -> float:
    """Return the share of the tensors that a model asks for and a checkpoint lacks."""
    asked = sharded()
    apply_factories(asked)
    keys = {value.key for value in nested_values(asked) if isinstance(value, ShardedTensor)}
    return len(keys - known) / max(len(keys), 1)


def ask_as_installed(core: nn.Module) -> None:
    """Let a model ask for, and save, weights under the keys of the installed version again."""
    now = vars(core).get(_SHARDED)
    if not hasattr(now, _ORIGINAL):
        return
    delattr(core, _SHARDED)
    # A distillation model has one of its own, which leaves the teacher out.
    if (original := getattr(now, _ORIGINAL)) is not None:
        setattr(core, _SHARDED, original)

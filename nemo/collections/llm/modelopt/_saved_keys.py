"""The keys of weights in NeMo checkpoints, which have as many ``module.`` in front as wrappers were on when saving."""

from __future__ import annotations

import collections
import os
from typing import Any

from megatron.core.dist_checkpointing.core import check_is_distributed_checkpoint
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from nemo.lightning.io.pl import ckpt_to_weights_subdir

_MODULE = "module."


def strip_module_prefix(key: str) -> str:
    """Return a key without the ``module.`` that each wrapper put in front of it; inside, the word is left alone."""
    while key.startswith(_MODULE):
        key = key[len(_MODULE) :]
    return key


def saved_keys(ckpt_path: Any) -> list[str]:
    """Return the keys of the tensors and objects in a distributed checkpoint; empty if there is no such checkpoint."""
    if not isinstance(ckpt_path, (str, os.PathLike)):
        return []
    folder = ckpt_to_weights_subdir(ckpt_path, is_saving=False)
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


def follow_saved_prefix(strategy: Any, ckpt_path: Any) -> None:
    """Let a strategy's next load ask for the weights under the keys that the checkpoint has.

    NeMo itself asks for ``module.`` alone, and so cannot load what its own ``trainer.save_checkpoint`` writes after
    ``fit``.

    Args:
        strategy: the ``MegatronStrategy`` that is about to load.
        ckpt_path: the checkpoint.
    """
    prefix = saved_prefix(saved_keys(ckpt_path))
    if prefix == _MODULE:
        return
    checkpoint_io = strategy.checkpoint_io
    load = checkpoint_io.load_checkpoint

    def load_once(path, sharded_state_dict=None, *args, **kwargs):
        del checkpoint_io.load_checkpoint
        for value in nested_values((sharded_state_dict or {}).get("state_dict", {})):
            if isinstance(value, ShardedBase):
                value.key = prefix + strip_module_prefix(value.key)
        return load(path, sharded_state_dict, *args, **kwargs)

    checkpoint_io.load_checkpoint = load_once

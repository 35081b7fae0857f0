"""Patches of NeMo and Lightning for CPU ranks; `cpu_backend.PATCHES` lists them."""

from __future__ import annotations

import fnmatch
import functools
import sys
import types
from unittest import mock

import torch

from nemo_modelopt_dropin import finder


def patch_checkpoint_devices() -> None:
    """Leave tensors where they are: NeMo's checkpoint loader asserts that CUDA is initialised before it moves them."""
    import nemo.lightning.io.pl as io_pl

    io_pl._fix_tensors_device = lambda checkpoint: checkpoint


def patch_accelerator() -> None:
    """Read ``accelerator="gpu"`` as the CPU: recipes, scripts and stock's model_utils hard-code it."""
    from lightning.pytorch.trainer.connectors import accelerator_connector

    accelerator_connector._AcceleratorConnector._choose_gpu_accelerator_backend = staticmethod(lambda: "cpu")


def patch_local_checkpoint_callback() -> None:
    """Let NeMo's logger work without nvidia-resiliency-ext, a GPU-only package.

    The logger checks whether a checkpoint callback is one of that package's. Without the package the check itself
    raises an error, so any trainer with Lightning's default checkpointing fails. No callback is one of them here.
    """
    import nemo.lightning.nemo_logger as nemo_logger

    try:
        isinstance(None, nemo_logger.lcp.LocalCheckpointCallback)
    except Exception:
        nemo_logger.lcp = types.SimpleNamespace(LocalCheckpointCallback=())


def patch_mock_attention_mask() -> None:
    """Let NeMo's mock data create an attention mask: it passes that flag as the seed, so there is no mask.

    Models without Transformer Engine, which creates its own, need the mask.
    """
    import nemo.collections.llm.gpt.data.mock as mock_data

    class _MockGPTDataset(mock_data._MockGPTDataset):
        def __init__(self, tokenizer, name, num_samples, seq_length, seed=42, create_attention_mask=False):
            if isinstance(seed, bool):
                seed, create_attention_mask = 42, seed
            super().__init__(tokenizer, name, num_samples, seq_length, seed, create_attention_mask)

    mock_data._MockGPTDataset = _MockGPTDataset


def patch_converters() -> None:
    """Let NeMo's converters find norms that are separate modules.

    The converters contain only the names of Transformer Engine's fused norms. The local layer spec has separate norms,
    and the converters skip weights that they do not find, with a warning: all norms of an imported Llama would be one.
    """
    import nemo.lightning.io as nemo_io
    import nemo.lightning.io.state as io_state

    convert = io_state.apply_transforms

    @functools.wraps(convert)
    def apply_transforms(source, target, mapping, *args, **kwargs):
        sources, targets = list(source.state_dict()), list(target.state_dict())
        mapping = {_own_norm(key, sources): _own_norm(value, targets) for key, value in mapping.items()}
        return convert(source, target, mapping, *args, **kwargs)

    nemo_io.apply_transforms = io_state.apply_transforms = apply_transforms


_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def _own_norm(pattern: str, names: list[str]) -> str:
    """Return the pattern of the separate norm if the model has one and no fused norm; else the pattern unchanged."""
    for fused, own in _FUSED_NORMS.items():
        candidate = pattern.replace(fused, own)
        if candidate != pattern and not fnmatch.filter(names, f"*{pattern}") and fnmatch.filter(names, f"*{candidate}"):
            return candidate
    return pattern


def patch_stock_quantizer() -> None:
    """Let stock's Quantizer be constructed: it requires CUDA there, though all of its arithmetic runs on a CPU."""
    if finder.is_enabled() and finder.DropInFinder in sys.meta_path:
        return
    from nemo.collections.llm import api

    construct = api.Quantizer.__init__

    @functools.wraps(construct)
    def __init__(self, *args, **kwargs):
        with mock.patch.object(torch.cuda, "is_available", return_value=True):
            construct(self, *args, **kwargs)

    setattr(api.Quantizer, "__init__", __init__)  # noqa: B010 - mypy rejects the plain assignment

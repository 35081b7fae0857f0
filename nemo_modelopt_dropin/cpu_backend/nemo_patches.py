"""What NeMo and Lightning need on CPU ranks: the second half of `cpu_backend`, which applies these patches."""

from __future__ import annotations

import fnmatch
import functools
import sys
import types

import torch


def patch_checkpoint_devices() -> None:
    """NeMo's checkpoint loader asserts that CUDA is initialised before it moves tensors; here they are in place."""
    import nemo.lightning.io.pl as io_pl

    io_pl._fix_tensors_device = lambda checkpoint: checkpoint


def patch_accelerator() -> None:
    """``accelerator="gpu"`` is written into recipes, scripts and stock's model_utils: read it as the CPU."""
    from lightning.pytorch.trainer.connectors import accelerator_connector

    accelerator_connector._AcceleratorConnector._choose_gpu_accelerator_backend = staticmethod(lambda: "cpu")


def patch_local_checkpoint_callback() -> None:
    """NeMo's logger asks every checkpoint callback whether it is one of nvidia-resiliency-ext's, a GPU-only package.

    Where that is missing the question itself raises, so any trainer with Lightning's default checkpointing fails. The
    answer is no.
    """
    import nemo.lightning.nemo_logger as nemo_logger

    try:
        isinstance(None, nemo_logger.lcp.LocalCheckpointCallback)
    except Exception:
        nemo_logger.lcp = types.SimpleNamespace(LocalCheckpointCallback=())


def patch_mock_attention_mask() -> None:
    """NeMo's mock data passes "create the mask" in the place of the seed, so local-spec models get no mask.

    The mask is needed where Transformer Engine, which makes its own, is missing.
    """
    import nemo.collections.llm.gpt.data.mock as mock

    class _MockGPTDataset(mock._MockGPTDataset):
        def __init__(self, tokenizer, name, num_samples, seq_length, seed=42, create_attention_mask=False):
            if isinstance(seed, bool):
                seed, create_attention_mask = 42, seed
            super().__init__(tokenizer, name, num_samples, seq_length, seed, create_attention_mask)

    mock._MockGPTDataset = _MockGPTDataset


def patch_converters() -> None:
    """NeMo's converters know only the names of Transformer Engine's fused norms.

    The local layer spec has norms of their own, and the converters drop the weights that they do not find, with a
    warning: an imported Llama then has all of its layers' norms at one.
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
    """Return the pattern of a norm of its own where the model has that and no fused one; else the pattern itself."""
    for fused, own in _FUSED_NORMS.items():
        candidate = pattern.replace(fused, own)
        if candidate != pattern and not fnmatch.filter(names, f"*{pattern}") and fnmatch.filter(names, f"*{candidate}"):
            return candidate
    return pattern


def patch_stock_quantizer() -> None:
    """Stock's Quantizer demands CUDA in its constructor, though all of its arithmetic runs on a CPU."""
    from nemo_modelopt_dropin import finder

    if finder.is_enabled() and finder.DropInFinder in sys.meta_path:
        return
    from unittest import mock

    from nemo.collections.llm.modelopt.quantization.quantizer import Quantizer

    construct = Quantizer.__init__

    @functools.wraps(construct)
    def __init__(self, *args, **kwargs):
        with mock.patch.object(torch.cuda, "is_available", return_value=True):
            construct(self, *args, **kwargs)

    setattr(Quantizer, "__init__", __init__)  # noqa: B010 - mypy refuses the plain assignment

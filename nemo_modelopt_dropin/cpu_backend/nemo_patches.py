"""Patches of NeMo and Lightning for CPU ranks; `cpu_backend.PATCHES` lists them."""

from __future__ import annotations

import atexit
import copy
import fnmatch
import functools
import re
import shutil
import sys
import tempfile
import types
from typing import Any
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
    """Let NeMo's converters find norms and experts that are separate modules.

    The converters contain only the names of Transformer Engine's fused norms and grouped experts. The local layer spec
    has separate ones, and the converters skip weights that they do not find, with a warning: all norms of an imported
    Llama would be one.
    """
    import nemo.lightning.io as nemo_io
    import nemo.lightning.io.state as io_state

    convert = io_state.apply_transforms

    @functools.wraps(convert)
    def apply_transforms(source, target, mapping, transforms=(), *args, **kwargs):
        source = _called(source)
        _cast_positions(target)
        sources, targets = list(source.state_dict()), list(target.state_dict())
        mapping = {_own_name(key, sources): _own_name(value, targets) for key, value in mapping.items()}
        transforms = [_renamed(transform, sources, targets) for transform in transforms or ()]
        return convert(source, target, mapping, transforms, *args, **kwargs)

    nemo_io.apply_transforms = io_state.apply_transforms = apply_transforms


_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_GROUPED_EXPERTS = re.compile(r"\.mlp\.experts\.(linear_fc[12])\.(weight|bias)\*$")


def _own_name(pattern: Any, names: list[str]) -> Any:
    """Return the pattern, or each of several, with the separate norms and experts that the model has."""
    if isinstance(pattern, tuple):
        return tuple(_own_name(one, names) for one in pattern)
    if isinstance(pattern, dict):
        return {key: _own_name(one, names) for key, one in pattern.items()}
    candidates = [pattern.replace(fused, own) for fused, own in _FUSED_NORMS.items()]
    candidates.append(_GROUPED_EXPERTS.sub(r".mlp.experts.local_experts.*.\1.\2", pattern))
    for candidate in candidates:
        if candidate != pattern and not fnmatch.filter(names, f"*{pattern}") and fnmatch.filter(names, f"*{candidate}"):
            return candidate
    return pattern


def _renamed(transform: Any, sources: list[str], targets: list[str]) -> Any:
    """Return a transform that reads and writes the names that the models have."""
    renamed = copy.copy(transform)
    renamed.source_key = _own_name(transform.source_key, sources)
    renamed.target_key = _own_name(transform.target_key, targets)
    return renamed


def _called(source: Any) -> Any:
    """Return a source whose state is a dictionary: NeMo's DeepSeek importer passes the method for local layers."""
    state = source.state_dict()
    if callable(state):
        source = copy.copy(source)
        source._state_dict = state()
    return source


def _cast_positions(target: Any) -> None:
    """Give learned positions the precision of the other parameters; Megatron creates them in fp32.

    NeMo's Starcoder importer raises an error for parameters of two precisions.
    """
    for module in target.modules():
        positions = getattr(module, "position_embeddings", None)
        dtype = getattr(getattr(module, "config", None), "params_dtype", None)
        if isinstance(positions, torch.nn.Embedding) and isinstance(dtype, torch.dtype):
            positions.to(dtype)


def patch_tokenizer_files() -> None:
    """Let each import keep the tokenizer's files in a folder of its own, which is removed when the process ends.

    NeMo's importers write them to one folder of the machine, so imports at the same time exchange tokenizers or read
    half-written files.
    """
    from nemo.lightning.io.connector import ModelConnector

    save = getattr(ModelConnector, "save_hf_tokenizer_assets", None)
    if save is None:
        return

    @functools.wraps(save)
    def save_hf_tokenizer_assets(self, tokenizer_name_or_path, save_path=None):
        if save_path is None:
            save_path = tempfile.mkdtemp(prefix="nemo_tokenizer-")
            atexit.register(shutil.rmtree, save_path, ignore_errors=True)
        return save(self, tokenizer_name_or_path, save_path)

    ModelConnector.save_hf_tokenizer_assets = save_hf_tokenizer_assets


def patch_extended_modules() -> None:
    """Extend a module of Gemma once: each training or validation of a restored model asks for it again, and failed."""
    import nemo.collections.common.parts.utils as parts

    extend = parts.extend_instance

    @functools.wraps(extend)
    def extend_instance(obj, mixin):
        if not isinstance(obj, mixin):
            extend(obj, mixin)

    parts.extend_instance = extend_instance


def patch_gemma_layers() -> None:
    """Build the layers of Gemma 2 and 3 without Transformer Engine, whose classes their specs name.

    Configurations refer to the functions themselves, so their code is replaced, not their names.
    """
    from nemo.collections.llm.gpt.model import gemma2, gemma3

    def gemma2_layer_spec(config):
        from nemo_modelopt_dropin.cpu_backend.gemma_layers import gemma2_spec

        return gemma2_spec(config)

    def gemma3_layer_spec(config):
        from nemo_modelopt_dropin.cpu_backend.gemma_layers import gemma3_spec

        return gemma3_spec(config)

    gemma2.gemma2_layer_spec.__code__ = gemma2_layer_spec.__code__
    gemma3.gemma3_layer_spec.__code__ = gemma3_layer_spec.__code__


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

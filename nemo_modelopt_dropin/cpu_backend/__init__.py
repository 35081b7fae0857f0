"""Run NeMo, Megatron-Core and modelopt on CPU ranks over gloo. Opt-in: nothing is patched unless `enable` is called.

Megatron uses CUDA streams, events, devices, random state and memory statistics, and creates tensors with
``device="cuda"``. On a machine without a GPU, each patch replaces one of these so that the numbers stay right: work is
synchronous, the device is the CPU, the random state is the CPU's. `PATCHES` lists them, one small function each with
its reason. They do not depend on our subpackage and work with the stock one (``NEMO_MODELOPT=stock``) as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from nemo_modelopt_dropin import finder, versions
from nemo_modelopt_dropin.cpu_backend import (
    attention_patches,
    importer_patches,
    megatron_patches,
    modelopt_patches,
    nemo_patches,
    state,
    torch_patches,
)
from nemo_modelopt_dropin.cpu_backend.state import CpuBackendError, is_enabled

__all__ = ["PATCHES", "CpuBackendError", "enable", "is_enabled"]

PATCHES: tuple[Callable[[], None], ...] = (
    torch_patches.patch_cuda_runtime,
    torch_patches.patch_cuda_memory,
    torch_patches.patch_devices,
    torch_patches.patch_random_state,
    torch_patches.patch_compilation,
    torch_patches.patch_gloo_scalars,
    torch_patches.patch_gloo_devices,
    torch_patches.patch_checkpoint_reading,
    megatron_patches.patch_transformer_config,
    megatron_patches.patch_parallel_seed,
    megatron_patches.patch_weight_initialization,
    megatron_patches.patch_distributed_adam,
    megatron_patches.patch_torch_norms,
    megatron_patches.patch_moe_router,
    megatron_patches.patch_expert_bias,
    megatron_patches.patch_expert_dispatch,
    megatron_patches.patch_checkpoint_results,
    attention_patches.patch_local_attention,
    attention_patches.patch_packed_attention,
    attention_patches.patch_attention_backend,
    attention_patches.patch_saved_norms,
    nemo_patches.patch_checkpoint_devices,
    nemo_patches.patch_accelerator,
    nemo_patches.patch_local_checkpoint_callback,
    nemo_patches.patch_mock_attention_mask,
    nemo_patches.patch_converters,
    nemo_patches.patch_tokenizer_files,
    nemo_patches.patch_extended_modules,
    nemo_patches.patch_gemma_layers,
    importer_patches.patch_importers,
    importer_patches.patch_exporters,
    nemo_patches.patch_stock_quantizer,
    modelopt_patches.patch_dynamic_blocks,
    modelopt_patches.patch_fp4_packer,
)


def enable() -> None:
    """Let this process run NeMo's Megatron training, checkpoints and modelopt on the CPU; a second call does nothing.

    Call it before a model, trainer or strategy is built. It cannot be undone within the process.

    Raises:
        CpuBackendError: If CUDA is available, because a GPU run must stay exactly as it is.
        UnsupportedVersionError: If the installed versions cannot work, before NeMo is imported.
    """
    if is_enabled():
        return
    if torch.cuda.is_available():
        raise CpuBackendError(
            "cpu_backend.enable() was called on a machine with CUDA; it is for machines without one. "
            "Remove the call (or --cpu), or hide the GPUs with CUDA_VISIBLE_DEVICES=''."
        )
    # PyTorch reads it at its first allocation. Most of the time of an operation on weights would be page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if finder.is_enabled():
        versions.check()
    # Import these completely before torch is patched: their modules look up torch functions by identity.
    from torch import _dynamo  # noqa: F401

    import nemo.collections.llm  # noqa: F401

    for patch in PATCHES:
        patch()
    state.set_enabled()

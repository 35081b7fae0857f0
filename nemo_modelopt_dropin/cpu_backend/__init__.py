"""Run NeMo, Megatron-Core and modelopt on CPU ranks over gloo. Opt-in: nothing is patched unless `enable` is called.

Megatron asks CUDA for streams, events, devices, random state and memory figures, and creates tensors with
``device="cuda"``. On a machine without a GPU each of these questions has an answer that keeps the numbers right: work
is synchronous, the device is the CPU, the random state is the CPU's. `PATCHES` lists the answers, one small function
with its reason each. They know nothing of our subpackage and serve the stock one (``NEMO_MODELOPT=stock``) as well.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nemo_modelopt_dropin import finder, versions
from nemo_modelopt_dropin.cpu_backend import nemo_patches

_CPU = torch.device("cpu")
_state: dict[str, Any] = {"enabled": False, "mode": None}


class CpuBackendError(RuntimeError):
    """The CPU backend was asked for where it must not run."""


def is_enabled() -> bool:
    """Return whether `enable` has been called in this process."""
    return _state["enabled"]


def enable() -> None:
    """Let this process run NeMo's Megatron training, checkpoints and modelopt on the CPU; a second call does nothing.

    Call it before a model, trainer or strategy is built. It cannot be undone within the process.

    Raises:
        CpuBackendError: where CUDA is available, because a GPU run must stay exactly as it is.
        UnsupportedVersionError: where the installed versions cannot work, before NeMo is imported.
    """
    if is_enabled():
        return
    if torch.cuda.is_available():
        raise CpuBackendError(
            "cpu_backend.enable() was called on a machine with CUDA; it is for machines without one. "
            "Drop the call (or --cpu), or hide the GPUs with CUDA_VISIBLE_DEVICES=''."
        )
    if finder.is_enabled():
        versions.check()
    # Imported whole before torch is patched: their modules look torch functions up by identity.
    from torch import _dynamo  # noqa: F401

    import nemo.collections.llm  # noqa: F401

    for patch in PATCHES:
        patch()
    _state["enabled"] = True


# --- torch ------------------------------------------------------------------------------------------------------------


class _Stream:
    """A stream of synchronous work: everything queued on it has finished when the call returns."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or _Event()

    def synchronize(self):
        pass

    def query(self):
        return True

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False


class _Event:
    """An event that has happened; elapsed times are zero because nothing runs asynchronously."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


def _answer(value=None):
    """Return a new function that answers ``value``: torch.compile's tables want one object a name."""
    return lambda *args, **kwargs: value


def patch_cuda_runtime() -> None:
    """Streams, events, devices: Megatron's schedules, DDP buckets and checkpoint writers ask for them on every step."""
    cuda = torch.cuda
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = lambda *args, **kwargs: _Stream()
    cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.current_device = lambda: _CPU
    cuda.is_current_stream_capturing = lambda: False
    for name in ("synchronize", "empty_cache", "set_device", "set_stream", "ipc_collect", "init"):
        setattr(cuda, name, _answer())


def patch_cuda_memory() -> None:
    """Memory figures: NeMo's callbacks and Megatron's reports read them; a CPU has no allocator statistics."""
    for name in (
        "max_memory_allocated",
        "memory_allocated",
        "max_memory_reserved",
        "memory_reserved",
    ):
        setattr(torch.cuda, name, _answer(0))
    torch.cuda.memory_stats = lambda *args, **kwargs: {}
    torch.cuda.reset_peak_memory_stats = _answer()


def patch_random_state() -> None:
    """One random state: dropout and initialisation draw from the CPU generator, so Megatron's tracker forks that one.

    Its warning that the CPU generator moved inside a fork is then expected on every fork, and is dropped.
    """
    import megatron.core.tensor_parallel.random as mcore_random

    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # torch.manual_seed calls both of these itself, so they must not call it back.
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed)) and None
    torch.cuda.manual_seed_all = _answer()
    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    logging.getLogger(mcore_random.__name__).addFilter(_drop_fork_warning)


def _drop_fork_warning(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _is_cuda(device) -> bool:
    if isinstance(device, bool):
        return False
    return isinstance(device, int) or (isinstance(device, str | torch.device) and str(device).startswith("cuda"))


class _CudaMeansCpu(TorchFunctionMode):
    """Read ``device="cuda"`` as the CPU, drop ``pin_memory``, and name tensor types as Megatron's optimizers do.

    Those know only ``torch.cuda.FloatTensor`` and its like by name, in gradient clipping and in the distributed
    optimizer. A mode and not patched functions: TorchScript recognises ``torch.empty`` and the like by identity.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type:
            return self._tensor_type(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _tensor_type(tensor, dtype=None, **kwargs):
        if dtype is None:
            return torch.Tensor.type(tensor).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return torch.Tensor.type(tensor, dtype, **kwargs)


def patch_devices() -> None:
    """``device="cuda"``, ``.cuda()`` and pinned memory: models, buffers and batches all stay where they are."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.cuda.FloatTensor = torch.FloatTensor
    _state["mode"] = _CudaMeansCpu()
    _state["mode"].__enter__()


# --- torch.distributed ------------------------------------------------------------------------------------------------


def patch_gloo_scalars() -> None:
    """gloo refuses to gather 0-dimensional tensors; modelopt's depth importance gathers its scores as such."""
    import torch.distributed as dist

    gather = dist.all_gather_into_tensor

    @functools.wraps(gather)
    def all_gather_into_tensor(output_tensor, input_tensor, *args, **kwargs):
        if input_tensor.dim() == 0:
            input_tensor = input_tensor.reshape(1)
        return gather(output_tensor, input_tensor, *args, **kwargs)

    dist.all_gather_into_tensor = all_gather_into_tensor


# --- Megatron-Core ----------------------------------------------------------------------------------------------------

_GPU_ONLY_FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
)


def patch_transformer_config() -> None:
    """Fused kernels exist only for CUDA: switch them off in every config, also in those that importers build."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    check = TransformerConfig.__post_init__

    @functools.wraps(check)
    def __post_init__(self):
        for name in _GPU_ONLY_FUSIONS:
            if getattr(self, name, False):
                setattr(self, name, False)
        self.use_cpu_initialization = True
        check(self)

    TransformerConfig.__post_init__ = __post_init__


def patch_parallel_seed() -> None:
    """NeMo seeds Megatron's random trackers only where it counts GPUs; dropout and initialisation need them anyway."""
    from megatron.core import parallel_state, tensor_parallel

    initialize = parallel_state.initialize_model_parallel

    @functools.wraps(initialize)
    def initialize_model_parallel(*args, **kwargs):
        initialize(*args, **kwargs)
        if not tensor_parallel.get_cuda_rng_tracker().get_states():
            tensor_parallel.model_parallel_cuda_manual_seed(torch.initial_seed() % 2**31)

    parallel_state.initialize_model_parallel = initialize_model_parallel

    import nemo.lightning.megatron_init as megatron_init

    seed_all = megatron_init._set_random_seed

    @functools.wraps(seed_all)
    def _set_random_seed(seed):
        seed_all(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(_stage_seed(seed))

    megatron_init._set_random_seed = _set_random_seed


def _stage_seed(seed: int) -> int:
    """Return the seed of this pipeline stage as NeMo derives it on a GPU: 100 apart."""
    from megatron.core import parallel_state

    return seed + 100 * parallel_state.get_pipeline_model_parallel_rank()


def patch_distributed_adam() -> None:
    """torch's Adam counts steps in a tensor a parameter; Megatron's distributed optimizer shards every state it finds.

    Fused Adam, which a GPU run has, counts in the group, and that count is saved and restored on its own: leave the
    tensors out of what is sharded.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    get_states = DistributedOptimizer._get_main_param_and_optimizer_states
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(get_states)
    def _get_main_param_and_optimizer_states(self, model_param):
        return {name: state for name, state in get_states(self, model_param).items() if name != "step"}

    @functools.wraps(set_states)
    def _set_main_param_and_optimizer_states(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        kept = {"step": state["step"].clone()} if "step" in state else {}
        set_states(self, model_param, {**tensors, **kept})

    DistributedOptimizer._get_main_param_and_optimizer_states = _get_main_param_and_optimizer_states
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_main_param_and_optimizer_states


def patch_torch_norms() -> None:
    """torch's norms refuse sequence parallelism; they are right under it once their weights are marked.

    Megatron adds up the gradients of marked weights over the tensor-parallel ranks, each of which saw a part of the
    sequence. Without Transformer Engine or Apex these norms are all there is.
    """
    from megatron.core.transformer import torch_norm

    def __new__(cls, config, hidden_size, eps=1e-5, persist_layer_norm=False, zero_centered_gamma=False, **kwargs):
        """Return a ``torch.nn`` norm over ``hidden_size``, marked for sequence parallelism where it is on."""
        if zero_centered_gamma or config.layernorm_zero_centered_gamma:
            raise CpuBackendError("zero-centered norm weights need Transformer Engine; there is no such torch norm.")
        kinds = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        if config.normalization not in kinds:
            raise CpuBackendError(
                f"normalization={config.normalization!r} has no torch norm; use one of {list(kinds)}."
            )
        # In the parameters' precision, as Transformer Engine's norms are: NeMo's importers compare the two.
        norm = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    torch_norm.WrappedTorchNorm.__new__ = __new__


def patch_moe_router() -> None:
    """Let the router of experts ask for Transformer Engine's matmul: without it Megatron never defines the name."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


PATCHES: tuple[Callable[[], None], ...] = (
    patch_cuda_runtime,
    patch_cuda_memory,
    patch_devices,
    patch_random_state,
    patch_gloo_scalars,
    patch_transformer_config,
    patch_parallel_seed,
    patch_distributed_adam,
    patch_torch_norms,
    patch_moe_router,
    nemo_patches.patch_checkpoint_devices,
    nemo_patches.patch_accelerator,
    nemo_patches.patch_local_checkpoint_callback,
    nemo_patches.patch_mock_attention_mask,
    nemo_patches.patch_converters,
    nemo_patches.patch_stock_quantizer,
)

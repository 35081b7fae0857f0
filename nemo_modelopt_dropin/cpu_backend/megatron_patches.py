"""Patches of Megatron-Core for CPU ranks; `cpu_backend.PATCHES` lists them."""

from __future__ import annotations

import functools
import os

import torch
from torch.nn import functional

from nemo_modelopt_dropin.cpu_backend import results_queue, zero_centred
from nemo_modelopt_dropin.cpu_backend.state import CpuBackendError

_GPU_ONLY_FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "moe_shared_expert_overlap",
    "persist_layer_norm",
)


def patch_transformer_config() -> None:
    """Turn off fused kernels, which exist only for CUDA, in every config, including those that importers build.

    The fused GELU is the approximation by tanh, so the separate activation must be that one as well. Experts become
    separate modules, which are saved in the same format as those of grouped matrix products.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    check = TransformerConfig.__post_init__

    @functools.wraps(check)
    def __post_init__(self):
        if self.bias_activation_fusion and self.activation_func is functional.gelu:
            from nemo.collections.llm.fn.activation import openai_gelu

            self.activation_func = openai_gelu
        if getattr(self, "cross_entropy_fusion_impl", "native") == "te":
            self.cross_entropy_fusion_impl = "native"
        for name in _GPU_ONLY_FUSIONS:
            if getattr(self, name, False):
                setattr(self, name, False)
        self.use_cpu_initialization = True
        check(self)

    TransformerConfig.__post_init__ = __post_init__


def patch_parallel_seed() -> None:
    """Seed Megatron's random trackers, which NeMo does only if it finds GPUs; dropout and initialisation need them."""
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
    """Return the seed of this pipeline stage as NeMo derives it on a GPU: 100 more for each stage."""
    from megatron.core import parallel_state

    return seed + 100 * parallel_state.get_pipeline_model_parallel_rank()


def patch_weight_initialization() -> None:
    """Draw the initial values of a weight in its own memory if one rank holds the whole weight.

    Megatron draws them into a tensor of the whole weight and copies that once more to cut it for the ranks: building a
    model took three times the memory of its embedding. The values stay the same.
    """
    from megatron.core.tensor_parallel import layers

    initialize = layers._initialize_affine_weight_cpu

    @functools.wraps(initialize)
    def _initialize_affine_weight_cpu(
        weight, output_size, input_size, size, dim, init_method, stride=1, *more, **kwargs
    ):
        drawn_in = {weight.dtype, kwargs.get("params_dtype", torch.float32)}
        whole = weight.shape == (output_size, input_size) and drawn_in == {torch.float32}
        if more or kwargs.get("return_master_weight") or not whole:
            return initialize(weight, output_size, input_size, size, dim, init_method, stride, *more, **kwargs)
        if not kwargs.get("skip_set_tensor_parallel_attributes"):
            layers.set_tensor_model_parallel_attributes(tensor=weight, is_parallel=True, dim=dim, stride=stride)
        init_method(weight.detach())
        return None

    layers._initialize_affine_weight_cpu = _initialize_affine_weight_cpu


def patch_distributed_adam() -> None:
    """Leave the step counts of torch's Adam out of what Megatron's distributed optimizer shards.

    torch's Adam counts steps in one tensor per parameter, and the distributed optimizer shards every state of a
    parameter. Fused Adam, which GPU runs use, counts in the parameter group; that count is saved and restored
    separately.
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
    """Allow torch's norms with sequence parallelism: they are correct if their weights are marked.

    Megatron sums the gradients of marked weights over the tensor-parallel ranks, each of which has seen a part of the
    sequence. Without Transformer Engine or Apex there are no other norms.
    """
    from megatron.core.transformer import torch_norm

    def __new__(cls, config, hidden_size, eps=1e-5, persist_layer_norm=False, zero_centered_gamma=False, **kwargs):
        """Return a norm over ``hidden_size``, zero-centred if configured, marked if sequence parallelism is on."""
        kinds = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        if zero_centered_gamma or config.layernorm_zero_centered_gamma:
            kinds = {"LayerNorm": zero_centred.ZeroCentredLayerNorm, "RMSNorm": zero_centred.ZeroCentredRMSNorm}
        if config.normalization not in kinds:
            raise CpuBackendError(
                f"normalization={config.normalization!r} has no torch norm; use one of {list(kinds)}."
            )
        # Transformer Engine's norms have the parameters' precision too, and NeMo's importers compare the two.
        norm = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    torch_norm.WrappedTorchNorm.__new__ = __new__


def patch_moe_router() -> None:
    """Define the name of Transformer Engine's matmul, which the router of experts reads even without that package."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def patch_expert_bias() -> None:
    """Copy the output of experts' second layer, to which Megatron adds the bias in place.

    Without tensor parallelism a local layer returns a view, whose gradient such an addition would spoil.
    """
    from megatron.core.transformer.mlp import MLP

    construct = MLP.__init__

    @functools.wraps(construct)
    def __init__(self, config, *args, is_expert=False, **kwargs):
        construct(self, config, *args, is_expert=is_expert, **kwargs)
        if is_expert and self.config.add_bias_linear:
            self.linear_fc2.register_forward_hook(_copied)

    MLP.__init__ = __init__


def _copied(module: torch.nn.Module, args: tuple, output: tuple) -> tuple:
    """Return a layer's output with its first tensor copied."""
    return (output[0].clone(), *output[1:])


def patch_expert_dispatch() -> None:
    """Pass the numbers of tokens that go to each rank as arrays, also if they are on the CPU already.

    Megatron converts them when it copies them from a GPU; torch accepts no tensors, so expert parallelism failed.
    """
    from megatron.core.transformer.moe import token_dispatcher

    move = getattr(token_dispatcher, "maybe_move_tensor_to_cpu", None)
    if move is None:
        return

    @functools.wraps(move)
    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def patch_checkpoint_results() -> None:
    """Pass the results of checkpoint writers through memory, not through a spawned process; see `results_queue`."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if hasattr(os, "memfd_create"):  # Linux
        filesystem_async._get_write_results_queue = results_queue.of_this_process

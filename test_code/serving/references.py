"""Plain PyTorch instead of kernels that vLLM has for GPUs or for a CPU with AMX only. Used inside vLLM's process.

vLLM still reads the configuration, chooses the scheme, creates the parameters, loads, fuses and converts the weights.
Only the matrix products differ: the parameters that vLLM loaded are decoded, and inputs are rounded as its scheme says.
Where vLLM has kernels for every CPU, or an emulation of its own, these are used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
MXFP8_BLOCK = 32


# --- numbers ----------------------------------------------------------------------------------------------------------


def expand(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Repeat scales, with as many axes as the weight and sizes that divide its sizes, to the weight's shape."""
    for axis, size in enumerate(weight.shape):
        scale = scale.repeat_interleave(-(-size // scale.shape[axis]), axis).narrow(axis, 0, size)
    return scale.float()


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the signed codes of int32 words, the lowest bits first, along the last axis."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2).float() - 2 ** (bits - 1)


def fp8_static(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round an input to FP8 with a stored scale."""
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8).float() * scale


def fp8_dynamic(x: torch.Tensor) -> torch.Tensor:
    """Round an input to FP8 with a scale for each row."""
    return fp8_static(x, x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX)


def int8_dynamic(x: torch.Tensor) -> torch.Tensor:
    """Round an input to INT8 with a scale for each row."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round() * scale


def mxfp8_dynamic(x: torch.Tensor) -> torch.Tensor:
    """Round an input to MXFP8, with vLLM's own function."""
    from vllm.model_executor.layers.quantization.utils import mxfp8_utils

    codes, scales = mxfp8_utils._mxfp8_e4m3_quantize_torch(x.to(torch.bfloat16))
    return mxfp8_utils.dequant_mxfp8_to_bf16(codes, scales).float()


# --- linear layers ----------------------------------------------------------------------------------------------------


def enable_linear() -> None:
    """Register the references for the formats of linear layers that have no kernel on this CPU."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm import Fp8BlockScaledMMLinearKernel, FP8ScaledMMLinearKernel
    from vllm.platforms import current_platform
    from vllm.scalar_type import scalar_types

    class ReferenceFp8Block(Fp8BlockScaledMMLinearKernel):
        # vLLM's kernel for a CPU with AMX leaves the input as it is, too.
        apply_input_quant = False

        @classmethod
        def is_supported(cls, compute_capability=None):
            return True, None

        def apply_block_scaled_mm(self, A, B, As, Bs):
            return A.float() @ (B.float() * expand(Bs, B)).T

    class ReferenceFp8WeightOnly(FP8ScaledMMLinearKernel):
        @classmethod
        def is_supported(cls, compute_capability=None):
            return True, None

        @classmethod
        def can_implement(cls, config):
            return True, None

        def apply_weights(self, layer, x, bias=None):
            # `[in, out]`, and one scale for each output.
            weight = layer.weight.float().T * layer.weight_scale.reshape(-1, 1)
            return F.linear(x, weight.to(x.dtype), bias)

        def apply_scaled_mm(self, **kwargs):
            raise NotImplementedError

    class ReferenceIntWeightOnly(MPLinearKernel):
        @classmethod
        def get_min_capability(cls):
            return -1

        @classmethod
        def can_implement(cls, config):
            return config.weight_type in (scalar_types.uint8b128, scalar_types.uint4b8), "INT8 and INT4 only"

        def process_weights_after_loading(self, layer):
            pass

        def apply_weights(self, layer, x, bias=None):
            packed, scale, _ = self._get_weight_params(layer)
            codes = unpack(packed, self.config.weight_type.size_bits)
            return F.linear(x, (codes * expand(scale, codes)).to(x.dtype), bias)

    cpu = current_platform._enum
    linear._POSSIBLE_FP8_BLOCK_KERNELS[cpu].append(ReferenceFp8Block)
    linear._POSSIBLE_WFP8A16_KERNELS[cpu].append(ReferenceFp8WeightOnly)
    # vLLM's kernel for INT4 is in its build for AVX-512 only.
    has_int4 = hasattr(torch.ops._C, "cpu_gemm_wna16")
    linear._POSSIBLE_KERNELS[cpu].insert(len(linear._POSSIBLE_KERNELS[cpu]) if has_int4 else 0, ReferenceIntWeightOnly)
    enable_four_bits(linear)


def enable_four_bits(linear) -> None:
    """Use vLLM's emulations for NVFP4 and MXFP8, and the first without rounded inputs for W4A16_NVFP4."""
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w4a4_nvfp4
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype
    from vllm.platforms import current_platform

    class ReferenceNvFp4WeightOnly(linear.EmulationNvFp4LinearKernel):
        def apply_weights(self, layer, x, bias=None):
            parts = layer.weight.data, layer.weight_scale.data, layer.weight_global_scale
            return F.linear(x, dequantize_to_dtype(*parts, x.dtype, 16, swizzle=False), bias)

    class EmulationWithRoundedInputs(linear.EmulationMxfp8LinearKernel):
        def apply_weights(self, layer, x, bias=None):
            return super().apply_weights(layer, mxfp8_dynamic(x).to(x.dtype), bias)

    def init_nvfp4_linear_kernel(use_a16=False):
        return (ReferenceNvFp4WeightOnly if use_a16 else linear.EmulationNvFp4LinearKernel)(
            linear.NvFp4LinearLayerConfig()
        )

    for module in (modelopt, compressed_tensors_w4a4_nvfp4):
        module.init_nvfp4_linear_kernel = init_nvfp4_linear_kernel
    linear._POSSIBLE_MXFP8_KERNELS[current_platform._enum] = [EmulationWithRoundedInputs]


# --- experts ----------------------------------------------------------------------------------------------------------


def _tensor_scales(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return scales `[e]` or `[e, 2]` (gate and up) with three axes."""
    return scale.reshape(weight.shape[0], -1, 1)


def decode(layer, name: str) -> torch.Tensor:
    """Return the weights of all experts, `[e, o, i]` in fp32, from the parameters that vLLM loaded.

    Args:
        layer: vLLM's module with the experts' parameters.
        name: ``w13`` or ``w2``.
    """
    part = {leaf.removeprefix(f"{name}_"): p.data for leaf, p in layer.named_parameters() if leaf.startswith(name)}
    scale = part.get("weight_scale", part.get("weight_scale_inv"))
    fp4 = part.get("weight_packed", part.get("weight"))
    if fp4.dtype == torch.uint8:
        from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import break_fp4_bytes

        # compressed-tensors stores the reciprocal.
        scale_2 = part["weight_scale_2"] if "weight_scale_2" in part else part["weight_global_scale"].reciprocal()
        codes = break_fp4_bytes(fp4.flatten(0, 1), torch.float32).unflatten(0, fp4.shape[:2])
        return codes * expand(scale, codes) * expand(_tensor_scales(scale_2, codes), codes)
    if "weight_packed" in part:
        bits = 32 * part["weight_packed"].shape[-1] // _width(layer, name)
        codes = unpack(part["weight_packed"], bits)
    else:
        codes = part["weight"].float()
    if scale.dtype == torch.uint8:
        scale = torch.exp2(scale.float() - 127)
    return codes * expand(scale if scale.dim() == 3 else _tensor_scales(scale, codes), codes)


def _width(layer, name: str) -> int:
    return layer.hidden_size if name == "w13" else layer.intermediate_size_per_partition


def input_rounding(method, layer, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return how a scheme rounds the inputs of the experts.

    Args:
        method: vLLM's method for the experts.
        layer: See `decode`.
        name: See `decode`.
    """
    kind, scale = type(method).__name__.lower(), getattr(layer, f"{name}_input_scale", None)
    if "nvfp4" in kind and not method.use_a16:
        from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant_dequant

        # compressed-tensors stores the reciprocal. One scale for all experts, as vLLM's kernels have it.
        inverse = layer.get_parameter(f"{name}_input_global_scale") if scale is None else 1 / scale
        return lambda x: ref_nvfp4_quant_dequant(x, inverse.min().reshape(1), 16)
    if "mxfp8" in kind:
        return mxfp8_dynamic
    if "w8a8int8" in kind:
        return int8_dynamic
    if scale is not None and "fp8moe" in kind:
        # One scale for all experts, as vLLM's kernels have it.
        return lambda x: fp8_static(x, scale.max())
    if "w8a8fp8" in kind and not method.block_quant:
        return fp8_dynamic
    return lambda x: x


def prepare(method, layer) -> None:
    """Decode the experts of a layer: vLLM's ``process_weights_after_loading``."""
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG

    method.moe_quant_config = FUSED_MOE_UNQUANTIZED_CONFIG
    layer.reference = [(decode(layer, name), input_rounding(method, layer, name)) for name in ("w13", "w2")]


def apply(method, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input) -> torch.Tensor:
    """Compute the experts of each token, one expert after the other: vLLM's ``apply``."""
    (w13, round_in), (w2, round_between) = layer.reference
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(w13.shape[0]):
        rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
        if len(rows):
            gate, up = (round_in(x[rows].float()) @ w13[expert].T).chunk(2, dim=-1)
            y = round_between(F.silu(gate) * up) @ w2[expert].T
            out.index_add_(0, rows, topk_weights[rows, slots, None].float() * y)
    return out.to(x.dtype)


class ReferenceExperts:
    """The kernel class that the experts' methods get: it only answers that routing happens outside."""

    @staticmethod
    def is_monolithic() -> bool:
        """Return False: vLLM's router chooses the experts."""
        return False


def enable_experts() -> None:
    """Let quantized experts be computed by `apply`."""
    from vllm.model_executor.layers.quantization import fp8, modelopt

    package = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
    w8a8_fp8, w8a8_int8, wna16, nvfp4, mxfp8 = (
        importlib.import_module(f"{package}.compressed_tensors_moe_{name}")
        for name in ("w8a8_fp8", "w8a8_int8", "wna16", "w4a4_nvfp4", "w8a8_mxfp8")
    )
    for module, methods in [
        (modelopt, ("ModelOptFp8MoEMethod", "ModelOptNvFp4FusedMoE", "ModelOptMxFp8FusedMoE")),
        (fp8, ("Fp8MoEMethod",)),
        (w8a8_fp8, ("CompressedTensorsW8A8Fp8MoEMethod",)),
        (w8a8_int8, ("CompressedTensorsW8A8Int8MoEMethod",)),
        (wna16, ("CompressedTensorsWNA16MoEMethod",)),
        (nvfp4, ("CompressedTensorsW4A4Nvfp4MoEMethod",)),
        (mxfp8, ("CompressedTensorsW8A8Mxfp8MoEMethod",)),
    ]:
        for name in [name for name in vars(module) if name.startswith("select_") and name.endswith("_moe_backend")]:
            # Marlin's name, because vLLM takes scales by channel for no other kernel of 4 and 8 bits.
            backend = wna16.WNA16MoEBackend.MARLIN if module is wna16 else "reference"
            setattr(module, name, lambda *args, backend=backend, **kwargs: (backend, ReferenceExperts))
        for method in methods:
            getattr(module, method).process_weights_after_loading = prepare
            getattr(module, method).apply = apply


def enable_cache() -> None:
    """Let vLLM round keys and values to the nearest number of FP8, as modelopt and the instructions of GPUs do.

    Its kernel for CPUs (AVX-512) cuts them off towards zero: 1.1171875 becomes 1.0 instead of 1.125. For normally
    distributed numbers, the outputs of attention then differ by 7 % from those without a quantized cache, not by 3.4 %.
    Numbers of FP8 with scale 1 stay as they are. When the cache is read, vLLM's kernel applies the scales.
    """
    from vllm import _custom_ops

    store = _custom_ops.cpu_attn_reshape_and_cache

    def rounded(key, value, *args, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"):
        if kv_cache_dtype.startswith("fp8"):
            key, value = (
                fp8_static(x.float(), torch.tensor(scale)).div(scale).to(x.dtype)
                for x, scale in ((key, k_scale), (value, v_scale))
            )
            k_scale = v_scale = 1.0
        store(key, value, *args, k_scale=k_scale, v_scale=v_scale, kv_cache_dtype=kv_cache_dtype)

    _custom_ops.cpu_attn_reshape_and_cache = rounded


def enable_requantization() -> None:
    """Let vLLM quantize the parts of a fused layer with their largest scale, for which it has kernels on GPUs only."""
    from vllm import _custom_ops

    def scaled_fp8_quant(x, scale, *args, **kwargs):
        return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale

    _custom_ops.scaled_fp8_quant = scaled_fp8_quant


# --- all of them ------------------------------------------------------------------------------------------------------


def enable() -> None:
    """Register all references, and replace the fused activation, which exists for GPUs only."""
    from vllm.model_executor.layers.fusion import fused_act_quant

    # Before the models are imported, which bind the function.
    fused_act_quant.maybe_fused_act_quant = lambda activation, x, linear: activation(x)
    enable_cache()
    enable_requantization()
    enable_linear()
    enable_experts()


def kernels_of(model: torch.nn.Module) -> list[str]:
    """Return the names of the classes that compute the quantized layers of a model of vLLM's."""
    found = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        scheme = getattr(module, "scheme", method)
        kernels = [getattr(scheme, name, None) for name in ("kernel", "fp8_linear", "linear_kernel")]
        found |= {type(kernel).__name__ for kernel in kernels if kernel is not None}
        if hasattr(module, "reference"):
            found.add(f"{type(method).__name__} (reference)")
    return sorted(found)


def caches_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return the KV caches of the layers of a model of vLLM's."""
    found = (getattr(module, "kv_cache", None) for module in model.modules())
    return [cache for cache in found if isinstance(cache, torch.Tensor)]


def cache_of(model: torch.nn.Module) -> int:
    """Return the bits of a number in the KV cache of a model of vLLM's."""
    return 8 * max(cache.element_size() for cache in caches_of(model))

"""A reference in PyTorch for the functions of ``transformer_engine_torch`` that these tests call.

Sums are accumulated in fp32, as the kernels do. Functions without a reference exist, because TE looks many of them up
when it is imported, and raise an error that names them.
"""

from __future__ import annotations

import enum
import importlib.machinery
import types

import torch


class DType(enum.Enum):
    """TE's names of data types."""

    kByte = torch.uint8
    kInt16 = torch.int16
    kInt32 = torch.int32
    kInt64 = torch.int64
    kFloat32 = torch.float32
    kFloat16 = torch.float16
    kBFloat16 = torch.bfloat16
    kFloat8E4M3 = torch.float8_e4m3fn
    kFloat8E5M2 = torch.float8_e5m2
    kFloat4E2M1 = "float4_e2m1"


# --- matrix products -------------------------------------------------------------------------------------------------


def generic_gemm(
    a,
    transpose_a,
    b,
    transpose_b,
    out,
    quantizer,
    out_dtype,
    bias,
    bias_dtype,
    gelu,
    gelu_in,
    grad,
    workspace,
    workspace_size,
    accumulate,
    use_split_accumulator,
    **overlap,
):
    """Return ``op(b) @ op(a)``, the gradient of the bias, and two outputs that only fused kernels have.

    TE passes matrices in the order of cuBLAS, which reads rows as columns. A bias is added in a forward pass; in a
    backward pass (``grad``) its gradient is returned.
    """
    if quantizer is not None or gelu or overlap.get("comm_overlap") is not None:
        raise NotImplementedError(
            "generic_gemm has a reference without quantizer, GELU and overlapped communication only"
        )
    product = _product(a, transpose_a, b, transpose_b) * overlap.get("alpha", 1.0)
    bias_grad = None
    if bias is not None and grad:
        bias_grad = _rows(b).float().sum(0).to(bias.dtype)
    elif bias is not None and bias.numel():
        product = product + bias.float()
    if not transpose_b:
        product = product.view(*b.shape[:-1], product.shape[-1])
    return _stored(product, out, out_dtype.value if out_dtype else b.dtype, accumulate), bias_grad, None, None


def te_general_grouped_gemm(
    a, transpose_a, b, transpose_b, out, out_dtype, m_splits, bias, bias_dtype, single_output, gelu_in, grad, *rest
):
    """Write the products of pairs of matrices into ``out``; return the biases, or their gradients (``grad``)."""
    accumulate = rest[2]
    targets = out[0].split(m_splits) if single_output else out
    for first, second, target, one_bias in zip(a, b, targets, bias, strict=True):
        product = _product(first, transpose_a, second, transpose_b)
        if one_bias.numel() and grad:
            one_bias.copy_(_rows(second).float().sum(0))
        elif one_bias.numel():
            product = product + one_bias.float()
        _stored(product, target, target.dtype, accumulate)
    return bias


def _rows(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.reshape(-1, matrix.shape[-1])


def _product(a, transpose_a, b, transpose_b) -> torch.Tensor:
    left, right = _rows(b).float(), _rows(a).float()
    return (left.T if transpose_b else left) @ (right.T if transpose_a else right)


def _stored(value: torch.Tensor, out: torch.Tensor | None, dtype: torch.dtype, accumulate: bool) -> torch.Tensor:
    if out is None:
        return value.to(dtype)
    value = value.view(out.shape)
    return out.add_(value) if accumulate else out.copy_(value)


# --- norms, over rows `[n, h]` ---------------------------------------------------------------------------------------


def _factor(weight: torch.Tensor, zero_centered: bool) -> torch.Tensor:
    return weight.float() + 1.0 if zero_centered else weight.float()


def _normalized(x, means, rsigma) -> torch.Tensor:
    x = x.float() if means is None else x.float() - means[:, None]
    return x * rsigma[:, None]


def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, sm_margin, zero_centered):
    """Return the output, nothing, and the reciprocal root mean squares `[n]`."""
    rsigma = torch.rsqrt(x.float().square().mean(-1) + eps)
    y = _normalized(x, None, rsigma) * _factor(weight, zero_centered)
    return _stored(y, out, dtype.value, False), None, rsigma


def layernorm_fwd(x, weight, bias, eps, out, quantizer, dtype, sm_margin, zero_centered):
    """Return the output, the means `[n]` and the reciprocal standard deviations `[n]`."""
    means = x.float().mean(-1)
    rsigma = torch.rsqrt(x.float().var(-1, correction=0) + eps)
    y = _normalized(x, means, rsigma) * _factor(weight, zero_centered) + bias.float()
    return _stored(y, out, dtype.value, False), means, rsigma


def _norm_gradients(dy, x, means, rsigma, weight, zero_centered) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the input and of the weight."""
    normalized, dy = _normalized(x, means, rsigma), dy.float()
    scaled = dy * _factor(weight, zero_centered)
    dx = scaled - normalized * (scaled * normalized).mean(-1, keepdim=True)
    if means is not None:
        dx = dx - scaled.mean(-1, keepdim=True)
    return (dx * rsigma[:, None]).to(x.dtype), (dy * normalized).sum(0).to(weight.dtype)


def rmsnorm_bwd(dy, x, rsigma, weight, sm_margin, zero_centered):
    """Return the gradients of the input and of the weight."""
    return _norm_gradients(dy, x, None, rsigma, weight, zero_centered)


def layernorm_bwd(dy, x, means, rsigma, weight, sm_margin, zero_centered):
    """Return the gradients of the input, of the weight and of the bias."""
    return *_norm_gradients(dy, x, means, rsigma, weight, zero_centered), dy.float().sum(0).to(weight.dtype)


# --- lists of tensors: Adam and gradient norms -----------------------------------------------------------------------


def multi_tensor_l2norm(chunk_size, noop_flag, lists, per_tensor=False):
    """Return the norm over all tensors `[1]` and the norms of each, if asked for."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]]) if lists[0] else torch.zeros(1)
    return norms.norm().reshape(1), norms if per_tensor else torch.zeros(1)


def multi_tensor_scale(chunk_size, noop_flag, lists, scale):
    """Write the scaled tensors of the first list into the second."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * scale)


def multi_tensor_adam(
    chunk_size, noop_flag, lists, lr, beta1, beta2, eps, step, decoupled, bias_correction, weight_decay
):
    """Take a step of Adam (``decoupled``: AdamW) with gradients, weights and both moments."""
    corrections = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, weight, first, second, *master in zip(*lists, strict=True):
        target = master[0] if master else weight
        grad = grad.float() if decoupled else grad.float() + weight_decay * target
        first.lerp_(grad.to(first.dtype), 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (first / corrections[0]) / ((second / corrections[1]).sqrt() + eps)
        target.sub_(lr * (update + weight_decay * target if decoupled else update))
        if master:
            weight.copy_(target)


# --- the module ------------------------------------------------------------------------------------------------------

_REFERENCES = (
    DType,
    generic_gemm,
    te_general_grouped_gemm,
    rmsnorm_fwd,
    rmsnorm_bwd,
    layernorm_fwd,
    layernorm_bwd,
    multi_tensor_l2norm,
    multi_tensor_scale,
    multi_tensor_adam,
)


class _AnyMember(type):
    """A class for whose every attribute there is a value, like the enumerations of the extension module."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = object.__new__(cls)
        setattr(cls, name, value)
        return value


class _Extension(types.ModuleType):
    """The extension module: references, and names for what has none."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = _AnyMember(name, (), {}) if name[0].isupper() else _missing(name)
        setattr(self, name, made)
        return made


def _missing(name: str):
    def call(*args, **kwargs):
        raise NotImplementedError(f"transformer_engine_torch.{name} has no reference in test_code/te_on_cpu")

    call.__name__ = name
    return call


def module(name: str) -> types.ModuleType:
    """Return a new extension module of that name."""
    made = _Extension(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for reference in _REFERENCES:
        setattr(made, reference.__name__, reference)
    made.get_num_cublas_streams = lambda: 1
    made.get_cublasLt_version = lambda: 120_900
    made.get_cudnn_version = lambda: 91_000
    return made

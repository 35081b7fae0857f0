"""Round tensors to formats whose blocks get their scales from the data: NVFP4, MXFP8 and MXFP4, in plain torch.

modelopt has CUDA kernels for them only. The results are those of its packers (``NVFP4QTensor``, ``MXFP8QTensor``,
``MXFP4QTensor``) and their ``dequantize``, bit for bit: a model computes with the values that its files hold.
The packers define what happens on ties: MXFP4 rounds them towards zero, the others to the even code.

In two cases the packers return NaN and these functions do not: a block whose largest value exceeds the amax of the
calibration is clipped to it, as on a GPU, and a tensor whose amax is zero becomes zero.
"""

from __future__ import annotations

import torch

# Bits of exponent and mantissa.
_E2M1, _E4M3, _E8M0 = (2, 1), (4, 3), (8, 0)
_E2M1_MAX, _E4M3_MAX = 6.0, 448.0
# Format of the elements and of the scale of a block.
_NVFP4, _MXFP8, _MXFP4 = (_E2M1, _E4M3), (_E4M3, _E8M0), (_E2M1, _E8M0)
_SIMULATED = frozenset({_NVFP4, _MXFP8, _MXFP4})

Bits = tuple[int, int] | int


def is_simulated(num_bits: Bits | list, scale_bits: Bits | list | None) -> bool:
    """Return whether `quantized` supports a format.

    Args:
        num_bits: Bits of exponent and mantissa of an element, or the bits of an integer.
        scale_bits: Bits of exponent and mantissa of a block's scale; None if there is none.
    """
    return (_plain(num_bits), _plain(scale_bits)) in _SIMULATED


def quantized(
    values: torch.Tensor, block: int, amax: torch.Tensor | None, num_bits: Bits, scale_bits: Bits
) -> torch.Tensor:
    """Return values rounded to a block format, in their own dtype.

    Args:
        values: Any shape `[..., i]`; a block is a run of ``block`` values along the last axis, the last may be shorter.
        block: Values that share a scale.
        amax: The largest absolute value of the tensor, from the calibration; only NVFP4 uses it.
        num_bits: See `is_simulated`.
        scale_bits: See `is_simulated`.

    Raises:
        ValueError: If the format is not supported.
    """
    if not is_simulated(num_bits, scale_bits):
        raise ValueError(f"num_bits={num_bits} with scale_bits={scale_bits} is not one of {sorted(_SIMULATED)}")
    width = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, -width % block)) if width % block else values
    blocks = padded.unflatten(-1, (-1, block)).float()
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    kind = (_plain(num_bits), _plain(scale_bits))
    if kind == _NVFP4:
        found = _nvfp4(blocks, largest, largest.amax() if amax is None else amax.float().amax())
    elif kind == _MXFP8:
        found = _mxfp8(blocks, largest)
    else:
        found = _mxfp4(blocks, largest)
    return found.flatten(-2)[..., :width].to(values.dtype)


def _plain(bits: Bits | list | None):
    """Return bits as a tuple if they are a sequence, as in a JSON file."""
    return tuple(bits) if isinstance(bits, (list, tuple)) else bits


def _nvfp4(blocks: torch.Tensor, largest: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Return FP4 E2M1 times a scale in FP8 E4M3 of each block, times one fp32 scale of the tensor."""
    tensor_scale = (amax / (_E2M1_MAX * _E4M3_MAX)).clamp_min(torch.finfo(torch.float32).tiny)
    scale = largest / (_E2M1_MAX * tensor_scale)
    scale = torch.where(scale == 0, 1.0, scale).clamp_max(_E4M3_MAX)
    scale = scale.to(torch.float8_e4m3fn).float() * tensor_scale
    # The scale of a block of tiny values may be rounded to zero; its values are zeros.
    return _to_e2m1(blocks / torch.where(scale == 0, 1.0, scale)).mul_(scale)


def _mxfp8(blocks: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Return FP8 E4M3 times a power of two of each block."""
    share = largest / _E4M3_MAX
    exponent = torch.where(share > 0, share.log2(), -127.0).ceil().clamp(-127, 127)
    codes = (blocks * (-exponent).exp2()).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.float().mul_(exponent.exp2())


def _mxfp4(blocks: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Return FP4 E2M1, with ties rounded towards zero, times a power of two of each block."""
    scale = (largest / _E2M1_MAX).log2().clamp_min(-127.0).ceil().exp2()
    return _to_e2m1(blocks / scale, ties_to_zero=True).mul_(scale)


def _to_e2m1(values: torch.Tensor, ties_to_zero: bool = False) -> torch.Tensor:
    """Return the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; ties go to the even code by default."""
    size = values.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    steps = size.div_(step)
    steps = (steps - 0.5).ceil().clamp_min_(0.0) if ties_to_zero else steps.round_()
    return steps.mul_(step).clamp_max_(_E2M1_MAX).copysign_(values)

"""Scales and codes of NVFP4 and MXFP8, whose blocks get their scales from the weight, by pure functions of tensors.

They are those of modelopt's packers, ``NVFP4QTensor`` and ``MXFP8QTensor``, on any device. Only where modelopt divides
by a scale of zero, the scale here is the smallest positive one and the codes are zero.

Axes: o output, i input features, n blocks of the input.
"""

from __future__ import annotations

import torch

_E2M1_MAX, _E4M3_MAX = 6.0, 448.0
# The smallest positive number in FP8 E4M3.
_SMALLEST_E4M3 = 2.0**-9
_E8M0_BIAS = 127
# The sixteen values of FP4 E2M1 by their code.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# The block scales of NVFP4 are in units of amax divided by this number.
NVFP4_MAXBOUND = _E2M1_MAX * _E4M3_MAX


def blocks_of(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Return a weight as fp32 blocks `[o, n, size]`.

    Args:
        weight: The weight `[o, i]`.
        size: Inputs in a block; it divides i.
    """
    return weight.detach().float().unflatten(-1, (-1, size))


def largest(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Return the largest absolute value `[o, n]` of each block."""
    return blocks_of(weight, size).abs().amax(dim=-1)


def nvfp4_scale(block_amax: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """Return the scales `[o, n]` of blocks in FP8 E4M3, all positive.

    Args:
        block_amax: The largest absolute value `[o, n]` of each block.
        scale_2: The fp32 scale of the tensor.
    """
    rounded = _rounded_share(block_amax, scale_2)
    return torch.where(rounded == 0, _SMALLEST_E4M3, rounded).to(torch.float8_e4m3fn)


def _rounded_share(block_amax: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """Return the scales of blocks rounded to FP8 E4M3, in fp32; that of a block of tiny values can be zero."""
    share = block_amax / (_E2M1_MAX * scale_2)
    share = torch.where(share == 0, 1.0, share).clamp_max(_E4M3_MAX)
    return share.to(torch.float8_e4m3fn).float()


def nvfp4_codes(
    weight: torch.Tensor,
    block_amax: torch.Tensor,
    scale: torch.Tensor,
    scale_2: torch.Tensor,
    on_grid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the FP4 E2M1 codes `[o, i]`, one in each uint8.

    Args:
        weight: The weight `[o, i]`.
        block_amax: The largest absolute value `[o, n]` of each block.
        scale: The result of `nvfp4_scale`.
        scale_2: The fp32 scale of the tensor.
        on_grid: The weight that a quantizer already rounded, if there is one; then its values are encoded.
    """
    size = weight.shape[-1] // scale.shape[-1]
    factor = (scale.float() * scale_2)[..., None]
    negative = blocks_of(weight, size) / factor < 0
    magnitude = (blocks_of(weight if on_grid is None else on_grid, size) / factor).abs()
    codes = _e2m1_magnitude(magnitude) | (negative.to(torch.uint8) << 3)
    empty = _rounded_share(block_amax, scale_2) == 0
    return codes.masked_fill(empty[..., None], 0).flatten(-2)


def _e2m1_magnitude(size: torch.Tensor) -> torch.Tensor:
    """Return the codes 0 to 7 of the nearest values; ties go to the even code."""
    below_2, below_4 = size < 2, size < 4
    step = torch.where(below_2, 0.5, torch.where(below_4, 1.0, 2.0))
    offset = torch.where(below_2, 0, torch.where(below_4, 2, 4))
    return ((size / step).clamp_max(8).round().to(torch.int64) + offset).clamp_max(7).to(torch.uint8)


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """Return the values of FP4 E2M1 codes in fp32."""
    return torch.tensor(E2M1, device=codes.device)[codes.long()]


def mxfp8_scale(block_amax: torch.Tensor) -> torch.Tensor:
    """Return the E8M0 scales `[o, n]` of blocks, powers of two as exponents plus 127 in uint8.

    Args:
        block_amax: The largest absolute value `[o, n]` of each block.
    """
    share = block_amax / _E4M3_MAX
    exponent = torch.where(share > 0, share.log2(), -127.0).ceil().clamp(-127, 127)
    return (exponent + _E8M0_BIAS).to(torch.uint8)


def e8m0_values(scale: torch.Tensor) -> torch.Tensor:
    """Return the powers of two of E8M0 scales in fp32."""
    return torch.exp2(scale.float() - _E8M0_BIAS)


def mxfp8_codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the FP8 E4M3 codes `[o, i]` of a weight.

    Args:
        weight: The weight `[o, i]`.
        scale: The result of `mxfp8_scale`.
    """
    factor = torch.exp2(_E8M0_BIAS - scale.float())[..., None]
    scaled = blocks_of(weight, weight.shape[-1] // scale.shape[-1]) * factor
    return scaled.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).flatten(-2)

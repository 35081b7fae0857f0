"""Quantize the input of a layer as the reader of its stored tensors does, to compare logits."""

from __future__ import annotations

import torch

from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer

from .blocks import NVFP4_MAXBOUND
from .layer import BY_TOKEN, INT8, Layer

_E2M1, _E4M3, _E8M0 = (2, 1), (4, 3), (8, 0)


class BlockQuantizer(TensorQuantizer):
    """A quantizer for NVFP4 and MXFP8 that runs on any device.

    Attributes:
        block: Inputs that share a scale.
        bits: Bits of exponent and mantissa of an element and of a scale.
    """

    def __init__(self, block: int, bits: tuple[tuple[int, int], tuple[int, int]], amax: torch.Tensor | None) -> None:
        sizes = {-1: block, "type": "dynamic", "scale_bits": bits[1]}
        super().__init__(QuantizerAttributeConfig(num_bits=bits[0], block_sizes=sizes), amax=amax)
        self.block, self.bits = block, bits

    def _fake_quantize(self, inputs: torch.Tensor) -> torch.Tensor:
        from nemo_modelopt_dropin.cpu_backend import block_formats

        return block_formats.quantized(inputs, self.block, self.amax, *self.bits)


def input_quantizer(layer: Layer) -> TensorQuantizer | None:
    """Return modelopt's quantizer for the input of a layer, or None if the input is not quantized.

    Args:
        layer: What is stored for the layer; its codes are not needed.
    """
    algorithm, scale = layer.algorithm, layer.input_scale
    if algorithm == "MXFP8":
        return BlockQuantizer(layer.facts["group_size"], (_E4M3, _E8M0), None)
    if algorithm in BY_TOKEN:
        settings = {"num_bits": 8 if algorithm in INT8 else _E4M3, "type": "dynamic", "block_sizes": {-1: None}}
        return TensorQuantizer(QuantizerAttributeConfig(**settings))
    if scale is None:
        return None
    if algorithm in ("NVFP4", "NVFP4_AWQ"):
        amax = scale.detach().float().reshape(()) * NVFP4_MAXBOUND
        return BlockQuantizer(layer.facts["group_size"], (_E2M1, _E4M3), amax)
    return static_quantizer(algorithm, scale)


def static_quantizer(algorithm: str, scale: torch.Tensor) -> TensorQuantizer:
    """Return modelopt's quantizer for a stored scale, so that ties are rounded as in modelopt.

    Args:
        algorithm: Name of the format, or "FP8" for a second step.
        scale: The scale of the input or of the second step, a scalar.
    """
    is_integer = algorithm in INT8
    settings = QuantizerAttributeConfig(num_bits=8 if is_integer else _E4M3)
    return TensorQuantizer(settings, amax=scale.detach().float().reshape(()) * (127.0 if is_integer else 448.0))

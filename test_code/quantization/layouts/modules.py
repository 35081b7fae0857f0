"""Small linear layers as modelopt converts and calibrates them, in each format that files can hold."""

from __future__ import annotations

import torch

E2M1, E4M3, E8M0 = (2, 1), (4, 3), (8, 0)
NVFP4 = {"num_bits": E2M1, "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": E4M3}}
MXFP8 = {"num_bits": E4M3, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": E8M0}}
BY_TOKEN = {"num_bits": E4M3, "type": "dynamic", "block_sizes": {-1: None}}

# Format -> settings of the weight quantizer and of the input quantizer.
SETTINGS: dict[str, tuple[dict, dict | None]] = {
    "FP8": ({"num_bits": E4M3}, {"num_bits": E4M3}),
    "FP8_PER_CHANNEL_PER_TOKEN": ({"num_bits": E4M3, "axis": 0}, BY_TOKEN),
    "FP8_WO": ({"num_bits": E4M3, "axis": 0}, None),
    "FP8_PB_WO": ({"num_bits": E4M3, "block_sizes": {-1: 128, -2: 128}}, None),
    "W8A8_SQ_PER_CHANNEL": ({"num_bits": 8, "axis": 0}, {"num_bits": 8}),
    "W8A8_PER_CHANNEL_PER_TOKEN": ({"num_bits": 8, "axis": 0}, {**BY_TOKEN, "num_bits": 8}),
    "W8A16": ({"num_bits": 8, "axis": 0}, None),
    "W4A16_AWQ": ({"num_bits": 4, "block_sizes": {-1: 32}}, None),
    "NVFP4": (NVFP4, NVFP4),
    "W4A16_NVFP4": (NVFP4, None),
    "MXFP8": (MXFP8, MXFP8),
}


def quantizer(settings: dict | None, amax=None):
    """Return modelopt's quantizer; it is disabled if there are no settings."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    return TensorQuantizer(QuantizerAttributeConfig(**(settings or {"enable": False})), amax=amax)


def weight_amax(algorithm: str, weight: torch.Tensor) -> torch.Tensor | None:
    """Return the amax that calibration finds for a weight, in the shape in which modelopt keeps it."""
    size = weight.detach().abs().float()
    if algorithm == "MXFP8":
        return None
    if algorithm in ("FP8", "NVFP4", "W4A16_NVFP4"):
        return size.amax()
    if algorithm == "FP8_PB_WO":
        return size.view(size.shape[0] // 128, 128, -1, 128).amax((1, 3), keepdim=True)
    if algorithm == "W4A16_AWQ":
        return size.view(-1, 32).amax(1, keepdim=True)
    return size.amax(1, keepdim=True)


def linear(algorithm: str, weight: torch.Tensor, input_amax: float = 3.0) -> torch.nn.Linear:
    """Return a calibrated layer.

    Args:
        algorithm: The format.
        weight: The weight `[o, i]`.
        input_amax: What calibration found for the input.
    """
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = torch.nn.Parameter(weight)
    of_weight, of_input = SETTINGS[algorithm]
    module.weight_quantizer = quantizer(of_weight, weight_amax(algorithm, weight))
    needs_amax = algorithm in ("FP8", "W8A8_SQ_PER_CHANNEL", "NVFP4")
    module.input_quantizer = quantizer(of_input, torch.tensor(input_amax) if needs_amax else None)
    module.output_quantizer = quantizer(None)
    return module


def weights(algorithm: str, seed: int, kind: str = "fp32", exponent: int = 0) -> torch.Tensor:
    """Return a random weight whose shape suits the blocks of a format."""
    shape = (256, 128) if algorithm == "FP8_PB_WO" else (6, 64)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    return weight.bfloat16() if kind == "bf16" else weight.bfloat16().float() if kind == "bf16 numbers" else weight

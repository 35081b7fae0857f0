"""Patches of modelopt for CPU ranks; `cpu_backend.PATCHES` lists them."""

from __future__ import annotations

from nemo_modelopt_dropin.cpu_backend import block_formats


def patch_dynamic_blocks() -> None:
    """Simulate NVFP4, MXFP8 and MXFP4 on CPU tensors; modelopt has CUDA kernels for block formats only.

    Only the operator is replaced, so the gradient stays that of modelopt's function. Other formats, and tensors on
    other devices, go to modelopt's operator.
    """
    from modelopt.torch.quantization import tensor_quant

    operator = tensor_quant.dynamic_block_quantize_op

    def dynamic_block_quantize_op(
        inputs, block_size, amax, num_bits, exponent_bits, scale_num_bits, scale_exponent_bits
    ):
        element = _format(num_bits, exponent_bits)
        scale = _format(scale_num_bits, scale_exponent_bits)
        if inputs.device.type == "cpu" and block_formats.is_simulated(element, scale):
            return block_formats.quantized(inputs, block_size, amax, element, scale)
        return operator(inputs, block_size, amax, num_bits, exponent_bits, scale_num_bits, scale_exponent_bits)

    tensor_quant.dynamic_block_quantize_op = dynamic_block_quantize_op


def _format(bits: int, exponent: int) -> tuple[int, int] | int:
    """Return the bits of exponent and mantissa of a float, or the bits of an integer, from modelopt's two numbers."""
    return (exponent, bits - exponent - 1) if exponent else bits


def patch_fp4_packer() -> None:
    """Let modelopt pack NVFP4 without a GPU: it asks for the GPU's capability first, which fails if there is none."""
    from modelopt.torch.quantization.qtensor import nvfp4_tensor

    nvfp4_tensor.fp4_compatible = lambda: False

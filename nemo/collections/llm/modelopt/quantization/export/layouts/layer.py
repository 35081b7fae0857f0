"""Read from a converted linear layer what a Hugging Face checkpoint stores for it: codes, scales and the format.

How they are packed and named in files is defined by the layouts: `modelopt` and `compressed_tensors`.

Axes: o output, i input features, n blocks of the input.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

from ...._staging import ExportError
from . import blocks

# Formats by the kind of their codes.
FP4 = frozenset({"NVFP4", "NVFP4_AWQ", "W4A16_NVFP4"})
FP8 = frozenset({"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_WO", "MXFP8"})
INT8 = frozenset({"W8A8_SQ_PER_CHANNEL", "W8A8_PER_CHANNEL_PER_TOKEN", "W8A16"})
INT4 = frozenset({"W4A16_AWQ", "W4A8_AWQ"})
# Formats with one scale for each output.
BY_CHANNEL = INT8 | {"FP8_PER_CHANNEL_PER_TOKEN", "FP8_WO"}
# Rows and columns that share a scale in FP8_PB_WO.
BLOCK_2D = 128
# Formats whose inputs get a scale for each token when the model runs.
BY_TOKEN = frozenset({"FP8_PER_CHANNEL_PER_TOKEN", "W8A8_PER_CHANNEL_PER_TOKEN"})

_E2M1, _E4M3, _E8M0 = (2, 1), (4, 3), (8, 0)
_E4M3_MAX = 448.0
# modelopt's quantizers treat an amax up to this value as zero.
_ZERO_AMAX = 2.0**-24
# Weights that are encoded at a time.
_PART = 1 << 20
# Readers divide by scales, and a GPU flushes smaller numbers to zero.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass
class Layer:
    """What is stored for one linear layer of this rank.

    Attributes:
        algorithm: Name of the format in `HF_FORMATS`.
        scale: Scale of the weight in the dtype that is stored: a scalar, `[o, 1]`, `[o, n]`, or `[o/128, i/128]`.
        scale_2: Scale of the tensor for NVFP4, of the second step for W4A8, a scalar.
        input_scale: Scale of the input, a scalar.
        pre_quant_scale: Factors `[i]` of the input.
        facts: Further entries of the quantization configuration.
        codes: Codes `[o, i]`, one in each element, see `codes_of`; None if they were not computed.
    """

    algorithm: str
    scale: torch.Tensor
    scale_2: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    pre_quant_scale: torch.Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    codes: torch.Tensor | None = None

    @property
    def format(self) -> tuple[str, dict[str, Any]]:
        """The format and the further facts, for the configuration.

        NVFP4 with AWQ is plain NVFP4 if the factors of the input are stored elsewhere.
        """
        if self.algorithm == "NVFP4_AWQ" and self.pre_quant_scale is None:
            return "NVFP4", {"group_size": self.facts["group_size"]}
        return self.algorithm, dict(self.facts)

    def rows(self, index: torch.Tensor) -> Layer:
        """Return what is stored for some of the output rows, in the order of the index.

        Args:
            index: Numbers of the rows.

        Returns:
            A layer with the same input; its scales of whole tensors are shared.

        Raises:
            ExportError: If the rows cut a block of rows that share a scale.
        """
        codes = None if self.codes is None else _select(self.codes, index)
        scale = self.scale
        if self.algorithm == "FP8_PB_WO":
            scale = _select(scale, _blocks_of_rows(index))
        elif scale.dim() > 0:
            scale = _select(scale, index)
        return replace(self, codes=codes, scale=scale, facts=dict(self.facts))


def _select(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    # Not all devices can select rows of FP8, so its bytes are selected.
    found = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    return found[index.to(tensor.device)].view(tensor.dtype)


def _blocks_of_rows(index: torch.Tensor) -> torch.Tensor:
    """Return the numbers of the blocks that some rows consist of.

    Raises:
        ExportError: If the rows are not whole blocks.
    """
    index = index.cpu()
    starts = index[::BLOCK_2D]
    whole = (starts[:, None] + torch.arange(BLOCK_2D)).flatten()
    if not torch.equal(whole, index) or bool((starts % BLOCK_2D != 0).any()):
        raise ExportError(
            f"A block of {BLOCK_2D} x {BLOCK_2D} weights shares a scale, and the rows of one Hugging Face tensor are "
            f"not whole blocks of {BLOCK_2D} rows of the Megatron layer. Export the nemo format, or quantize with fp8."
        )
    return starts // BLOCK_2D


def algorithm_of(
    weight: list[dict[str, Any]], has_input: bool, has_pre_quant_scale: bool, inputs: dict[str, Any] | None = None
) -> str | None:
    """Return the format of a layer that can be stored, or None for all others.

    Args:
        weight: ``num_bits``, ``axis`` and ``block_sizes`` of each step of the weight quantizer.
        has_input: Whether the input is quantized.
        has_pre_quant_scale: Whether the input is scaled first.
        inputs: ``num_bits``, ``block_sizes`` and ``type`` of the input quantizer; None if they were not looked up.
    """
    bits = [_plain(step["num_bits"]) for step in weight]
    sizes = dict(weight[0].get("block_sizes") or {})
    scale_bits, kind = _plain(sizes.pop("scale_bits", None)), sizes.pop("type", None) or "static"
    if bits == [_E2M1]:
        found = _fp4(sizes, scale_bits, has_input, has_pre_quant_scale)
    elif bits == [_E4M3]:
        found = _fp8(sizes, scale_bits, kind, weight[0].get("axis"), has_input)
        found = None if has_pre_quant_scale else found
    elif kind == "dynamic" or set(sizes) - {-1}:
        found = None
    else:
        found = _integer(bits, bool(sizes), has_input)
        if found == "W8A8_SQ_PER_CHANNEL" and inputs is not None and _is_dynamic(inputs):
            found = None if has_pre_quant_scale else "W8A8_PER_CHANNEL_PER_TOKEN"
    return found if inputs is None or not has_input or _is_expected_input(found, inputs) else None


def _plain(bits: Any) -> Any:
    return tuple(bits) if isinstance(bits, (tuple, list)) else bits


def _fp4(sizes: dict, scale_bits: Any, has_input: bool, has_pre_quant_scale: bool) -> str | None:
    if set(sizes) != {-1} or scale_bits != _E4M3:
        return None
    if has_input:
        return "NVFP4_AWQ" if has_pre_quant_scale else "NVFP4"
    return None if has_pre_quant_scale else "W4A16_NVFP4"


def _fp8(sizes: dict, scale_bits: Any, kind: str, axis: Any, has_input: bool) -> str | None:
    if sizes == {-1: 32} and scale_bits == _E8M0 and kind == "dynamic":
        return "MXFP8" if has_input else None
    if sizes == {-1: BLOCK_2D, -2: BLOCK_2D} and scale_bits is None and kind == "static":
        return None if has_input else "FP8_PB_WO"
    if sizes:
        return None
    if axis in (0, (0,)):
        return "FP8_PER_CHANNEL_PER_TOKEN" if has_input else "FP8_WO"
    return None if axis is not None else "FP8" if has_input else "FP8_WO"


def _integer(bits: list[Any], has_blocks: bool, has_input: bool) -> str | None:
    if bits == [4, _E4M3] and has_blocks:
        return "W4A8_AWQ"
    if bits == [4] and has_blocks and not has_input:
        return "W4A16_AWQ"
    if bits == [8] and not has_blocks:
        return "W8A8_SQ_PER_CHANNEL" if has_input else "W8A16"
    return None


def _is_expected_input(algorithm: str | None, inputs: dict[str, Any]) -> bool:
    """Return whether an input quantizer is the one that a format implies."""
    bits, sizes, is_dynamic = _plain(inputs["num_bits"]), dict(inputs.get("block_sizes") or {}), _is_dynamic(inputs)
    if algorithm in FP4 or algorithm == "MXFP8":
        expected = (_E2M1, _E4M3) if algorithm in FP4 else (_E4M3, _E8M0)
        return (bits, _plain(sizes.get("scale_bits"))) == expected and bool(sizes.get(-1))
    own_bits = 8 if algorithm in INT8 else _E4M3
    if algorithm in BY_TOKEN:
        # With its first input, modelopt turns blocks of whole rows into an axis.
        return bits == own_bits and is_dynamic and (-1 in sizes or inputs.get("axis") is not None)
    return bits == own_bits and not sizes and not is_dynamic


def _is_dynamic(inputs: dict[str, Any]) -> bool:
    return inputs.get("type") == "dynamic" or (inputs.get("block_sizes") or {}).get("type") == "dynamic"


def settings_of(module: torch.nn.Module) -> tuple[list[dict[str, Any]], bool, bool, dict[str, Any] | None] | None:
    """Return the arguments of `algorithm_of` for a layer, or None if its weight is not quantized."""
    quantizer = getattr(module, "weight_quantizer", None)
    if not isinstance(quantizer, (TensorQuantizer, SequentialQuantizer)):
        return None
    steps = [step for step in _steps(quantizer) if step.is_enabled]
    if not steps:
        return None
    inputs: Any = getattr(module, "input_quantizer", None)
    has_input = isinstance(inputs, TensorQuantizer) and inputs.is_enabled
    settings = [{"num_bits": s.num_bits, "axis": s.axis, "block_sizes": s.block_sizes} for s in steps]
    of_input = None
    if has_input:
        kind = "dynamic" if getattr(inputs, "_dynamic", False) else "static"
        of_input = {"num_bits": inputs.num_bits, "block_sizes": inputs.block_sizes, "type": kind, "axis": inputs.axis}
    return settings, has_input, getattr(inputs, "pre_quant_scale", None) is not None, of_input


def read(module: torch.nn.Module) -> Layer | None:
    """Return what is stored for a converted layer, or None if its format cannot be stored.

    The codes are not computed; see `codes_of`.
    """
    settings = settings_of(module)
    algorithm = algorithm_of(*settings) if settings else None
    if settings is None or algorithm is None:
        return None
    steps = _enabled_steps(module)
    if steps[0].amax is None and algorithm != "MXFP8":
        return None
    inputs: Any = getattr(module, "input_quantizer", None)
    pre = getattr(inputs, "pre_quant_scale", None)
    scale, scale_2 = _scales(algorithm, module, steps)
    has_input_scale = settings[1] and algorithm not in BY_TOKEN | {"MXFP8"}
    return Layer(
        algorithm,
        scale,
        scale_2,
        input_scale=_input_scale(inputs) if has_input_scale and inputs.amax is not None else None,
        pre_quant_scale=None if pre is None else pre.detach().float().reshape(-1),
        facts=_facts(algorithm, steps[0].block_sizes, pre is not None),
    )


def _scales(algorithm: str, module: torch.nn.Module, steps: list[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scale of a layer's weight and that of the tensor or the second step, if there is one."""
    weight: Any = module.weight
    rows, step = weight.shape[0], steps[0]
    if algorithm == "MXFP8":
        return blocks.mxfp8_scale(blocks.largest(weight, step.block_sizes[-1])), None
    if algorithm in FP4:
        scale_2 = positive_scale(_nvfp4_amax(step), blocks.NVFP4_MAXBOUND).amax().reshape(())
        return blocks.nvfp4_scale(_nvfp4_block_amax(weight, step), scale_2), scale_2
    scale = positive_scale(step.amax, step.maxbound)
    if algorithm == "FP8_PB_WO":
        if any(length % BLOCK_2D for length in weight.shape):
            raise ExportError(
                f"A weight of {list(weight.shape)} does not consist of whole blocks of {BLOCK_2D} x {BLOCK_2D}."
            )
        return scale.reshape(rows // BLOCK_2D, -1), None
    if algorithm in BY_CHANNEL:
        return scale.reshape(-1, 1).expand(rows, 1), None
    scale_2 = positive_scale(steps[1].amax, steps[1].maxbound).amax().reshape(()) if len(steps) > 1 else None
    return scale.reshape(rows, -1) if scale.numel() > 1 else scale.reshape(()), scale_2


def _nvfp4_amax(quantizer: Any) -> torch.Tensor:
    """Return the amax of the tensor; a quantizer with static blocks holds it separately."""
    found = getattr(quantizer, "global_amax", None)
    return quantizer.amax if found is None else found


def _nvfp4_block_amax(weight: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """Return the amax `[o, n]` of blocks, from the calibration if the blocks are static."""
    if getattr(quantizer, "global_amax", None) is not None:
        return quantizer.amax.detach().float().reshape(weight.shape[0], -1)
    return blocks.largest(weight, quantizer.block_sizes[-1])


def _facts(algorithm: str, sizes: Any, has_pre_quant_scale: bool) -> dict[str, Any]:
    """Return the entries of modelopt's configuration besides the name of the format."""
    if algorithm in INT4 or algorithm == "NVFP4_AWQ":
        return {"group_size": int(sizes[-1]), "has_zero_point": False, "pre_quant_scale": has_pre_quant_scale}
    return {"group_size": int(sizes[-1])} if algorithm in FP4 or algorithm == "MXFP8" else {}


def _steps(quantizer: Any) -> list[Any]:
    return list(quantizer) if isinstance(quantizer, SequentialQuantizer) else [quantizer]


def _enabled_steps(module: torch.nn.Module) -> list[Any]:
    return [step for step in _steps(module.weight_quantizer) if step.is_enabled]


def _input_scale(quantizer: Any) -> torch.Tensor:
    maxbound = quantizer.maxbound
    if _plain(quantizer.num_bits) == _E2M1:
        maxbound = blocks.NVFP4_MAXBOUND
    return positive_scale(_input_amax(quantizer), maxbound).amax().reshape(())


def _input_amax(quantizer: Any) -> torch.Tensor:
    """Return the amax that an input quantizer applies; for FP8, modelopt replaces zero by one."""
    amax = quantizer.amax.detach().float()
    is_fp8 = _plain(quantizer.num_bits) == _E4M3
    return torch.where(amax <= _ZERO_AMAX, torch.ones_like(amax), amax) if is_fp8 else amax


def positive_scale(amax: torch.Tensor, maxbound: float) -> torch.Tensor:
    """Return the fp32 scale for an amax, or the smallest positive one if the amax is zero (all codes are zero then)."""
    return (amax.detach().float() / maxbound).clamp_min(SMALLEST_SCALE)


def codes_of(module: torch.nn.Module, layer: Layer) -> torch.Tensor:
    """Return the codes `[o, i]` to which a layer's weight quantizer rounds its weight, one in each element.

    The quantizer returns code times scale. Dividing by the scale restores the code exactly, for any arithmetic that the
    quantizer uses on this device. Rounding the weight here could break ties differently, and bf16 weights have many.
    On a CPU, NVFP4 and MXFP8 are rounded here, because modelopt has only CUDA kernels for them.

    Args:
        module: The converted layer, with the weight of this rank.
        layer: The result of `read` for it.

    Returns:
        INT8 and INT4 codes as int8, FP8 codes as FP8 E4M3, FP4 codes as uint8 numbers from 0 to 15.
    """
    weight: Any = module.weight.detach()
    step = _enabled_steps(module)[0]
    if layer.algorithm == "FP8":
        return _fp8_codes(weight, step, layer.scale)
    on_grid = step(weight.float()) if weight.is_cuda or layer.algorithm not in FP4 | {"MXFP8"} else None
    if layer.algorithm in FP4:
        assert layer.scale_2 is not None
        block_amax = _nvfp4_block_amax(weight, step)
        return blocks.nvfp4_codes(weight, block_amax, layer.scale, layer.scale_2, on_grid)
    if layer.algorithm == "MXFP8":
        return blocks.mxfp8_codes(weight if on_grid is None else on_grid, layer.scale)
    assert on_grid is not None
    return nearest_codes(layer.algorithm, on_grid / per_element(layer.scale.to(on_grid.device), on_grid.shape))


def _fp8_codes(weight: torch.Tensor, quantizer: Any, scale: torch.Tensor) -> torch.Tensor:
    """Return the codes of a weight with one scale, a part at a time: the numbers in between stay in the caches."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    rows = max(1, _PART * weight.shape[0] // weight.numel())
    for part, target in zip(weight.split(rows), codes.split(rows), strict=True):
        target.copy_(nearest_codes("FP8", quantizer(part.float()) / scale.to(weight.device)))
    return codes


def values_of(layer: Layer, codes: torch.Tensor | None = None) -> torch.Tensor:
    """Return the fp32 weight `[o, i]` of a layer, without the second step of W4A8 and without ``pre_quant_scale``.

    Args:
        layer: The layer.
        codes: Codes to use instead of the layer's.
    """
    codes = layer.codes if codes is None else codes
    assert codes is not None
    values, scale = codes.float(), layer.scale.to(codes.device).float()
    if layer.algorithm in FP4:
        assert layer.scale_2 is not None
        values, scale = blocks.e2m1_values(codes), scale * layer.scale_2.to(codes.device).float()
    elif layer.algorithm == "MXFP8":
        scale = blocks.e8m0_values(scale)
    return values * per_element(scale, values.shape)


def nearest_codes(algorithm: str, scaled: torch.Tensor) -> torch.Tensor:
    """Return the codes nearest to a weight in units of its scale, for formats other than NVFP4."""
    if algorithm in FP8:
        return scaled.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    lowest, highest = (-128, 127) if algorithm in INT8 else (-8, 7)
    return scaled.round().clamp(lowest, highest).to(torch.int8)


def per_element(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return a scale that broadcasts against a weight `[o, i]`; those of blocks are repeated.

    Args:
        scale: A scalar, `[o, 1]`, `[o, n]`, or one number for each block of rows and columns.
        shape: Shape of the weight.
    """
    if scale.dim() < 2:
        return scale
    for axis, length in enumerate(shape):
        if scale.shape[axis] not in (1, length):
            scale = scale.repeat_interleave(-(-length // scale.shape[axis]), dim=axis).narrow(axis, 0, length)
    return scale

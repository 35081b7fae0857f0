"""Gather the parts of a model's parameters from the ranks that hold them, one parameter at a time.

Tensor-parallel ranks hold parts of a matrix, expert-parallel ranks hold experts, pipeline stages hold layers. Every
rank has a directory that lists which rank holds which part. A part is sent from there to the rank that writes it, so
any layout of ranks is supported, and no rank holds more than one whole parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

from modelopt.torch.quantization.nn import TensorQuantizer

from ... import _parallel
from ..._staging import ExportError
from .layouts.layer import BLOCK_2D, Layer, codes_of

_EXPERTS = ".experts."
_LOCAL_EXPERT = re.compile(r"(\.experts\.local_experts\.)(\d+)")
_NUMBERED = re.compile(r"(weight|bias)(\d+)")
_FIELDS = ("codes", "scale", "scale_2", "input_scale", "pre_quant_scale")


@dataclass(frozen=True)
class Entry:
    """One parameter of the whole model.

    Attributes:
        shape: Its whole shape.
        axis: The axis along which it is split; None if it is not split.
        gated: Whether each part holds its share of the gate, followed by its share of the up projection.
        ranks: The rank that holds each part; of several, the lowest.
        algorithm: Name of the format if it is stored quantized.
    """

    shape: tuple[int, ...]
    axis: int | None
    gated: bool
    ranks: tuple[int, ...]
    algorithm: str | None


@dataclass(frozen=True)
class Part:
    """This rank's part of a parameter.

    Attributes:
        module: The module that has the parameter.
        leaf: Its name there.
        axis: The axis along which it is split; None if it is not split.
        index: Number of the part.
        count: How many parts there are.
        gated: See `Entry`.
        layer: What is stored for it, without codes, if it is quantized.
    """

    module: torch.nn.Module
    leaf: str
    axis: int | None
    index: int
    count: int
    gated: bool
    layer: Layer | None = None

    @property
    def value(self) -> torch.Tensor:
        """The parameter's values."""
        return getattr(self.module, self.leaf).detach()

    def whole_shape(self) -> tuple[int, ...]:
        """Return the shape of the whole parameter."""
        shape = list(self.value.shape)
        if self.axis is not None:
            shape[self.axis] *= self.count
        return tuple(shape)


def own(core: torch.nn.Module, layers: dict[int, Layer]) -> dict[str, Part]:
    """Return this rank's parts by the name of the parameter in the whole model.

    Args:
        core: This rank's Megatron-Core model.
        layers: What is stored for each of its quantized layers, by the module's id.
    """
    found = {}
    gated_model = bool(getattr(getattr(core, "config", None), "gated_linear_unit", False))
    for name, module in core.named_modules():
        if isinstance(module, TensorQuantizer):
            continue
        prefix = f"{_whole_name(core, name)}." if name else ""
        gated = gated_model and prefix.endswith(".linear_fc1.")
        for leaf, value in _values(module):
            index, count = _place(prefix)
            axis = _axis(module, leaf, value)
            if axis is None or count == 1:
                axis, index, count = None, 0, 1
            layer = layers.get(id(module)) if leaf == "weight" else None
            name_of_leaf = _whole_leaf(module, prefix, leaf)
            found[f"{prefix}{name_of_leaf}"] = Part(module, leaf, axis, index, count, gated, layer)
    return found


def _values(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and the saved buffers of a module without those of its children."""
    yield from ((name, value) for name, value in module.named_parameters(recurse=False) if value.numel())
    for name, value in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set and value.numel():
            yield name, value


def _axis(module: torch.nn.Module, leaf: str, value: Any) -> int | None:
    """Return the axis along which tensor-parallel ranks split a parameter, or None if all have the whole one."""
    if getattr(value, "tensor_model_parallel", False):
        return int(value.partition_dim)
    # Megatron sets the attribute only if it initializes the weights, which some configurations of NeMo disable.
    if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)) and leaf in ("weight", "bias"):
        return 0
    return 1 if isinstance(module, RowParallelLinear) and leaf == "weight" else None


def _place(prefix: str) -> tuple[int, int]:
    """Return number and count of the tensor-parallel parts on this rank of the parameters of a module."""
    if not parallel_state.model_parallel_is_initialized():
        return 0, 1
    if _EXPERTS in prefix:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def _whole_name(core: torch.nn.Module, name: str) -> str:
    """Return the name of a module with the numbers that its layer and its expert have in the whole model."""
    full = _parallel.global_name(core, name)
    match = _LOCAL_EXPERT.search(full)
    if match is None:
        return full
    experts: Any = core.get_submodule(name[: name.index(".local_experts.")])
    number = int(match[2]) + _expert_rank() * len(experts.local_experts)
    return f"{full[: match.start()]}{match[1]}{number}{full[match.end() :]}"


def _whole_leaf(module: Any, prefix: str, leaf: str) -> str:
    """Return the name of a parameter; those of several experts in one module are numbered over the whole model."""
    match = _NUMBERED.fullmatch(leaf)
    if match is None or _EXPERTS not in prefix:
        return leaf
    return f"{match[1]}{int(match[2]) + _expert_rank() * module.num_gemms}"


def _expert_rank() -> int:
    return parallel_state.get_expert_model_parallel_rank() if parallel_state.model_parallel_is_initialized() else 0


class Directory:
    """Where the parts of all parameters are. Every rank has the same one, and its own parts.

    Attributes:
        entries: The parameters of the whole model by name.
    """

    def __init__(self, core: torch.nn.Module, layers: dict[int, Layer]):
        """List the parts of all ranks; all ranks must call.

        Args:
            core: This rank's Megatron-Core model.
            layers: What is stored for each of its quantized layers, by the module's id.

        Raises:
            ExportError: If no rank holds a part of a parameter.
        """
        self._own = own(core, layers)
        self._rank = torch.distributed.get_rank() if _parallel.is_distributed() else 0
        facts = {
            name: (part.whole_shape(), part.axis, part.gated, part.index, part.count, _algorithm(part))
            for name, part in self._own.items()
        }
        ranks: dict[str, dict[int, int]] = {}
        known: dict[str, tuple] = {}
        for rank, found in enumerate(_parallel.gather_objects(facts)):
            for name, fact in found.items():
                known.setdefault(name, fact)
                ranks.setdefault(name, {}).setdefault(fact[3], rank)
        self.entries: dict[str, Entry] = {}
        for name, (shape, axis, gated, _, count, algorithm) in known.items():
            if set(ranks[name]) != set(range(count)):
                raise ExportError(
                    f"{name} is split into {count} parts, of which only {sorted(ranks[name])} were found."
                )
            self.entries[name] = Entry(shape, axis, gated, tuple(ranks[name][n] for n in range(count)), algorithm)

    def counted(self) -> Iterator[tuple[str, Part]]:
        """Yield the parts of this rank that no lower rank holds too."""
        for name, part in self._own.items():
            if self.entries[name].ranks[part.index] == self._rank:
                yield name, part

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the whole shape of each parameter by name."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def send(self, name: str, target: int) -> list[Any] | None:
        """Send all parts of a parameter to one rank; all ranks must call, in the same order.

        An error on a rank that holds a part is sent instead of the part, so no rank waits for it.

        Args:
            name: The parameter.
            target: The rank that receives the parts.

        Returns:
            On that rank the parts for `joined`; on all others None.
        """
        entry = self.entries[name]
        found = []
        for holder in entry.ranks:
            value = None
            if self._rank == holder:
                value = self._read(name)
                if holder != target:
                    _send(value, target)
            elif self._rank == target:
                value = _receive(holder)
            found.append(value)
        return found if self._rank == target else None

    def _read(self, name: str) -> Any:
        part = self._own[name]
        try:
            if part.layer is None:
                return part.value
            codes = codes_of(part.module, part.layer) if part.layer.codes is None else part.layer.codes
            return replace(part.layer, codes=codes)
        except Exception as error:
            return ExportError(f"{name} could not be encoded on rank {self._rank}: {type(error).__name__}: {error}")


def _algorithm(part: Part) -> str | None:
    return None if part.layer is None else part.layer.algorithm


# --- messages ---------------------------------------------------------------------------------------------------------


def _send(value: Any, target: int) -> None:
    """Send a tensor, a layer or an error: first what it is, then its tensors as bytes."""
    tensors: dict[str, torch.Tensor] = {}
    header: dict[str, Any] = {}
    if isinstance(value, Layer):
        tensors = {name: part for name in _FIELDS if (part := getattr(value, name)) is not None}
        header = {"algorithm": value.algorithm, "facts": value.facts}
    elif isinstance(value, Exception):
        header = {"error": str(value)}
    else:
        tensors = {"value": value}
    header["tensors"] = [(name, part.shape, part.dtype) for name, part in tensors.items()]
    torch.distributed.send_object_list([header], target, device=_device())
    for part in tensors.values():
        torch.distributed.send(part.contiguous().reshape(-1).view(torch.uint8).to(_device()), target)


def _receive(source: int) -> Any:
    """Return what `_send` sent."""
    headers: list[Any] = [None]
    torch.distributed.recv_object_list(headers, source, device=_device())
    header = headers[0]
    tensors = {}
    for name, shape, dtype in header["tensors"]:
        data = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8, device=_device())
        torch.distributed.recv(data, source)
        tensors[name] = data.cpu().view(dtype).view(shape)
    if "error" in header:
        return ExportError(header["error"])
    if "algorithm" in header:
        return Layer(header["algorithm"], facts=header["facts"], **tensors)
    return tensors["value"]


def _device() -> torch.device:
    on_gpu = "nccl" in str(torch.distributed.get_backend()) and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


# --- whole parameters -------------------------------------------------------------------------------------------------


def joined(entry: Entry, parts: list[Any]) -> Any:
    """Return the whole parameter, a tensor or a layer, in host memory.

    Args:
        entry: The parameter.
        parts: What `Directory.send` returned.

    Raises:
        ExportError: If a part could not be encoded, or a scale that must be equal on all ranks differs.
    """
    for part in parts:
        if isinstance(part, Exception):
            raise part
    if not isinstance(parts[0], Layer):
        return _cat(parts, entry.axis, entry.gated)
    return _whole_layer(parts, entry.axis, entry.gated)


def _cat(parts: list[torch.Tensor], axis: int | None, gated: bool) -> torch.Tensor:
    """Return the concatenation of parts; gate and up projections are ordered as one gate and one up projection."""
    if axis is None or len(parts) == 1:
        return parts[0].cpu()
    # FP8 cannot be concatenated everywhere, so its bytes are.
    dtype = parts[0].dtype
    found = [part.cpu().view(torch.uint8) if dtype.itemsize == 1 else part.cpu() for part in parts]
    if gated and axis == 0:
        halves = [part.chunk(2, dim=0) for part in found]
        found = [half[0] for half in halves] + [half[1] for half in halves]
    return torch.cat(found, dim=axis).view(dtype)


def _whole_layer(parts: list[Layer], axis: int | None, gated: bool) -> Layer:
    """Return what is stored for a whole layer.

    Raises:
        ExportError: If a scale that must be equal on all ranks differs.
    """
    first = parts[0]
    if gated and axis == 0 and first.algorithm == "FP8_PB_WO" and _present(first.codes).shape[0] % (2 * BLOCK_2D):
        raise ExportError(
            f"Tensor-parallel ranks cut blocks of {BLOCK_2D} rows of a gate or up projection: export with fewer ranks."
        )
    # Rows have one scale each; ranks that split the inputs hold the same ones. Blocks have their own.
    scale_axis = axis if first.scale.dim() == 2 and (axis == 0 or has_blocks(first)) else None
    return replace(
        first,
        codes=_cat([_present(part.codes) for part in parts], axis, gated),
        scale=_joined_scale([part.scale for part in parts], scale_axis, gated, "weight scale"),
        scale_2=_optional([part.scale_2 for part in parts], None, "second weight scale"),
        input_scale=_optional([part.input_scale for part in parts], None, "input scale"),
        pre_quant_scale=_optional(
            [part.pre_quant_scale for part in parts], 0 if axis == 1 else None, "scale of the input"
        ),
    )


def has_blocks(layer: Layer) -> bool:
    """Return whether the scales of a layer's weight belong to blocks of its inputs."""
    return layer.scale.dim() == 2 and (
        layer.scale.shape[1] > 1 or "group_size" in layer.facts or layer.algorithm == "FP8_PB_WO"
    )


def _present(value: torch.Tensor | None) -> torch.Tensor:
    if value is None:
        raise ExportError("A layer has no codes.")
    return value


def _optional(values: list[torch.Tensor | None], axis: int | None, what: str) -> torch.Tensor | None:
    return None if values[0] is None else _joined_scale([_present(value) for value in values], axis, False, what)


def _joined_scale(values: list[torch.Tensor], axis: int | None, gated: bool, what: str) -> torch.Tensor:
    """Return the scale of a whole layer.

    Raises:
        ExportError: If ranks have different scales of which a checkpoint holds one.
    """
    if axis is not None:
        return _cat(values, axis, gated)
    first = values[0].cpu()
    if not all(torch.equal(first.float(), value.cpu().float()) for value in values[1:]):
        raise ExportError(
            f"Tensor-parallel ranks calibrated different values for the {what} of one layer, and a Hugging Face "
            "checkpoint holds one: calibrate with calibration_tp=1."
        )
    return first

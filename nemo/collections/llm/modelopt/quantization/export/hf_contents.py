"""Compare codes and scales in a Hugging Face checkpoint with those of the quantizers in memory.

A single wrong code of a large model is not visible in its logits. Each transformer layer is therefore summarized,
independently of the order of its rows, which differs: the count of each code, the sum of its scales read as integers,
and the set of its scalar scales.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

from nemo_modelopt_dropin.console import screen

from ... import _parallel
from ..._staging import ExportError, fail_together
from . import hf_files, hf_stored, parts
from .layouts import layer as layers_
from .layouts import modelopt

_SINGLE_SCALES = ("weight_scale", "weight_scale_2", "input_scale")


@dataclass
class Contents:
    """Summary of the quantized weights of one transformer layer.

    Attributes:
        codes: How often each of 256 codes occurs.
        scale_bits: Sum of the scales of rows or blocks, each read as an integer.
        singles: Scales of whole tensors by the last part of their names.
    """

    codes: torch.Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.int64))
    scale_bits: int = 0
    singles: dict[str, set[float]] = field(default_factory=lambda: {name: set() for name in _SINGLE_SCALES})

    def add(self, other: Contents) -> None:
        """Add another part of the same layer."""
        self.codes += other.codes
        self.scale_bits += other.scale_bits
        for name, values in other.singles.items():
            self.singles[name] |= values

    def add_codes(self, codes: torch.Tensor) -> None:
        """Count codes that are stored as one byte each."""
        # Bytes are counted as they are: wider integers would take a multiple of the weight's memory on its device.
        self.codes += torch.bincount(codes.contiguous().view(torch.uint8).flatten(), minlength=256).cpu()

    def add_scale(self, name: str, scale: torch.Tensor) -> None:
        """Add the scale of a tensor, or the scales of its rows or blocks."""
        if scale.dim() == 0 or name != "weight_scale":
            self.singles[name].add(float(scale))
        else:
            self.scale_bits += int(scale.float().contiguous().view(torch.int32).sum(dtype=torch.int64))

    def add_singles(self, layer: layers_.Layer) -> None:
        """Add the scales of whole tensors of a layer other than that of its codes."""
        for leaf, scale in (("weight_scale_2", layer.scale_2), ("input_scale", layer.input_scale)):
            if scale is not None:
                self.add_scale(leaf, scale)

    def difference(self, stored: Contents) -> str | None:
        """Return how stored contents differ from these, or None."""
        if not torch.equal(self.codes, stored.codes):
            return f"{int((self.codes - stored.codes).abs().sum() + 1) // 2} codes differ"
        if self.scale_bits != stored.scale_bits:
            return "scales of rows or blocks differ"
        for name, values in self.singles.items():
            if values != stored.singles[name]:
                return f"{name} is {sorted(stored.singles[name])}, not {sorted(values)}"
        return None


def of_model(core: torch.nn.Module, layout: ModuleType = modelopt) -> dict[str, Contents]:
    """Return the contents by layer number, of those weights that this rank counts; all ranks must call.

    Of several ranks that hold the same weight, the lowest counts it.

    Args:
        core: This rank's Megatron-Core model.
        layout: A module of `layouts`.
    """
    layers = {id(m): layer for m in core.modules() if hasattr(m, "weight_quantizer") and (layer := layers_.read(m))}
    found: dict[str, Contents] = defaultdict(Contents)
    counted = list(parts.Directory(core, layers).counted())
    for name, own in screen.bar(counted, desc="Check of the codes in memory", unit="tensor", delay=5.0):
        number, layer = _layer_number(name), own.layer
        if layer is None or number is None:
            continue
        part = found[number]
        # The codes belong to the scales in memory, of which a layout may store rounded reciprocals.
        part.add_codes(layers_.codes_of(own.module, layer))
        layer = layout.as_read(layer)
        # Ranks that split the inputs share the scales of rows, but each has the scales of its own blocks.
        if own.axis == 0 or own.index == 0 or parts.has_blocks(layer):
            part.add_scale("weight_scale", layer.scale)
        part.add_singles(layer)
    return found


def of_files(folder: Path) -> dict[str, Contents]:
    """Return the contents of a checkpoint by layer number; none for formats that cannot be decoded."""
    formats = hf_stored.formats(folder)
    found: dict[str, Contents] = defaultdict(Contents)
    if formats.layout is None or formats.obstacle():
        return found
    names = hf_files.stored_shapes(folder)
    stored = hf_stored.layers(formats, names, hf_files.read_tensors(folder))
    total = len(hf_stored.quantized_names(names))
    for name, layer in screen.bar(stored, total=total, desc="Check of the codes in the files", delay=5.0):
        number = _layer_number(f"{name}.")
        if number is not None and layer.codes is not None:
            found[number].add_codes(layer.codes)
            found[number].add_scale("weight_scale", layer.scale)
            found[number].add_singles(layer)
    return found


def _layer_number(name: str) -> str | None:
    match = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", name)
    return match[1] if match else None


def check(core: torch.nn.Module, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Compare a checkpoint's codes and scales with those of the model in memory; all ranks must call.

    Args:
        core: This rank's Megatron-Core model.
        folder: The checkpoint.
        dtype: The dtype of the checkpoint's tensors that are not quantized.

    Raises:
        ExportError: If they differ.
    """
    layout = hf_stored.layout(folder)
    with layout.scales_as_stored(core, dtype):
        gathered = _parallel.gather_objects(dict(of_model(core, layout)))
    with fail_together("The check of the codes"), _parallel.while_rank_zero_works():
        if torch.distributed.get_rank() == 0:
            expected: dict[str, Contents] = defaultdict(Contents)
            for number, part in (item for rank in gathered for item in rank.items()):
                expected[number].add(part)
            compare(expected, of_files(folder))


def compare(expected: dict[str, Contents], stored: dict[str, Contents]) -> None:
    """Compare contents by layer.

    Raises:
        ExportError: If they differ.
    """
    for number in sorted({*expected, *stored}, key=int):
        difference = expected.get(number, Contents()).difference(stored.get(number, Contents()))
        if difference:
            raise ExportError(
                f"Layer {number} of the checkpoint differs from the model in memory: {difference}. The checkpoint was "
                "deleted. Please report this with the model's class and the algorithm. To export without this "
                "comparison, use ExportConfig(verify='files')."
            )

"""Read the quantized layers of a written Hugging Face checkpoint, in any layout."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from nemo.utils.get_rank import is_global_rank_zero

from ... import _parallel
from .layouts import LAYOUTS, modelopt
from .layouts.layer import Layer


class Formats:
    """The formats of a checkpoint.

    Attributes:
        layout: A module of `layouts`, or None if no weight is quantized.
    """

    def __init__(self, layout: ModuleType | None, by_name: Mapping[str | None, tuple[str, dict[str, Any]]]) -> None:
        self.layout, self._by_name = layout, by_name

    def of(self, name: str) -> tuple[str, dict[str, Any]]:
        """Return the format of a layer and further facts."""
        return self._by_name[name] if name in self._by_name else self._by_name[None]

    def obstacle(self) -> str | None:
        """Return why the layers cannot be decoded, or None."""
        supported = self.layout.ALGORITHMS if self.layout else frozenset()
        unknown = {algorithm for algorithm, _ in self._by_name.values()} - supported
        return f"decoding {', '.join(sorted(unknown))} is not supported" if unknown else None

    def leaves(self) -> tuple[str, ...]:
        """Return the last parts of the names of a quantized layer's tensors."""
        return self.layout.LEAVES if self.layout else ()

    def layer(self, name: str, stored: Mapping[str, torch.Tensor]) -> Layer:
        """Return a layer with its codes.

        Args:
            name: The layer's name.
            stored: Its tensors by the last part of their names.
        """
        assert self.layout is not None
        return self.layout.layer_of(*self.of(name), stored)

    def decode(self, name: str, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the fp32 weight of a layer, without the second step of W4A8; the arguments are those of `layer`."""
        assert self.layout is not None
        algorithm, facts = self.of(name)
        return self.layout.decode(algorithm, stored, second_step=False, facts=facts)


def section(folder: Path) -> dict[str, Any]:
    """Return ``quantization_config`` of a checkpoint, or what ``hf_quant_config.json`` implies; empty if none."""
    path, older = folder / "config.json", folder / "hf_quant_config.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("quantization_config") if path.exists() else None
    if not found and older.exists():
        found = {**json.loads(older.read_text(encoding="utf-8"))["quantization"], "quant_method": "modelopt"}
    return found or {}


def formats(folder: Path) -> Formats:
    """Return the formats of a checkpoint."""
    found = section(folder)
    layout = LAYOUTS.get(found.get("quant_method", ""))
    by_name = layout.formats_of(found) if layout else {}
    return Formats(layout if by_name else None, by_name)


def layout(folder: Path) -> ModuleType:
    """Return the layout of a checkpoint, a module of `layouts`; all ranks must call.

    Only rank zero can be sure to see the files.
    """
    name = _parallel.from_rank_zero(section(folder).get("quant_method") if is_global_rank_zero() else None)
    return LAYOUTS.get(name, modelopt)


def quantized_names(names: Iterable[str]) -> set[str]:
    """Return the names of the quantized layers, from the names of all tensors."""
    return {name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")}


def layers(
    folder_formats: Formats, names: Iterable[str], tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, Layer]]:
    """Yield name and layer of each quantized layer; few tensors are in memory at once.

    Args:
        folder_formats: The result of `formats`.
        names: The names of all tensors.
        tensors: Name and value of each tensor, in the order of the files.
    """
    missing: dict[str, set[str]] = defaultdict(set)
    quantized = quantized_names(names := list(names))
    for name in names:
        layer, leaf = split(name)
        if layer in quantized and leaf in folder_formats.leaves():
            missing[layer].add(leaf)
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, value in tensors:
        layer, leaf = split(name)
        if leaf not in missing.get(layer, ()):
            continue
        found[layer][leaf] = value
        if len(found[layer]) == len(missing[layer]):
            yield layer, folder_formats.layer(layer, found.pop(layer))


def split(name: str) -> tuple[str, str]:
    """Return the name of a tensor's module, and the last part of its name."""
    module, _, leaf = name.rpartition(".")
    return module, leaf

"""Keep weights that are not cut away from modelopt while it cuts the others.

modelopt copies every weight of a converted model when it cuts it, also those that stay as they are. The embedding is
the largest weight of most models, and half of a small one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


class Uncut:
    """The weights of the embedding and the output layer, which only the hidden size cuts."""

    def __init__(self, core: nn.Module, sizes: Mapping[str, int]):
        """Choose the weights.

        Args:
            core: The Megatron-Core model.
            sizes: The sizes that modelopt is asked for.
        """
        # To drop layers, modelopt sends numbers on the device of the first parameter.
        self._modules = [] if {"hidden_size", "num_layers"} & {*sizes} else list(_ends(core))
        self._kept: list[tuple[dict[str, Any], str, nn.Parameter]] = []

    def set_aside(self) -> None:
        """Put parameters without memory in the places of the weights.

        A weight that is a part of a larger memory, such as a buffer of Megatron's DDP, is left for modelopt to copy.
        """
        for module in self._modules:
            parameters = vars(module)["_parameters"]
            for name, value in list(parameters.items()):
                if value is not None and value.untyped_storage().nbytes() == value.nbytes:
                    self._kept.append((parameters, name, value))
                    parameters[name] = nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)

    def put_back(self) -> None:
        """Put the weights back, as new parameters like all others; without an earlier `set_aside`, do nothing."""
        while self._kept:
            parameters, name, value = self._kept.pop()
            parameters[name] = nn.Parameter(value.detach(), value.requires_grad)


def _ends(core: Any) -> Iterator[nn.Module]:
    """Yield the modules of the embedding and the output layer that this pipeline stage has."""
    for name in ("embedding", "output_layer"):
        part = getattr(core, name, None)
        if isinstance(part, nn.Module):
            yield from part.modules()

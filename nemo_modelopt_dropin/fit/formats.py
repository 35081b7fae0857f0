"""Formats of a model: an algorithm for the attention, one for the MLP, and whether the KV cache is in FP8.

`mixtures` are the pairs that one quantization can produce and that one layout of Hugging Face files can hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from nemo_modelopt_dropin.errors import ModelOptConfigError
from nemo_modelopt_dropin.preflight import algorithms
from nemo_modelopt_dropin.preflight.algorithms import NO_QUANT

ATTENTION, MLP, KV_CACHE = "attention", "mlp", "kv_cache"
GROUPS = (ATTENTION, MLP)
# Algorithms that only look for the largest value of each tensor or block: parts of a model can differ. The searches
# and the smoothing of the others treat all layers of a model alike.
BY_MAXIMUM = frozenset({"int8", "fp8", "int4", "fp8_pc_pt", "fp8_wo", "int8_wo"})


@dataclass(frozen=True)
class Format:
    """The format of a model's weights and of its KV cache.

    Attributes:
        attention: Algorithm of the matrices of attention, or `NO_QUANT`.
        mlp: Algorithm of the matrices of the MLPs and experts, or `NO_QUANT`.
        fp8_cache: Whether keys and values are cached in FP8 instead of 16 bits.
        block: Weights that share an INT4 scale, for algorithms with this setting.
    """

    attention: str = NO_QUANT
    mlp: str = NO_QUANT
    fp8_cache: bool = False
    block: int = 128

    @property
    def name(self) -> str:
        """The format in words."""
        weights = self.mlp if self.attention == self.mlp else f"attention {self.attention}, mlp {self.mlp}"
        weights = weights.replace(NO_QUANT, "16 bits")
        return f"{weights}, KV cache fp8" if self.fp8_cache else weights

    @property
    def is_mixed(self) -> bool:
        """Whether attention and MLP have different formats."""
        return self.attention != self.mlp

    def algorithm(self, group: str) -> str:
        """Return the algorithm of a group of `GROUPS`."""
        return self.attention if group == ATTENTION else self.mlp

    def needed_block(self, group: str) -> int | None:
        """Return how many weights along the input of a group's layers share a scale, None if there are no blocks."""
        return algorithms.block_size(self.algorithm(group), self.block)


def mixtures(names: Iterable[str], layout: str = algorithms.AUTO, block: int = 128, cache: bool = True) -> list[Format]:
    """Return the formats that can be made of some algorithms, each with and without an FP8 cache.

    Args:
        names: Names in the table of algorithms, or `NO_QUANT`.
        layout: Layout of the Hugging Face files.
        block: Weights that share an INT4 scale.
        cache: Whether an FP8 cache is among the choices.
    """
    found = []
    for attention, mlp in itertools.product(dict.fromkeys(names), repeat=2):
        if attention == mlp or mixture_problem(attention, mlp, layout) is None:
            found += [Format(attention, mlp, fp8, block) for fp8 in ((False, True) if cache else (False,))]
    # A quantized cache alone needs a calibration, which a model without quantizers does not get.
    return [one for one in found if not (one.fp8_cache and {one.attention, one.mlp} == {NO_QUANT})]


def mixture_problem(attention: str, mlp: str, layout: str = algorithms.AUTO) -> str | None:
    """Return why attention and MLP cannot have two different algorithms in one model, or None.

    Args:
        attention: Algorithm of the attention.
        mlp: Algorithm of the MLP.
        layout: Layout of the Hugging Face files.
    """
    pair = {attention, mlp} - {NO_QUANT}
    if len(pair) < 2:
        return None
    if others := sorted(pair - BY_MAXIMUM):
        return (
            f"{' and '.join(others)} cannot quantize only a part of a model that is quantized in two formats; use two "
            f"of {', '.join(sorted(BY_MAXIMUM))}, or {NO_QUANT} for one part"
        )
    try:
        algorithms.common_layout([str(algorithms.hf_format_of(name)) for name in pair], layout)
    except ModelOptConfigError as error:
        return str(error).rstrip(".")
    return None


def layout_of(found: Format, layout: str = algorithms.AUTO) -> str:
    """Return the layout of Hugging Face files in which a format is written."""
    names = {str(algorithms.hf_format_of(found.algorithm(group))) for group in GROUPS} - {"None"}
    return algorithms.common_layout(names, layout) if len(names) > 1 else _single(names, layout)


def _single(names: set[str], layout: str) -> str:
    return algorithms.layout_of(next(iter(names)), layout) if names else layout

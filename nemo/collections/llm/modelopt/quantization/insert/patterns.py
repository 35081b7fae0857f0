"""Check that the patterns of a quant_cfg match quantizers of the model: modelopt ignores those that match none."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from modelopt.torch.quantization.nn import QuantModuleRegistry, SequentialQuantizer, TensorQuantizer
from nemo_modelopt_dropin.errors import nearest

from ... import _parallel
from ...errors import ModelOptConfigError
from .. import quant_cfg_choices as choices
from ..quant_cfg_entries import Entry, entries, left_as_before

# modelopt 0.47 reads it; earlier versions do not check.
_SKIP_CHECK = "MODELOPT_SKIP_WEIGHT_QUANT_CHECK"


def patterns_of(quant_cfg: dict[str, Any]) -> list[Entry]:
    """Return the entries of a quant_cfg except those that disable every quantizer."""
    return [entry for entry in entries(quant_cfg) if not entry.is_default]


def shipped_exclusions() -> set[str]:
    """Return the disabling patterns of modelopt's presets and ours, which are for many models and need not match."""
    found = (pattern for preset in choices.get_modelopt_presets().values() for pattern in patterns_of(preset))
    return {str(pattern) for pattern in found if not pattern.enables} | left_as_before()


def check(model: torch.nn.Module, quant_cfg: dict[str, Any], from_file: bool) -> None:
    """Check that the patterns match quantizers of the model on some rank.

    In a user's own quant_cfg every pattern must match, except the exclusions of modelopt's presets. In a preset, which
    is written for many models, at least one enabling pattern must match.

    Args:
        model: This rank's converted model; all ranks must call it.
        quant_cfg: The quant_cfg by which the quantizers were set.
        from_file: Whether it is the user's own.

    Raises:
        ModelOptConfigError: With the patterns and the nearest quantizers.
    """
    wanted = patterns_of(quant_cfg)
    names = [
        (name, model.get_submodule(name.rpartition(".")[0]))
        for name, module in model.named_modules()
        if isinstance(module, (TensorQuantizer, SequentialQuantizer))
    ]
    matched = _parallel.any_rank([_matches(pattern, names) for pattern in wanted])
    missing = [pattern for pattern, found in zip(wanted, matched, strict=True) if not found]
    if from_file:
        shipped = shipped_exclusions()
        missing = [pattern for pattern in missing if pattern.enables or str(pattern) not in shipped]
    else:
        enabling = [pattern for pattern in wanted if pattern.enables]
        missing = enabling if enabling and all(pattern in missing for pattern in enabling) else []
    if missing:
        known = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in names})
        lines = [
            f"{str(pattern)!r} (nearest: {nearest(pattern.wildcard, known, count=3, cutoff=0.0)})"
            for pattern in missing
        ]
        raise ModelOptConfigError(
            f"quant_cfg patterns that match no quantizer of this model: {'; '.join(lines)}. Patterns are wildcards of "
            "quantizer names, such as '*mlp*weight_quantizer'."
        )


@contextlib.contextmanager
def checked_here() -> Iterator[None]:
    """Switch off modelopt's own check of the weights (from 0.47), which looks at one pipeline stage alone.

    A stage without a quantized layer raises an error there, while the others wait for it; `check_weights` looks at all.
    """
    before = os.environ.get(_SKIP_CHECK)
    os.environ[_SKIP_CHECK] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_SKIP_CHECK, None)
        else:
            os.environ[_SKIP_CHECK] = before


def check_weights(model: torch.nn.Module, quant_cfg: dict[str, Any]) -> None:
    """Check that some rank quantizes weights, if the last entry of a pattern for weights asks for it.

    Args:
        model: This rank's calibrated model (GPTQ disables quantizers meanwhile); all ranks must call it.
        quant_cfg: The quant_cfg by which the quantizers were set.

    Raises:
        ModelOptConfigError: With the patterns.
    """
    last = {str(entry): entry for entry in patterns_of(quant_cfg)}
    weights = [
        name
        for name, entry in last.items()
        if entry.enables
        and ("weight_quantizer" in entry.wildcard or fnmatch.fnmatch("weight_quantizer", entry.wildcard))
    ]
    enabled = any(
        "weight_quantizer" in name and module.is_enabled
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer)
    )
    if weights and not _parallel.any_rank([enabled])[0]:
        raise ModelOptConfigError(
            f"The quant_cfg quantizes no weight: {', '.join(weights)} should, but a later setting disables every "
            "quantizer that they match. Put settings that disable before those that enable."
        )


def checked_loop(forward_loop: Callable, quant_cfg: dict[str, Any], from_file: bool) -> Callable:
    """Return a forward loop that checks the patterns before it runs data through the model."""

    def run(model):
        check(model, quant_cfg, from_file)
        return forward_loop(model)

    return run


def _matches(pattern: Entry, names: list[tuple[str, torch.nn.Module]]) -> bool:
    parent = None if pattern.module_class is None else QuantModuleRegistry[pattern.module_class]
    return any(
        fnmatch.fnmatch(name, pattern.wildcard) and (parent is None or isinstance(owner, parent))
        for name, owner in names
    )

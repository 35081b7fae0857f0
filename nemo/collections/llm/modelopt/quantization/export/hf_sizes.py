"""Check that a ``transformers`` class computes what the model that is written computes, and has its sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nemo_modelopt_dropin.preflight import families

from ...errors import ModelOptConfigError
from .hf_names import Names, Rule

_SHOWN = 3


class SizesError(ModelOptConfigError):
    """The Hugging Face class of a model cannot compute it."""


def check(names: Names, shapes: Mapping[str, Sequence[int]], hf_config: Any, config: Any) -> None:
    """Check the norms of a model and the shape of each tensor before any is written. No values are read.

    Pruned models can have sizes for which a class has no entry, such as heads in Starcoder that are not the hidden size
    over their number.

    Args:
        names: The rules of the model.
        shapes: Shape of each parameter of the whole model.
        hf_config: The ``transformers`` configuration.
        config: The model's own configuration.

    Raises:
        SizesError: With the reason or the tensors.
    """
    adds_one = hf_config.model_type in families.ADD_ONE.values()
    if adds_one and not getattr(config, "layernorm_zero_centered_gamma", True):
        raise SizesError(f"{type(hf_config).__name__} cannot describe this model: {families.PLAIN_NORMS.reason}.")
    wrong = [text for rule in names.rules for text in _differences(rule, names, shapes)]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise SizesError(
            f"{type(hf_config).__name__} cannot describe these sizes: {'; '.join(wrong[:_SHOWN])}{more}. Prune "
            "to sizes for which it has entries: in some classes the size of a head is the hidden size over the heads."
        )


def _differences(rule: Rule, names: Names, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the tensors of a rule that have other shapes than the configuration implies."""
    try:
        found = rule.apply([torch.empty(tuple(shapes[name]), device="meta") for name in rule.sources])
    except (RuntimeError, NotImplementedError):
        # Some functions fail if the sizes do not fit; the tensors are compared once they are written.
        return []
    return [
        f"{target} has shape {list(value.shape)}, and the configuration implies {list(names.shapes[target])}"
        for target, value in zip(rule.targets, found, strict=True)
        if value.shape != names.shapes[target]
    ]

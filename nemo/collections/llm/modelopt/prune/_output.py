"""Leave the output layer out of the passes that measure importance.

Importance comes from the activations before it. Its logits are the largest tensors of a model with a large vocabulary,
and their product and loss take half of the time of a small model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_LOSS = "compute_language_model_loss"


@contextlib.contextmanager
def left_out(core: nn.Module) -> Iterator[None]:
    """Skip the output layer and the loss of a Megatron model inside the context; the loss of a batch is zero.

    The heads of multi-token prediction use the output layer themselves: a model that has them is not changed.

    Args:
        core: The model without wrappers.
    """
    layer = getattr(core, "output_layer", None)
    replaced: list[tuple[nn.Module, str, Any]] = []
    if layer is not None and hasattr(core, _LOSS) and not getattr(core, "mtp_process", False):
        replaced = [(layer, "forward", _first_feature), (core, _LOSS, _no_loss)]
    own = [(module, name, vars(module).get(name)) for module, name, _ in replaced]
    for module, name, function in replaced:
        vars(module)[name] = function
    try:
        yield
    finally:
        for module, name, function in own:
            vars(module).pop(name)
            if function is not None:
                vars(module)[name] = function


def _first_feature(hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Return one number `[s, b, 1]` for each token in place of its logits."""
    return hidden[..., :1], None


def _no_loss(labels: Tensor, logits: Tensor) -> Tensor:
    """Return a loss of zero for each label `[b, s]`."""
    return logits.new_zeros(labels.shape, dtype=torch.float32)

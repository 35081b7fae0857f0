"""Importance weighted by the loss mask: what padding activates does not count.

modelopt's hooks take the mean over all positions of a sample. Here every hook sees activations `[s, b, x]` scaled by
each token's share in its sample, ``w * s / sum(w)``, so that the mean becomes the weighted one. Experts of an MoE layer
get tokens without a batch axis; theirs are chosen (weight above zero), not scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class MicroBatch:
    """The micro-batch that passes this pipeline stage, as far as importance needs it.

    Attributes:
        share: `[s, b]`, each token's weight over the mean weight of its sample; None where all tokens count alike.
        chosen: module of an MoE expert -> `[n]`, whether each of its tokens has weight; filled by the routers.
    """

    def __init__(self) -> None:
        self.share: Tensor | None = None
        self.chosen: dict[nn.Module, Tensor] = {}

    def see(self, batch: Mapping[str, Any]) -> None:
        """Take the loss mask `[b, s]` of a batch."""
        self.share, mask = None, batch.get("loss_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            weights = mask.detach().to(torch.float32).T
            if bool((weights != weights[0, 0]).any()) or not bool(weights[0, 0] > 0):
                self.share = weights * len(weights) / weights.sum(0).clamp(min=torch.finfo(torch.float32).tiny)

    def share_on(self, device: torch.device) -> Tensor | None:
        """Return the share on a device; it is copied there once, as loaders return batches on the host."""
        if self.share is not None and self.share.device != device:
            self.share = self.share.to(device, non_blocking=True)
        return self.share


def weigh(core: nn.Module, before: Mapping[nn.Module, Any], micro_batch: MicroBatch) -> list[Any]:
    """Let the hooks that modelopt put on a model see weighted activations; return handles of hooks to remove.

    Args:
        core: the converted model.
        before: modules -> their hooks before the conversion, as `_search.forward_hooks` returns them.
        micro_batch: shows the weights of each micro-batch.
    """
    model: Any = core
    layers = set(model.decoder.layers)
    handles = []
    for module in core.modules():
        known = before[module][0] if module in before else {}
        for key, hook in list(module._forward_hooks.items()):
            if key in known:
                continue
            if module in layers:
                module._forward_hooks[key] = partial(_layer_change, micro_batch)
            else:
                module._forward_hooks[key] = partial(_weighted, hook, micro_batch)
        if hasattr(module, "router") and hasattr(getattr(module, "experts", None), "local_experts"):
            handles.append(module.router.register_forward_hook(partial(_routed, micro_batch, module.experts)))
    return handles


def _weighted(hook: Callable, micro_batch: MicroBatch, module: nn.Module, args: tuple, output: Any) -> None:
    """Call modelopt's hook with the tokens that have weight."""
    if hasattr(module, "local_experts"):
        args, output = _of_experts(micro_batch, module, args, output)
    elif module in micro_batch.chosen:
        # An expert without tokens would have a mean over nothing, which is NaN.
        tokens = args[0][micro_batch.chosen[module]]
        if len(tokens) == 0:
            return
        args = (tokens, *args[1:])
    elif micro_batch.share is not None:
        args, output = _scaled(args, micro_batch), _scaled(output, micro_batch)
    hook(module, args, output)


def _scaled(value: Any, micro_batch: MicroBatch) -> Any:
    """Return activations `[s, b, x]` scaled by the tokens' shares; of a tuple the first element is."""
    if isinstance(value, tuple):
        return (_scaled(value[0], micro_batch), *value[1:]) if value else value
    share = micro_batch.share_on(value.device) if isinstance(value, Tensor) else None
    if share is not None and value.shape[:2] == share.shape:
        return value.detach().to(torch.float32) * share[..., None]
    return value


def _layer_change(micro_batch: MicroBatch, layer: Any, args: tuple, kwargs: dict, output: Any) -> None:
    """Add a layer's block influence (arXiv 2403.03853), the mean over tokens of one minus the cosine.

    The sum stays on the device until `_search.finish_scores`, so that the host does not wait for every layer.
    """
    before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    after = output[0] if isinstance(output, tuple) else output
    change = 1 - functional.cosine_similarity(before.to(torch.float32), after.to(torch.float32), dim=2)  # [s, b]
    share = micro_batch.share_on(change.device)
    if share is not None:
        change = change * share
    layer._scores = layer._scores + change.mean().double()


def _routed(micro_batch: MicroBatch, experts: Any, router: nn.Module, args: tuple, output: Any) -> None:
    """Note which of each expert's tokens have weight; experts get their tokens in order of position."""
    routing = output[1].bool()  # [s * b, experts]
    if micro_batch.share is None:
        weight = torch.ones(len(routing), dtype=torch.bool, device=routing.device)
    else:
        weight = (micro_batch.share > 0).flatten().to(routing.device, non_blocking=True)
    for number, expert in enumerate(experts.local_experts):
        micro_batch.chosen[expert.linear_fc2] = weight[routing[:, number]]


def _of_experts(micro_batch: MicroBatch, experts: Any, args: tuple, output: Any) -> tuple[tuple, tuple]:
    """Return input and output of all experts of a layer with only the tokens that have weight."""
    chosen = [micro_batch.chosen[expert.linear_fc2] for expert in experts.local_experts]
    counts = torch.stack([mask.sum() for mask in chosen]).to(args[1].device)
    return (args[0], counts, *args[2:]), (output[0][torch.cat(chosen)], *output[1:])

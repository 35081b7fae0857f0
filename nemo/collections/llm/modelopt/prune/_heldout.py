"""Held-out loss of a candidate, and its KL divergence to the original model, over the same batches.

Of the original model the final hidden states `[s, b, h]` are kept and not the logits `[s, b, v]`, which take v / h
times the memory. Importance pruning has TP=1, so that logits are whole on the last pipeline stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import _batches, _heldout, _parallel
from ..errors import ModelOptConfigError

# Rows of logits at a time: two matrices [rows, vocabulary] are held.
_ROWS = 1024


@dataclass
class Reference:
    """The original model on held-out data.

    Attributes:
        batches: this rank's micro-batches as the data module returns them.
        hidden: `[s, b, h]` of each micro-batch, on the last pipeline stage.
        output: weight `[v, h]` and bias of the output layer there.
        loss: held-out loss in nats a token.
    """

    batches: list[Mapping[str, Any]] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    output: tuple[Tensor, Tensor | None] | None = None
    loss: float = float("nan")


@contextlib.contextmanager
def output_layer_inputs(core: nn.Module, see: Callable[[Tensor, Tensor, Tensor | None], None]) -> Iterator[None]:
    """Show the final hidden states, and weight and bias that follow, of each forward pass on the last stage."""
    layer = getattr(core, "output_layer", None)
    if layer is None:
        yield
        return

    def hook(module: Any, args: tuple, kwargs: dict) -> None:
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        see(args[0].detach(), (module.weight if weight is None else weight).detach(), getattr(module, "bias", None))

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def observe(core: nn.Module, validate: Callable[[], None]) -> Reference:
    """Return the original model's held-out batches, hidden states and loss.

    Args:
        core: the Megatron-Core model.
        validate: runs the held-out batches through it with NeMo.

    Raises:
        ModelOptConfigError: if there was no held-out batch.
    """
    found = Reference()

    def keep(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        found.hidden.append(hidden.cpu())
        found.output = (weight, bias)

    config: Any = core.config
    with _batches.shown_batches(config, found.batches.append), output_layer_inputs(core, keep):
        validate()
    if not found.batches:
        raise ModelOptConfigError(
            "target_params: the data module's val_dataloader returned no held-out batch to compare candidates on; pass "
            "it validation data (at least one global batch)."
        )
    sums = []
    for batch, hidden in zip(found.batches, found.hidden, strict=False):
        assert found.output is not None
        sums.append(token_sums(batch, hidden.to(found.output[0].device, non_blocking=True), found.output))
    found.loss, _ = _means(core, sums)
    return found


def evaluate(core: nn.Module, reference: Reference) -> tuple[float, float]:
    """Return a pruned model's held-out loss and KL(original || model), in nats a token, the same on every rank.

    Args:
        core: the pruned Megatron-Core model.
        reference: what `observe` returned for the original.
    """
    sums: list[Tensor] = []

    def add(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        position = len(sums)
        original = reference.hidden[position].to(hidden.device, non_blocking=True)
        pair = (original, reference.output)
        sums.append(token_sums(reference.batches[position], hidden, (weight, bias), pair))

    modes = [(module, module.training) for module in core.modules()]
    core.eval()
    with output_layer_inputs(core, add), torch.no_grad():
        run_batches(core, reference.batches)
    for module, training in modes:
        module.training = training
    return _means(core, sums)


def run_batches(core: nn.Module, batches: list[Mapping[str, Any]]) -> None:
    """Send micro-batches through all pipeline stages with the model's own data and forward steps, without gradients."""
    _heldout.run_forward(core, batches, _forward_step, lambda batch: tuple(batch["tokens"].shape))


def _forward_step(batches: Iterator, core: Any) -> tuple[Tensor, Callable]:
    batch = core.config.data_step_fn(batches)
    return core.config.forward_step_fn(core, batch), _no_loss


def _no_loss(output: Tensor) -> tuple[Tensor, dict]:
    """Return a placeholder loss for Megatron's schedule; the real one comes from the hook."""
    return output.new_zeros(()), {}


def token_sums(
    batch: Mapping[str, Any],
    hidden: Tensor,
    output: tuple[Tensor, Tensor | None],
    reference: tuple[Tensor, Any] | None = None,
) -> Tensor:
    """Return sums over a micro-batch's tokens, weighted by the loss mask: `[3]` cross entropy, KL and weights.

    Args:
        batch: ``labels`` `[b, s]` and ``loss_mask`` `[b, s]` (all ones if it is missing).
        hidden: final hidden states `[s, b, h]`.
        output: weight `[v, h]` and bias `[v]` of the output layer.
        reference: the original's hidden states and output layer.
    """
    labels = batch["labels"].to(hidden.device, non_blocking=True).T.flatten()
    mask = batch.get("loss_mask")
    if mask is None:
        weights = torch.ones(len(labels), dtype=torch.float64, device=hidden.device)
    else:
        weights = mask.to(hidden.device, torch.float64, non_blocking=True).T.flatten()
    sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)
    for rows in torch.arange(len(labels), device=hidden.device).split(_ROWS):
        logits = _logits(hidden.flatten(0, 1)[rows], output)
        loss = functional.cross_entropy(logits, labels[rows].clamp(min=0), reduction="none")
        kl = torch.zeros_like(loss)
        if reference is not None:
            kl = _heldout.divergence(logits, _logits(reference[0].flatten(0, 1)[rows], reference[1]))
        weight = weights[rows]
        sums += torch.stack([_heldout.weighted_sum(loss, weight), _heldout.weighted_sum(kl, weight), weight.sum()])
    return sums


def _logits(hidden: Tensor, output: tuple[Tensor, Tensor | None]) -> Tensor:
    """Return fp32 logits `[n, v]` of hidden states `[n, h]`."""
    weight, bias = output
    return functional.linear(hidden.to(weight.dtype), weight, bias).float()


def _means(core: nn.Module, sums: list[Tensor]) -> tuple[float, float]:
    """Return loss and KL a token over all ranks; the host waits for the device here, not for each micro-batch."""
    total = torch.zeros(3, dtype=torch.float64, device=_parallel.device_of(core))
    for part in sums:
        total += part
    torch.distributed.all_reduce(total)
    loss, kl, weight = total.tolist()
    if weight <= 0:
        raise ModelOptConfigError("target_params: the loss mask of the held-out data leaves no token to measure on.")
    return loss / weight, kl / weight

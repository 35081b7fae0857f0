"""Let modelopt's AWQ search (``awq_lite``) run once for each linear layer instead of once for each micro-batch.

For every candidate scale, modelopt quantizes the weight and compares the layer's outputs, in every micro-batch. The
error of a linear layer depends on its inputs ``X [n, in]`` only through their second moments: with the error of the
weight ``E [out, in]``, ``||X E^T||^2 = tr(E X^T X E^T)``. So the search needs one batch per layer that has the second
moments of all micro-batches: the inputs themselves if there are at most ``in`` of them, otherwise the Cholesky factor
``R [in, in]`` of ``R^T R = sum_b X_b^T X_b / n_b`` (modelopt adds the mean errors of the micro-batches). The inputs of
one decoder layer are held at a time. modelopt's own code computes scales, errors and the choice.

Source of the search: arXiv 2306.00978, as in ``modelopt.torch.quantization.model_calib.awq_lite`` (0.37 to 0.47).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from ... import _parallel
from . import batching

# What modelopt adds to a layer while it searches, and its name for the layer's original method.
_HELPER, _ORIGINAL = "awq_lite", "_forward_no_awq"
# Rounding makes the second moments of inputs with fewer directions than features indefinite. The first share of their
# mean that is added is far below the differences between candidate scales; later ones are ten times the last.
_JITTER, _MAX_JITTER = 1e-6, 1e-1

Call = tuple[tuple, dict[str, Any]]


class Inputs:
    """The inputs of one linear layer, of all micro-batches, in at most as many rows as the layer has features.

    Attributes:
        width: Features of an input over the ranks of ``group``.
        count: Micro-batches that had inputs.
        axes: The axes of an input: experts take `[n, in]`, all other layers `[s, b, in]`.
        rest: The further arguments of the layer.
    """

    def __init__(self, width: int, group: Any = None):
        """Start without inputs.

        Args:
            width: Features of an input, on all ranks of the group together.
            group: The process group over whose ranks the features of an input are divided, None if they are not.
        """
        self.width, self.group, self.count, self.axes = width, group, 0, 2
        self.rest: Call = ((), {})
        self._rows: list[Tensor] = []
        self._moments: Tensor | None = None

    def add(self, value: Tensor) -> None:
        """Add the inputs `[..., in]` of a micro-batch."""
        rows = value.detach().reshape(-1, value.shape[-1])
        if not rows.shape[0]:
            return
        self.count += 1
        self.axes = value.dim()
        self._rows.append(rows)
        if self._moments is None and sum(one.shape[0] for one in self._rows) <= self.width:
            return
        if self._moments is None:
            self._moments = torch.zeros(self.width, self.width, device=rows.device)
        for one in self._rows:
            whole = self._whole(one).float()
            self._moments.addmm_(whole.t(), whole, alpha=1 / one.shape[0])
        self._rows.clear()

    def batch(self, like: Tensor) -> Tensor:
        """Return one batch `[r, in]` with the second moments of all inputs, in the dtype of ``like``; forget them."""
        if self._moments is None:
            rows, self._rows = self._rows, []
            sizes = {one.shape[0] for one in rows}
            if len(sizes) > 1:  # each micro-batch counts the same
                rows = [one.float() * (max(sizes) / one.shape[0]) ** 0.5 for one in rows]
            return torch.cat(rows).to(like.dtype)
        moments, self._moments = self._moments.div_(self.count), None
        factor = _factor(moments)
        if self.group is not None:
            own = self.width // torch.distributed.get_world_size(self.group)
            factor = factor[:, own * torch.distributed.get_rank(self.group) :][:, :own]
        return factor.contiguous().to(like.dtype)

    def _whole(self, rows: Tensor) -> Tensor:
        """Return inputs `[n, in]` with the features of all ranks: products of two features may span ranks."""
        if self.group is None:
            return rows
        parts = _parallel.gather_tensors(rows, self.group)
        return parts.transpose(0, 1).reshape(rows.shape[0], -1)


def _factor(moments: Tensor) -> Tensor:
    """Return the fp32 upper factor `R` [in, in] of second moments `R^T R` [in, in], which it overwrites."""
    mean, share = moments.diagonal().double().mean(), _JITTER
    # fp64: rounding in fp32 would need a diagonal that changes the errors. Factored in place: of a wide layer, each
    # copy in fp64 takes as much memory as the layer's inputs.
    factor = torch.empty_like(moments, dtype=torch.float64).t()  # the order of LAPACK, which needs no further copy
    failed = torch.zeros((), dtype=torch.int32, device=moments.device)
    while True:
        factor.copy_(moments).diagonal().add_(share * mean)
        torch.linalg.cholesky_ex(factor, upper=True, out=(factor, failed))
        if not failed.item() or share >= _MAX_JITTER:
            return moments.copy_(factor)
        share *= 10


def one_batch_a_layer(forward_loop: Callable) -> Callable:
    """Return a forward loop for ``mtq.quantize`` with which modelopt's AWQ search runs once for each linear layer.

    During the search the loop runs one decoder layer after the other instead of ``forward_loop``, with the inputs that
    the first pass of the data recorded. Other passes, models without ``decoder.layers``, and quantized linear layers
    outside of them run ``forward_loop`` as it is.

    Args:
        forward_loop: Runs the calibration data through the model.
    """
    recorded: list[list[Call]] = []

    def run(core):
        searched = _searched(core)
        if not _parallel.any_rank([bool(searched)])[0]:
            return forward_loop(core)
        layers = _decoder_layers(core, searched)
        if _parallel.any_rank([layers is None])[0] or layers is None:
            return forward_loop(core)
        caches = any(type(getattr(module, _HELPER)).cache_mode for module in searched)
        caches = _parallel.any_rank([caches])[0]
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        if caches and stages > 1:
            return forward_loop(core)
        if not recorded:
            # In the search pass of a pipeline the quantized KV cache of earlier stages has changed the inputs.
            plain = contextlib.nullcontext() if caches else _unquantized(searched)
            with plain, _recording(layers) as calls:
                found = forward_loop(core)
            recorded.extend(calls)
            if caches:
                return found
        calls = recorded.copy()
        recorded.clear()
        return _search(layers, calls)

    return run


def _searched(core: Any) -> list[torch.nn.Module]:
    return [module for module in core.modules() if hasattr(module, _HELPER)] if hasattr(core, "modules") else []


def _decoder_layers(core: Any, searched: list[torch.nn.Module]) -> list[torch.nn.Module] | None:
    """Return the decoder layers of this rank; None if the search cannot run one after the other."""
    layers = getattr(getattr(core, "decoder", None), "layers", None)
    if layers is None or not parallel_state.model_parallel_is_initialized():
        return None
    # Experts of other ranks may have no tokens, and low-precision contexts span layers.
    if parallel_state.get_expert_model_parallel_world_size() > 1 or getattr(core.config, "fp8", None):
        return None
    inside = {id(module) for module in layers.modules()}
    known = all(
        id(module) in inside
        and "forward" in vars(module)
        and hasattr(module, _ORIGINAL)
        and hasattr(type(getattr(module, _HELPER)), "cache_mode")
        for module in searched
    )
    return list(layers) if known else None


@contextlib.contextmanager
def _recording(layers: list[torch.nn.Module]) -> Iterator[list[list[Call]]]:
    """Return the calls of each layer, one per micro-batch; only those of the first layer keep the hidden states."""
    calls: list[list[Call]] = [[] for _ in layers]

    def record(index: int) -> Callable:
        def hook(_, args: tuple, kwargs: dict[str, Any]) -> None:
            calls[index].append((args, dict(kwargs)) if index == 0 else _with_hidden((args, kwargs), None))

        return hook

    hooks = [layer.register_forward_pre_hook(record(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _with_hidden(call: Call, hidden: Tensor | None) -> Call:
    """Return a layer's arguments with other hidden states `[s, b, h]`."""
    args, kwargs = call
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": hidden}
    return (hidden, *args[1:]), kwargs


@contextlib.contextmanager
def _forwards(modules: dict[torch.nn.Module, Callable]) -> Iterator[None]:
    """Replace the forward methods of modules, which modelopt has set on the instances, within the context."""
    own = {module: vars(module)["forward"] for module in modules}
    try:
        for module, forward in modules.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, forward in own.items():
            vars(module)["forward"] = forward


def _plain(module: Any, inputs: Inputs | None = None) -> Callable:
    """Return a forward method without quantization of the weight, which adds its inputs to ``inputs``."""

    def forward(input, *args, **kwargs):
        if inputs is not None:
            inputs.add(input)
            inputs.rest = (args, kwargs)
        module.weight_quantizer.disable()
        try:
            return getattr(module, _ORIGINAL)(input, *args, **kwargs)
        finally:
            module.weight_quantizer.enable()

    return forward


def _unquantized(modules: list[torch.nn.Module]) -> contextlib.AbstractContextManager[None]:
    return _forwards({module: _plain(module) for module in modules})


def _inputs_of(module: Any) -> Inputs | None:
    """Return an empty `Inputs` for a layer whose search needs one batch only; None if modelopt runs each."""
    if not getattr(getattr(module, _HELPER), "is_enabled", True):
        return None
    if not isinstance(module, (ColumnParallelLinear, RowParallelLinear, torch.nn.Linear)):
        return None
    width, group = module.weight.shape[1], None
    if isinstance(module, RowParallelLinear):
        group = module.parallel_state.tensor_parallel_group
        group = group.group if group.is_initialized() and group.world_size() > 1 else None
        width *= torch.distributed.get_world_size(group) if group is not None else 1
    return Inputs(width, group)


@torch.no_grad()
def _search(layers: list[torch.nn.Module], calls: list[list[Call]]) -> None:
    """Run modelopt's search of every linear layer, one decoder layer after the other.

    Args:
        layers: The decoder layers of this rank, in which modelopt searches.
        calls: The calls of each layer, as `_recording` returned them; the list is emptied.
    """
    bar = batching.with_progress(range(len(layers)), len(layers), "AWQ search")
    hidden: list[Tensor | None] = [None] * (len(calls[0]) if calls else 0)
    for index, (layer, _) in enumerate(zip(layers, bar, strict=False)):
        inputs = {module: _inputs_of(module) for module in _searched(layer)}
        collected = {module: store for module, store in inputs.items() if store is not None}
        with _forwards({module: _plain(module, store) for module, store in collected.items()}):
            for number, call in enumerate(calls[index]):
                args, kwargs = call if index == 0 else _with_hidden(call, hidden[number])
                output = layer(*args, **kwargs)
                hidden[number] = output[0] if isinstance(output, tuple) else output
                calls[index][number] = ((), {})
        # The widest first: its second moments take the most memory.
        for module, store in sorted(collected.items(), key=lambda item: -item[1].width):
            if store.count:
                batch = store.batch(module.weight)
                args, kwargs = store.rest
                module(batch.view(batch.shape[0], *[1] * (store.axes - 2), -1), *args, **kwargs)
    next(bar, None)

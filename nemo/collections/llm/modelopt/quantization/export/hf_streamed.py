"""Run a ``transformers`` model whose weights are read when a part of it runs, and freed after it.

The parts are the decoder layers and the modules outside of them. Files stay mapped, so the memory is that of one
decoder layer in fp32, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..._staging import ExportError

# The part of an output layer's weight that is converted to fp32 at a time.
_ROWS = 16384

Source = Callable[[str], Tensor | None]


def without_weights(config: Any, **settings: Any) -> nn.Module:
    """Return the model of a ``transformers`` configuration; parameters have no memory, buffers are initialised."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, **settings).eval()
    # Within the context, tied parameters are made again for each module.
    model.tie_weights()
    return model


def read_when_run(model: nn.Module, source: Source) -> list[nn.Module]:
    """Make each part of a model read its parameters before it runs, and free them afterwards.

    Args:
        model: What `without_weights` returned.
        source: Returns a tensor of the checkpoint by its name in the model, None if it has none.

    Returns:
        The parts.

    Raises:
        ExportError: When a part runs that has no weights in the checkpoint.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)

    def read(parameter: Tensor) -> Tensor:
        found = next((value for name in names[id(parameter)] if (value := source(name)) is not None), None)
        if found is None:
            raise ExportError(f"The checkpoint has no tensor {names[id(parameter)][0]}.")
        return found

    parts = list(_parts(model))
    for part, inner in parts:
        if inner is None and type(part) is nn.Embedding:
            # Only the rows of the tokens are converted.
            _hook(part, [part], read)
            part.register_forward_hook(lambda _, args, output: output.float())
        elif inner is None and type(part) is nn.Linear:
            part.forward = _in_blocks(part, read)
        else:
            _hook(part, inner or [part], lambda parameter: read(parameter).float())
    return [part for part, _ in parts]


def _parts(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module] | None]]:
    """Yield the elements of the outermost lists of modules with all modules in them, and single modules outside."""
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            for part in module:
                inside |= {id(one) for one in part.modules()}
                yield part, list(part.modules())
    for module in model.modules():
        if id(module) not in inside and any(True for _ in module.parameters(recurse=False)):
            yield module, None


def _hook(part: nn.Module, modules: list[nn.Module], read: Callable[[Tensor], Tensor]) -> None:
    """Register the hooks that read and free the parameters of some modules, for the forward pass of a part."""
    empty = [(module, name, value) for module in modules for name, value in module.named_parameters(recurse=False)]

    def fill(*_: Any) -> None:
        for module, name, value in empty:
            module._parameters[name] = nn.Parameter(read(value), requires_grad=False)

    def free(*_: Any) -> None:
        for module, name, value in empty:
            module._parameters[name] = value

    part.register_forward_pre_hook(fill)
    part.register_forward_hook(free, always_call=True)


def _in_blocks(layer: nn.Linear, read: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the forward method of a linear layer with its weight converted to fp32 in blocks of rows."""
    weight, bias = layer.weight, layer.bias

    def forward(inputs: Tensor) -> Tensor:
        blocks = read(weight).split(_ROWS)
        output = torch.cat([nn.functional.linear(inputs, block.float()) for block in blocks], dim=-1)
        return output if bias is None else output + read(bias).float()

    return forward

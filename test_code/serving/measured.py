"""Measure the memory of a model that vLLM serves, in vLLM's process."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from references import caches_of

_COUNTER = Path(__file__).parents[1] / "support" / "allocations.py"


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages of tensors, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@contextlib.contextmanager
def loading() -> Iterator[list[int]]:
    """Yield a list that gets the bytes of the parameters of each model that vLLM loads within the context.

    They are counted before vLLM prepares them: on a CPU it packs some of them into memory of no tensor.
    """
    from vllm.model_executor.model_loader import base_loader

    prepare, found = base_loader.process_weights_after_loading, []

    def counted(model, *args):
        found.append(nbytes(model.parameters()))
        return prepare(model, *args)

    base_loader.process_weights_after_loading = counted
    try:
        yield found
    finally:
        base_loader.process_weights_after_loading = prepare


def kept(model: torch.nn.Module) -> dict[str, int]:
    """Return the bytes of a model's buffers and of its KV cache.

    Args:
        model: A model of vLLM's.
    """
    return {"buffers": nbytes(model.buffers()), "cache": nbytes(caches_of(model))}


def peak(model: Any, prompts: list, settings: Any) -> int:
    """Return the most bytes of tensors that live at a time while vLLM computes the next token of prompts.

    Args:
        model: vLLM's ``LLM``, with its engine in this process.
        prompts: Prompts that fit into one forward pass.
        settings: vLLM's ``SamplingParams``.
    """
    spec = importlib.util.spec_from_file_location("allocations", _COUNTER)
    assert spec is not None and spec.loader is not None
    allocations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(allocations)
    with allocations.Allocated() as allocated:
        model.generate(prompts, settings, use_tqdm=False)
    return allocated.peak

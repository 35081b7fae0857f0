"""GPTQ (arXiv 2210.17323) of layers that get no input from some micro-batches."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch

from ..._functions import replaced

_MODULE, _FUNCTION = "modelopt.torch.quantization.utils.calib_utils", "update_hessian"


def empty_inputs_left_out() -> contextlib.AbstractContextManager[None]:
    """Return a context in which an input without tokens leaves the statistics of a layer as they are.

    Routers send some experts no token of a micro-batch. modelopt 0.44 and 0.45 divide by the number of tokens so far,
    which is zero where the first input is empty; later versions leave empty inputs out.
    """
    try:
        module = importlib.import_module(_MODULE)
        update = getattr(module, _FUNCTION)
    except (ImportError, AttributeError):  # before 0.44 there is no GPTQ
        return contextlib.nullcontext()

    def update_hessian(input: torch.Tensor, hessian: torch.Tensor, n_samples: int) -> Any:
        return update(input, hessian, n_samples) if input.numel() else (hessian, n_samples)

    return replaced(module, _FUNCTION, update_hessian)

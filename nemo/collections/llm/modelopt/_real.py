"""Distinguish real models from their stand-ins in tests.

Whatever goes beyond stock applies to real models only. Mocks, namespaces and small networks, which unit tests pass,
take exactly the steps that stock takes: they have neither the attributes nor the files that the rest needs.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import nn
from transformers import PreTrainedModel

from nemo.collections import llm


def is_core(model: Any) -> bool:
    """Return whether this is a Megatron-Core language model (or a ``transformers`` model, which NeMo 2.5 wraps).

    The type is asked, because a mock with a ``spec`` passes ``isinstance``.
    """
    return issubclass(type(model), (LanguageModule, PreTrainedModel))


def holds_core(model: Any) -> bool:
    """Return whether such a model is inside, under whatever wrappers."""
    return issubclass(type(model), nn.Module) and any(is_core(module) for module in model.modules())


def is_nemo_model(model: Any) -> bool:
    """Return whether this is NeMo's own model class, with weights or without."""
    return issubclass(type(model), llm.GPTModel)

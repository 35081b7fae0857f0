"""Find NeMo's model class inside wrappers, and Model Optimizer's name for its decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemo.collections import llm

from ..errors import ModelOptConfigError
from . import _transformers_models

_DECODERS = (
    ("baichuan", "Baichuan2"),
    ("chatglm", "ChatGLM"),
    ("gemma2", "Gemma2"),
    ("gemma3", "Gemma3"),
    ("gemma", "Gemma"),
    ("llama", "Llama Mistral Mixtral"),
    ("gpt", "Nemotron"),
    ("qwen", "Qwen2"),
    ("gpt", "Starcoder Starcoder2"),
    ("phi3", "Phi3"),
)


def known_models() -> list[tuple[type, str]]:
    """Return pairs of a NeMo class and Model Optimizer's name for its decoder; the first class that fits counts."""
    return [(getattr(llm, f"{name}Model"), decoder) for decoder, names in _DECODERS for name in names.split()]


def first_fit(model: Any, known: list[tuple[type, str]]) -> str | None:
    """Return the name for the first class of which the model is an instance, or None."""
    return next((name for model_class, name in known if isinstance(model, model_class)), None)


def find_gpt_model(model: Any) -> Any:
    """Return the ``llm.GPTModel``, or another supported model, inside wrappers; None if there is none."""
    # NeMo has few wrappers; the attribute of a mock is another mock, without end.
    for _ in range(8):
        is_known = isinstance(model, llm.GPTModel) or _transformers_models.is_wrapped(model)
        if is_known or type(model).__name__ == "Llama4OmniModel":
            return model
        model = getattr(model, "module", None)
        if model is None:
            return None
    return None


def infer(model: Any, name_of: Callable[[Any], str | None], optional: bool = False) -> str | None:
    """Return Model Optimizer's name for the decoder by the class of the model.

    Args:
        model: The model, wrapped or not.
        name_of: Returns the name for an ``llm.GPTModel``, or None.
        optional: Return None if the name is unknown.

    Raises:
        ModelOptConfigError: If the name is unknown and not optional.
    """
    inner = find_gpt_model(model)
    if type(inner).__name__ == "Llama4OmniModel":
        return "llama"
    name = None if inner is None else name_of(inner)
    if name is None and not optional:
        raise ModelOptConfigError(
            "Could not infer the decoder type for the provided model. Please provide the decoder type explicitly in "
            f"the ExportConfig. It has decoder_type=None, and the model is a {type(inner or model).__name__}."
        )
    return name

"""Take the ``transformers`` configuration of a model from NeMo's exporter, and correct it.

NeMo's exporters leave out entries or take them from the tokenizer. Three of all families are corrected here: the class
(none for Nemotron, the dense class for Qwen3 with experts), whether the output layer is tied (Qwen2), and the size of
the vocabulary: that of the tokenizer, in some exporters without its added tokens. `hf_entries` has the others.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo.lightning import io
from nemo.lightning.io import api
from transformers import AutoModelForCausalLM

from ..._functions import replaced
from . import hf_entries
from .hf_names import NamesError


def of(exporter: Any, core: Any, tokenizer: Any = None, rows: int | None = None) -> Any:
    """Return the configuration.

    Args:
        exporter: NeMo's exporter for the class of the model.
        core: The Megatron-Core model.
        tokenizer: The ``transformers`` tokenizer of the model, or None.
        rows: Rows of the embedding, padding included; None corrects no vocabulary.

    Raises:
        NamesError: If NeMo's exporter cannot derive a configuration.
    """
    with from_context():
        try:
            found = corrected(hf_entries.derived(exporter, core.config) or exporter.config, core)
        except (ValueError, TypeError, AssertionError, AttributeError, OSError) as error:
            raise NamesError(f"{type(exporter).__name__} of NeMo cannot derive a configuration: {error}.") from error
        vocabulary = _vocabulary(exporter, tokenizer)
    if rows is not None and vocabulary is not None:
        found.vocab_size = min(rows, vocabulary)
    return found


@contextlib.contextmanager
def from_context() -> Iterator[None]:
    """Let NeMo's exporters read only the model of a checkpoint's context, from its own folder, inside the context.

    They pass the checkpoint's folder, in which NeMo does not find values that are stored in files of their own. Some
    read the whole context, and then fail for trainers and optimizers that NeMo cannot read back.
    """
    with contextlib.ExitStack() as stack:
        for module in (io, api):
            stack.enter_context(replaced(module, "load_context", _only_model(module.load_context)))
        yield


def _only_model(load: Callable) -> Callable:
    def load_context(path: Any, subpath: str | None = None, **kwargs: Any) -> Any:
        folder = Path(path) / "context"
        path = folder if folder.is_dir() else path
        if subpath is None:
            return SimpleNamespace(model=load(path, subpath="model", **kwargs))
        return load(path, subpath=subpath, **kwargs)

    return load_context


def corrected(hf_config: Any, core: Any) -> Any:
    """Return a copy of the configuration of NeMo's exporter with its class, ties and further entries.

    Args:
        hf_config: The configuration.
        core: The Megatron-Core model.
    """
    hf_config = copy.copy(hf_config)
    classes = AutoModelForCausalLM._model_mapping
    if type(hf_config) in classes:
        hf_config.architectures = [classes[type(hf_config)].__name__]
    tied = getattr(core, "share_embeddings_and_output_weights", None)
    if isinstance(tied, bool):
        hf_config.tie_word_embeddings = tied
    for name, value in hf_entries.of(hf_config, getattr(core, "config", None)).items():
        setattr(hf_config, name, value)
    return hf_config


def _vocabulary(exporter: Any, tokenizer: Any) -> int | None:
    """Return the size of the vocabulary, of the checkpoint if it names one, or of its tokenizer; None if unknown.

    The configuration of the model in memory has the tokenizer's, which the quantizer sets for other exporters.
    """
    named = getattr(io.load_context(Path(exporter), subpath="model.config"), "vocab_size", None)
    if isinstance(named, int):
        return named
    return None if tokenizer is None else len(tokenizer)


def exporter_of(model: Any) -> Any:
    """Return NeMo's exporter for a model in memory; it reads no checkpoint inside `in_memory`."""
    return type(model).exporter("hf", "model in memory")


def in_memory(model: Any) -> Any:
    """Return a context in which NeMo's exporters read a model in memory instead of a checkpoint's context."""

    def load_context(path: Any, subpath: str | None = None, **_: Any) -> Any:
        found: Any = SimpleNamespace(model=model)
        for part in subpath.split(".") if subpath else ():
            found = getattr(found, part)
        return found

    return replaced(io, "load_context", load_context)

"""Compare the student's tokenizer with the one in the teacher's checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nemo.lightning import io
from nemo.lightning.ckpt_utils import ckpt_to_context_subdir
from nemo.utils import logging

from nemo_modelopt_dropin.preflight import tokenizer_files
from nemo_modelopt_dropin.preflight.tokenizer_files import Vocabulary

from ..errors import ModelOptConfigError


def check_tokenizers(teacher_path: Any, tokenizer: Any) -> None:
    """Raise an error if the tokenizer in the teacher's checkpoint differs from the student's.

    Args:
        teacher_path: NeMo checkpoint of the teacher. Nothing is checked if it has no context, or if its tokenizer
            cannot be loaded or compared.
        tokenizer: tokenizer of the student.

    Raises:
        ModelOptConfigError: With entries that differ.
    """
    own = vocabulary(tokenizer)
    if own is None or not isinstance(teacher_path, (str, os.PathLike)):
        return
    context = Path(ckpt_to_context_subdir(teacher_path))
    if not (context / "io.json").is_file():
        return
    try:
        other = vocabulary(io.load_context(context, subpath="model.tokenizer"))
    except Exception as error:  # an unreachable hub, a class of another version: NeMo reports that when it loads them
        logging.warning(f"Distillation: the teacher's tokenizer is not compared with the student's: {error}")
        return
    found = tokenizer_files.difference(own, other)
    if found:
        raise ModelOptConfigError(tokenizer_files.message(found, _name(tokenizer), str(teacher_path)))


def _name(tokenizer: Any) -> str:
    """Return the name of one of NeMo's tokenizers: the folder or hub name that it was loaded from, or its class."""
    name = getattr(getattr(tokenizer, "tokenizer", None), "name_or_path", None)
    return name if isinstance(name, str) and name else type(tokenizer).__name__


def vocabulary(tokenizer: Any) -> Vocabulary | None:
    """Return the vocabulary of one of NeMo's tokenizers, or None for an unsupported kind."""
    from nemo.collections.common.tokenizers import AutoTokenizer, SentencePieceTokenizer, TiktokenTokenizer

    inner: Any = getattr(tokenizer, "tokenizer", None)
    if isinstance(tokenizer, AutoTokenizer):
        backend = getattr(inner, "backend_tokenizer", None)
        text = backend.to_str() if backend is not None else None
        if isinstance(text, str):
            return tokenizer_files.of_json(json.loads(text))
        entries = inner.get_vocab() if hasattr(inner, "get_vocab") else None
        if not isinstance(entries, dict):
            return None
        return Vocabulary({number: token for token, number in entries.items()})
    if isinstance(tokenizer, SentencePieceTokenizer):
        size = inner.get_piece_size() if hasattr(inner, "get_piece_size") else None
        return Vocabulary({i: inner.id_to_piece(i) for i in range(size)}) if isinstance(size, int) else None
    if isinstance(tokenizer, TiktokenTokenizer):
        entries = getattr(tokenizer, "token2id", None)
        ranks = entries if isinstance(entries, dict) else {}
        # These are Python's bytes, which cannot be compared with the byte-level spelling of Hugging Face.
        return Vocabulary({number: repr(token) for token, number in ranks.items()}) if ranks else None
    return None

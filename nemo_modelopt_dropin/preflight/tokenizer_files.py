"""Compare two tokenizers by vocabulary and merges. Standard library only.

Only ids in both vocabularies are compared; a longer vocabulary is visible in its size. Special tokens that were added
to a vocabulary may have different names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

OVERRIDE = "allow_other_tokenizer"
ALIGNED = "logit_kl_vocabulary: aligned-text"


@dataclass(frozen=True)
class Vocabulary:
    """The parts of a tokenizer that determine the ids of a text.

    Attributes:
        tokens: Tokens by id.
        merges: Merges of byte-pair encoding, in order; None if unknown.
    """

    tokens: Mapping[int, str]
    merges: tuple[str, ...] | None = None


def of_json(content: Any) -> Vocabulary | None:
    """Return the vocabulary in a ``tokenizer.json``, None if its form is unknown."""
    model = content.get("model") if isinstance(content, dict) else None
    stored = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(stored, dict):
        tokens = {number: token for token, number in stored.items() if isinstance(number, int)}
    elif isinstance(stored, list) and all(isinstance(one, (list, tuple)) and one for one in stored):
        tokens = {number: str(one[0]) for number, one in enumerate(stored)}  # pieces and their scores
    else:
        return None
    merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(merges, list):
        return Vocabulary(tokens)
    # Newer versions store a pair as a list.
    return Vocabulary(tokens, tuple(one if isinstance(one, str) else " ".join(one) for one in merges))


def of_folder(path: str | Path | None) -> Vocabulary | None:
    """Return the vocabulary of a NeMo 2 checkpoint or a tokenizer's folder, None if its files do not contain it.

    Args:
        path: The folder; None for none.
    """
    if not path or not Path(path).is_dir():
        return None
    context = Path(path) / "context"
    files = sorted((context if context.is_dir() else Path(path)).rglob("tokenizer.json"))
    if len(files) != 1:
        return None
    try:
        return of_json(json.loads(files[0].read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None  # `checkpoint_files` reports it


def difference(student: Vocabulary | None, teacher: Vocabulary | None) -> str | None:
    """Describe how two vocabularies differ; return None if they agree or one is unknown."""
    if student is None or teacher is None:
        return None
    both = student.tokens.keys() & teacher.tokens.keys()
    other = sorted(number for number in both if student.tokens[number] != teacher.tokens[number])
    if other:
        shown = (
            f"{number} is {student.tokens[number]!r} and {teacher.tokens[number]!r}" for number in islice(other, 3)
        )
        return f"{len(other):,} of {len(both):,} entries of the vocabulary differ ({', '.join(shown)})"
    for place, (one, two) in enumerate(zip(student.merges or (), teacher.merges or (), strict=False), 1):
        if one != two:
            return f"the vocabularies agree, but merge {place:,} is {one!r} and {two!r}"
    return None


def message(found: str, student: str, teacher: str) -> str:
    """Return the error message for a difference.

    Args:
        found: Result of `difference`.
        student: Name of the student's tokenizer.
        teacher: Name of the teacher's tokenizer.
    """
    return (
        f"Student and teacher have different tokenizers: {found} (student: {student}, teacher: {teacher}). The "
        "teacher's logits belong to other tokens, so the student would learn noise. Use models of one tokenizer, or "
        f"set {ALIGNED} in the distillation config to compare sorted probabilities at the same places of the text; "
        f"{OVERRIDE}: true distills in spite of the difference."
    )

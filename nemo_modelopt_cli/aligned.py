"""Texts in the tokens of two tokenizers, aligned by the text before each token.

A sample is a text, or a piece of a long one: the student's tokens, the teacher's tokens, and for each token of the
student the place of the teacher's token that ends at the same character, if there is one. Both models have then read
the same characters and predict what follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo_modelopt_cli.tokens import InPasses, TextDataModule, checkpoint_tokenizer, read_documents


def counterparts(student: Sequence[int], teacher: Sequence[int]) -> list[int]:
    """Return for each token of the student the place of the teacher's token that ends at the same character, or -1.

    Several tokens end at one character if they are its bytes: the text is complete only after the last of them.

    Args:
        student: where each token of the student ends in the text, in characters.
        teacher: the same for the teacher's tokens.
    """
    last = {end: place for place, end in enumerate(teacher)}
    complete = [place + 1 == len(student) or student[place + 1] != end for place, end in enumerate(student)]
    return [last.get(end, -1) if done and end else -1 for end, done in zip(student, complete, strict=True)]


def encode(text: str, tokenizer: Any, whose: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a text, and where each token ends in it.

    Args:
        text: the text.
        tokenizer: NeMo's tokenizer around a fast one of Hugging Face.
        whose: "student" or "teacher", for the error.

    Raises:
        ModelOptConfigError: If the tokenizer does not know the places of its tokens.
    """
    inner = getattr(tokenizer, "tokenizer", None)
    if not getattr(inner, "is_fast", False):
        raise ModelOptConfigError(
            f"logit_kl_vocabulary: aligned-text needs the places of tokens in the text, and the {whose}'s tokenizer "
            f"({type(inner or tokenizer).__name__}) does not know them. Use a fast tokenizer of Hugging Face."
        )
    assert inner is not None
    found = inner(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(found["input_ids"]), [end for _, end in found["offset_mapping"]]


def pieces(text: str, tokenizer: Any, length: int) -> list[str]:
    """Return a text in pieces of about ``length`` tokens of the student, cut between tokens."""
    _, ends = encode(text, tokenizer, "student")
    cuts = [0, *(ends[place - 1] for place in range(length, len(ends), length)), len(text)]
    return [text[first:end] for first, end in zip(cuts, cuts[1:], strict=False) if first < end]


class AlignedTexts(InPasses):
    """Texts as the batches of NeMo's GPT, with the teacher's tokens.

    Args:
        texts: texts, or pieces of texts.
        student: tokenizer of the student.
        teacher: tokenizer of the teacher.
        length: tokens of a sample for each model; what exceeds it is cut off.
        samples: how many samples, in a new order in each pass over the texts; None: each text once.
        seed: of the orders.
    """

    def __init__(
        self, texts: list[str], student: Any, teacher: Any, length: int, samples: int | None = None, seed: int = 0
    ):
        super().__init__(len(texts), samples, seed)
        self.length, self.ends = length, (student.eos_id, teacher.eos_id)
        self.rows = [self._encoded(text, student, teacher) for text in texts]
        # True where attention is masked. Megatron's local attention requires it; Transformer Engine makes its own.
        self.mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None]

    def _encoded(self, text: str, student: Any, teacher: Any) -> tuple[np.ndarray, ...]:
        """Return the tokens of both models that fit, and the counterparts of the student's."""
        ids, ends = encode(text, student, "student")
        of_teacher, teacher_ends = encode(text, teacher, "teacher")
        places = [one if one < self.length else -1 for one in counterparts(ends, teacher_ends)]
        # The student predicts the token after the last one that fits, too.
        parts = ids[: self.length + 1], of_teacher[: self.length], places[: self.length]
        return tuple(np.asarray(part, dtype=np.int32) for part in parts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        (ids, of_teacher, places), (end, teacher_end) = self.rows[self.place(index)], self.ends
        return {
            "tokens": self._filled(ids, end),
            "labels": self._filled(ids[1:], end),
            "loss_mask": self._filled(np.ones_like(places), 0).float(),
            "position_ids": torch.arange(self.length),
            "attention_mask": self.mask,
            "teacher_tokens": self._filled(of_teacher, teacher_end),
            "counterparts": self._filled(places, -1),
        }

    def _filled(self, values: np.ndarray, padding: int) -> torch.Tensor:
        found = torch.full((self.length,), padding, dtype=torch.int64)
        fitting = values[: self.length]
        found[: len(fitting)] = torch.from_numpy(fitting)
        return found


class AlignedTextDataModule(TextDataModule):
    """`AlignedTexts` over files of texts.

    Args:
        text: training text.
        checkpoint: NeMo checkpoint of the student, whose tokenizer is used.
        heldout_text: text to validate on; the training text if it is None.
        teacher_checkpoint: NeMo checkpoint of the teacher, whose tokenizer is used.
        teacher_tokenizer: use it instead of the teacher's.
        **settings: other arguments of `TextDataModule`.
    """

    # The check of the settings reads it.
    has_teacher_tokens = True

    def __init__(
        self,
        text: str | Path,
        checkpoint: str | Path,
        heldout_text: str | Path | None = None,
        *,
        teacher_checkpoint: str | Path | None = None,
        teacher_tokenizer: Any = None,
        **settings,
    ):
        super().__init__(text, checkpoint, heldout_text, **settings)
        self.teacher_tokenizer = teacher_tokenizer or checkpoint_tokenizer(teacher_checkpoint or "")

    def _encode(self, path: str) -> list[str]:
        found = []
        for row in read_documents(path):
            if not isinstance(row, str):
                raise ModelOptConfigError(
                    f"{path}: logit_kl_vocabulary: aligned-text reads texts, and a row is a {type(row).__name__}. The "
                    "template of a conversation and token ids belong to one tokenizer; use rows with a column text."
                )
            found += pieces(row, self.tokenizer, self.seq_length)
        return found

    def _dataset(self, name: str, samples: int | None) -> Dataset[Any]:
        texts = self._of(name)
        if not texts:
            raise ModelOptConfigError(f"{self.texts[name]} holds no text.")
        return AlignedTexts(texts, self.tokenizer, self.teacher_tokenizer, self.seq_length, samples, self.seed)

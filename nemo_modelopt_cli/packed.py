"""Whole texts and conversations, packed into sequences of one length, in which each attends only to itself.

A packed sequence is a sample of a micro-batch of one. Megatron gets the ends of its parts (``cu_seqlens``), as from
NeMo's packed data sets. The rest of the sequence is padding: a part of its own, which does not count in the loss.
"""

from __future__ import annotations

import bisect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo_modelopt_cli.tokens import InPasses, TextDataModule, counted_rows
from nemo_modelopt_dropin.console import screen

# Token ids of a row, and whether each of them counts in the loss.
Row = tuple[list[int], list[bool]]


def usable(rows: list[Row], length: int) -> list[Row]:
    """Return the rows cut to ``length`` tokens and the next one, without those in which no predicted token counts."""
    cut = [(ids[: length + 1], counted[: length + 1]) for ids, counted in rows]
    return [(ids, counted) for ids, counted in cut if any(counted[1:])]


def bins(lengths: list[int], size: int) -> list[list[int]]:
    """Return the places of the lengths in bins of a size: the longest first, each into the fullest bin that holds it.

    Args:
        lengths: at most ``size`` each.
        size: of a bin.
    """
    found: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (space left, number of the bin), sorted
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fits = bisect.bisect_left(free, (lengths[place], -1))
        if fits == len(free):
            left, number = size, len(found)
            found.append([])
        else:
            left, number = free.pop(fits)
        found[number].append(place)
        bisect.insort(free, (left - lengths[place], number))
    return found


class PackedRows(InPasses):
    """Packed sequences as the batches of NeMo's GPT.

    Args:
        rows: what `usable` returns.
        size: tokens of a packed sequence.
        padding: token id of the rest of a sequence.
        samples: how many sequences, in a new order in each pass over the rows; None: each once.
        seed: of the orders.
    """

    def __init__(self, rows: list[Row], size: int, padding: int, samples: int | None = None, seed: int = 0):
        self.rows, self.size, self.padding = rows, size, padding
        self.bins = bins([len(ids) - 1 for ids, _ in rows], size)
        super().__init__(len(self.bins), samples, seed)
        # The first end is 0, and the padding may end with a part.
        self._ends = max(map(len, self.bins), default=0) + 2

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._packed([self.rows[row] for row in self.bins[self.place(index)]])

    def _packed(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        ends = np.cumsum([0, *(len(ids) - 1 for ids, _ in rows)]).tolist()
        rest = self.size - ends[-1]
        ends += [self.size] if rest else []
        # NeMo's data step cuts the list at its smallest number.
        cu_seqlens = torch.full((self._ends + 1,), -1, dtype=torch.int32)
        cu_seqlens[: len(ends)] = torch.tensor(ends, dtype=torch.int32)
        padding = [self.padding] * rest
        return {
            "tokens": torch.tensor([token for ids, _ in rows for token in ids[:-1]] + padding),
            "labels": torch.tensor([token for ids, _ in rows for token in ids[1:]] + padding),
            "loss_mask": torch.tensor([float(one) for _, counted in rows for one in counted[1:]] + [0.0] * rest),
            "position_ids": torch.cat([torch.arange(end - first) for first, end in zip(ends, ends[1:], strict=False)]),
            "attention_mask": torch.ones(1, dtype=torch.bool),  # not used: the ends say who attends to whom
            "cu_seqlens": cu_seqlens,
            "cu_seqlens_argmin": torch.tensor([len(ends)]),
            "max_seqlen": torch.tensor([max(np.diff(ends).tolist())], dtype=torch.int32),
        }


class PackedTextDataModule(TextDataModule):
    """Packed sequences of whole texts and conversations.

    Args:
        text: training text.
        checkpoint: NeMo checkpoint whose tokenizer encodes it.
        heldout_text: text to validate on; the training text if it is None.
        packed_sequence_size: tokens of a packed sequence.
        seq_length: most tokens of one text or conversation; longer ones are cut.
        **settings: other arguments of `TextDataModule`.
    """

    def __init__(
        self,
        text: str | Path,
        checkpoint: str | Path,
        heldout_text: str | Path | None = None,
        *,
        packed_sequence_size: int,
        seq_length: int,
        **settings,
    ):
        super().__init__(text, checkpoint, heldout_text, seq_length=packed_sequence_size, **settings)
        # Of this name in NeMo's data modules.
        self.packed_sequence_size, self.row_length = packed_sequence_size, seq_length

    def _encode(self, path: str) -> list[Row]:
        return list(counted_rows(path, self.tokenizer, self.answer_only_loss))

    def _dataset(self, name: str, samples: int | None) -> Dataset[Any]:
        rows, length = self._of(name), min(self.row_length, self.packed_sequence_size)
        kept, path = usable(rows, length), self.texts[name]
        if not kept:
            raise ModelOptConfigError(
                f"{path}: no token of its {len(rows):,} rows counts in the loss within --seq_length {self.row_length}. "
                "Use longer samples, or other data."
            )
        long = sum(len(ids) > length + 1 for ids, _ in rows)
        if long or len(kept) < len(rows):
            screen.warn(
                f"{path}: {long:,} of {len(rows):,} rows have more than {length:,} tokens and are cut; "
                f"{len(rows) - len(kept):,} without a token that counts are left out."
            )
        found = PackedRows(kept, self.packed_sequence_size, self.tokenizer.eos_id, samples, self.seed)
        if name == "train":
            self._remark(len(found.bins) * self.packed_sequence_size)
        return found

"""Text to packed token sequences, and the Lightning data module over them.

Documents are joined with the end-of-text token between them and cut into windows of ``seq_length + 1`` tokens, so no
position is padding. Held-out windows follow each other without overlap; training windows start anywhere, drawn from
the seed and the sample's number alone: every layout and every resumed run sees the same samples in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader, Dataset

from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo.collections.llm.modelopt.quantization.calibration import batching, sources
from nemo.collections.llm.modelopt.quantization.calibration.sources import Row
from nemo_modelopt_dropin.console import screen
from nemo_modelopt_dropin.preflight import chat_rows, data_files

# Documents that are tokenized in one call.
_CHUNK = 1024
# Passes over a text above which a warning is printed.
_REMARKABLE = 2


def read_documents(path: str | Path) -> Iterator[Row]:
    """Yield the rows of a file with content, as calibration reads them: texts, token ids and conversations.

    Args:
        path: a JSON, JSON-lines, Parquet or text file, compressed or not.

    Raises:
        ModelOptConfigError: If the file cannot be read; names the file and the line.
    """
    try:
        yield from data_files.rows(data_files.expand(str(path)), None, sources.DEFAULT_COLUMN)
    except data_files.DataFileError as error:
        raise ModelOptConfigError(f"{error}.") from error


def encode(path: str | Path, tokenizer) -> np.ndarray:
    """Return the token ids of a file as one array, each document ended by ``tokenizer.eos_id``.

    Args:
        path: what `read_documents` takes.
        tokenizer: NeMo's tokenizer; conversations need one with a chat template.

    Raises:
        ModelOptConfigError: If the file cannot be read or tokenized.
    """
    documents, parts = read_documents(path), []
    while chunk := list(islice(documents, _CHUNK)):
        for ids in batching.tokenize(chunk, tokenizer, None, str(path)):
            parts.append(np.asarray([*ids, tokenizer.eos_id], dtype=np.int32))
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)


def counted_rows(path: str | Path, tokenizer, answer_only_loss: bool) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield the token ids of each row of a file, ended by ``tokenizer.eos_id``, and whether each counts in the loss.

    Args:
        path: what `read_documents` takes.
        tokenizer: NeMo's tokenizer; conversations need one with a chat template.
        answer_only_loss: count only the assistant's replies of conversations; texts and token ids count whole.

    Raises:
        ModelOptConfigError: If the file cannot be read or tokenized, or replies cannot be found.
    """
    for row in read_documents(path):
        if not (answer_only_loss and isinstance(row, chat_rows.Chat)):
            for ids in batching.tokenize([row], tokenizer, None, str(path)):
                ended = [*ids, *([] if ids[-1] == tokenizer.eos_id else [tokenizer.eos_id])]
                yield ended, [True] * len(ended)
            continue
        try:
            ids, counted = chat_rows.encode_answers(row, tokenizer)
        except chat_rows.ChatError as error:
            raise ModelOptConfigError(f"{path}: {error}") from error
        if ids and ids[-1] != tokenizer.eos_id:
            ids, counted = [*ids, tokenizer.eos_id], [*counted, counted[-1]]
        yield ids, counted


def checkpoint_tokenizer(checkpoint: str | Path) -> Any:
    """Return the tokenizer in a NeMo checkpoint.

    Without a tokenizer, NeMo's data modules download GPT-2's, although the model's replaces it later.
    """
    from nemo.lightning import io
    from nemo.lightning.ckpt_utils import ckpt_to_context_subdir

    return io.load_context(ckpt_to_context_subdir(checkpoint), subpath="model.tokenizer")


@functools.lru_cache(maxsize=2)
def _order(number: int, seed: int, turn: int) -> np.ndarray:
    """Return the order of a pass; drawing it for each sample would take a time that grows with the data."""
    return np.random.default_rng((seed, turn)).permutation(number)


class InPasses(Dataset):
    """Samples that are taken in passes, each in a new order.

    Args:
        number: how many there are.
        samples: how many to take; None: each once, in their own order.
        seed: of the orders.
    """

    def __init__(self, number: int, samples: int | None, seed: int):
        self.number, self.seed, self.random = number, seed, samples is not None
        self.samples = number if samples is None else samples

    def __len__(self) -> int:
        return self.samples

    def place(self, index: int) -> int:
        """Return which of the samples has an index over all passes."""
        turn, place = divmod(int(index), self.number)
        return int(_order(self.number, self.seed, turn)[place]) if self.random else place


class Windows(Dataset):
    """Windows of ``seq_length + 1`` tokens as the batches of NeMo's GPT.

    Args:
        ids: token ids `[n]`.
        seq_length: tokens a sample.
        samples: how many random windows; None: consecutive windows, each token predicted once.
        seed: of the random starts.
        counted: whether each token counts in the loss `[n]`; None: all do.
    """

    def __init__(
        self,
        ids: np.ndarray,
        seq_length: int,
        samples: int | None = None,
        seed: int = 0,
        counted: np.ndarray | None = None,
    ):
        if len(ids) <= seq_length:
            raise ModelOptConfigError(
                f"A text of {len(ids)} tokens is too short for samples of {seq_length} and the next token: pass more "
                "text, or a smaller seq_length."
            )
        self.ids, self.seq_length, self.seed, self.counted = ids, seq_length, seed, counted
        self.random = samples is not None
        self.samples = samples if samples is not None else (len(ids) - 1) // seq_length
        # True where attention is masked. Megatron's local attention requires it; Transformer Engine makes its own.
        self.mask = torch.ones(seq_length, seq_length, dtype=torch.bool).triu(1)[None]

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        s = self.seq_length
        if self.random:
            start = int(np.random.default_rng((self.seed, index)).integers(len(self.ids) - s))
        else:
            start = index * s
        window = torch.from_numpy(self.ids[start : start + s + 1].astype(np.int64))
        return {
            "tokens": window[:-1],
            "labels": window[1:],
            "loss_mask": torch.ones(s) if self.counted is None else torch.from_numpy(self._mask(start)),
            "position_ids": torch.arange(s),
            "attention_mask": self.mask,
        }

    def _mask(self, start: int) -> np.ndarray:
        """Return which tokens a window predicts that count."""
        assert self.counted is not None
        return self.counted[start + 1 : start + self.seq_length + 1].astype(np.float32)


class TokenDataModule(pl.LightningDataModule):
    """Random training windows and consecutive held-out windows over two token files.

    Args:
        folder: holds ``train.npy`` and ``heldout.npy``.
        tokenizer: what the tokens were made with; NeMo reads the vocabulary size from it.
        seq_length: tokens a sample.
        micro_batch_size: samples a rank and pass.
        global_batch_size: samples an optimizer step.
        train_samples: length of the training set.
        seed: of the training windows.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        train_samples: int,
        seed: int = 1234,
    ):
        super().__init__()
        self.folder, self.tokenizer, self.seq_length = str(folder), tokenizer, seq_length
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.train_samples, self.seed = train_samples, seed
        self.init_global_step = 0
        self.data_sampler = MegatronDataSampler(
            seq_len=seq_length, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        )

    def _ids(self, name: str) -> np.ndarray:
        return np.load(Path(self.folder) / f"{name}.npy")

    def _dataset(self, name: str, samples: int | None) -> Dataset:
        return Windows(self._ids(name), self.seq_length, samples, self.seed)

    def _loader(self, ids_name: str, samples: int | None, mode: str) -> DataLoader:
        loader = DataLoader(self._dataset(ids_name, samples), num_workers=0)
        # NeMo's strategy reads the mode to know whether consumed samples count for this loader.
        loader.mode = mode
        return loader

    def train_dataloader(self) -> DataLoader:
        """Return the training windows; NeMo's strategy wraps them in Megatron's sampler."""
        self.init_global_step = self.trainer.global_step if self.trainer else 0
        self.data_sampler.init_global_step = self.init_global_step
        return self._loader("train", self.train_samples, "train")

    def val_dataloader(self) -> DataLoader:
        """Return the held-out windows."""
        return self._loader("heldout", None, "validation")

    def test_dataloader(self) -> DataLoader:
        """Return the held-out windows."""
        return self._loader("heldout", None, "test")

    def state_dict(self) -> dict[str, Any]:
        """Return the number of samples consumed so far, for an intermediate checkpoint."""
        done = self.data_sampler.compute_consumed_samples(self.trainer.global_step - self.init_global_step)
        return {"consumed_samples": done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Skip the samples that an interrupted run has consumed."""
        self.data_sampler.init_consumed_samples = state_dict["consumed_samples"]
        self.data_sampler.prev_consumed_samples = state_dict["consumed_samples"]


class TextDataModule(TokenDataModule):
    """`TokenDataModule` straight over files of texts, encoded with a checkpoint's tokenizer when first needed.

    Args:
        text: training text.
        checkpoint: NeMo checkpoint whose tokenizer encodes it.
        heldout_text: text to validate on; the training text if it is None.
        tokenizer: use it instead of the checkpoint's.
        answer_only_loss: count only the assistant's replies of conversations in the loss.
        **sizes: the sizes, sample count and seed of `TokenDataModule`.
    """

    def __init__(
        self,
        text: str | Path,
        checkpoint: str | Path,
        heldout_text: str | Path | None = None,
        tokenizer: Any = None,
        answer_only_loss: bool = False,
        **sizes,
    ):
        super().__init__("", tokenizer or checkpoint_tokenizer(checkpoint), **sizes)
        self.texts = {"train": str(text), "heldout": str(heldout_text or text)}
        self.answer_only_loss = answer_only_loss
        self.encoded: dict[str, Any] = {}
        self._remarked = False

    def _encode(self, path: str) -> Any:
        if not self.answer_only_loss:
            return encode(path, self.tokenizer), None
        rows = list(counted_rows(path, self.tokenizer, True))
        ids = np.asarray([token for row in rows for token in row[0]], dtype=np.int32)
        return ids, np.asarray([one for row in rows for one in row[1]], dtype=bool)

    def _of(self, name: str) -> Any:
        path = self.texts[name]
        if path not in self.encoded:
            self.encoded[path] = self._encode(path)
        return self.encoded[path]

    def _ids(self, name: str) -> np.ndarray:
        ids = self._of(name)[0]
        if name == "train":
            self._remark(len(ids))
        return ids

    def _dataset(self, name: str, samples: int | None) -> Dataset:
        return Windows(self._ids(name), self.seq_length, samples, self.seed, self._of(name)[1])

    def _remark(self, tokens: int) -> None:
        """Warn once if the samples cover the text several times."""
        times = self.train_samples * self.seq_length / tokens
        if times > _REMARKABLE and not self._remarked:
            screen.warn(
                f"{self.texts['train']} has {tokens:,} tokens: {self.train_samples:,} samples of {self.seq_length} "
                f"tokens go over it {times:,.0f} times."
            )
        self._remarked = True

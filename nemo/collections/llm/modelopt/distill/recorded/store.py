"""Recorded teachers: the teacher's top-k logits for every sample of a training, in memory-mapped files.

A recorded teacher is a folder that NeMo reads like a checkpoint without weights. It holds the teacher's ``context``,
the manifest ``teacher_topk.json``, and in ``topk`` the shards of each data-parallel rank. A shard has four files with
one row per sample: ``keys`` (128-bit digests of the teacher's input), ``entries``, ``values`` and ``rest`` (see
``recorded_topk``).

Samples are found by their tokens, not by their position. So shuffling, other layouts, resumed runs and other batch
sizes find the right rows, and a sample that was not recorded raises an error at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._divergence.recorded_topk import RecordedLogits
from ...errors import ModelOptConfigError

MANIFEST = "teacher_topk.json"
FOLDER = "topk"
_FORMAT = 1
_FILES = ("keys", "entries", "values", "rest")
# Entries of a batch that a teacher's logits depend on.
_INPUTS = ("tokens", "position_ids", "cu_seqlens")
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# NumPy has no bfloat16: the bits are kept.
_BITS = {"float32": np.float32, "bfloat16": np.int16, "float16": np.float16}
_HEAD = 1 << 20


@dataclass(frozen=True)
class Manifest:
    """Facts about a recorded teacher.

    Attributes:
        topk: number of entries recorded for each token.
        temperature: temperature of the logits in ``rest``.
        seq_length: tokens of a sample.
        vocab_size: entries of the teacher's vocabulary, with padding.
        largest_entry: the largest entry that was recorded.
        dtype: type of the teacher's logits.
        samples: number of recorded samples, repeated ones included.
        shards: rows of each shard by the name of its files.
        teacher: digests of the checkpoint's files.
        tokenizer: its size and a digest of its vocabulary.
        data: description of the data.
        format: version of the file format.
    """

    topk: int
    temperature: float
    seq_length: int
    vocab_size: int
    largest_entry: int
    dtype: str
    samples: int
    shards: dict[str, int]
    teacher: dict[str, str]
    tokenizer: dict[str, Any]
    data: str = ""
    format: int = _FORMAT


class Writer:
    """Append samples to shards of one rank."""

    def __init__(self, folder: Path, rank: int, shard_bytes: int = 1 << 30):
        """Store the arguments.

        Args:
            folder: existing folder for the shards.
            rank: data-parallel rank.
            shard_bytes: size from which a new shard is started.
        """
        self._folder, self._rank, self._shard_bytes = folder, rank, shard_bytes
        self._name, self._bytes = "", 0
        self.shards: dict[str, int] = {}
        self.largest_entry = 0
        self.dtype, self.seq_length, self.topk = "float32", 0, 0

    def add(self, keys: np.ndarray, entries: Tensor, values: Tensor, rest: Tensor) -> None:
        """Append samples.

        Args:
            keys: [b, 2], as `sample_keys` returns them.
            entries: [b, s, k].
            values: [b, s, k].
            rest: [b, s].

        Raises:
            ModelOptConfigError: If the samples have different lengths.
        """
        s, k = entries.shape[1:]
        if self.seq_length not in (0, s):
            raise ModelOptConfigError(
                f"Samples have {self.seq_length} and {s} tokens; a recorded teacher needs one length. Let the data "
                "module pad all samples to seq_length."
            )
        self.seq_length, self.topk, self.dtype = s, k, str(values.dtype).removeprefix("torch.")
        bits = values.contiguous().view(torch.int16) if values.dtype == torch.bfloat16 else values
        arrays = (keys, entries.to(torch.int32).cpu().numpy(), bits.cpu().numpy(), rest.float().cpu().numpy())
        self.largest_entry = max(self.largest_entry, int(arrays[1].max()))
        if self._bytes == 0:
            self._name = f"rank-{self._rank:04d}.{len(self.shards):04d}"
            self.shards[self._name] = 0
        for kind, array in zip(_FILES, arrays, strict=True):
            with open(self._folder / f"{self._name}.{kind}", "ab") as file:
                self._bytes += file.write(np.ascontiguousarray(array).tobytes())
        self.shards[self._name] += len(keys)
        if self._bytes > self._shard_bytes:
            self._bytes = 0


class Recording:
    """The files of a recorded teacher, opened for reading; only the keys are held in memory."""

    def __init__(self, path: str | Path):
        """Read the manifest and the keys.

        Args:
            path: folder of the recorded teacher.

        Raises:
            ModelOptConfigError: If the manifest cannot be read, or files are missing or truncated.
        """
        self.path = Path(path)
        self.manifest = read_manifest(path)
        found = self.manifest
        row = {"entries": (found.seq_length, found.topk), "rest": (found.seq_length,)}
        shapes = {"keys": (2,), "values": row["entries"], **row}
        types = {"keys": np.uint64, "entries": np.int32, "values": _BITS[found.dtype], "rest": np.float32}
        self._shards: list[dict[str, np.ndarray]] = []
        for name, rows in found.shards.items():
            files = {kind: self.path / FOLDER / f"{name}.{kind}" for kind in _FILES}
            for kind, file in files.items():
                wanted = rows * int(np.prod(shapes[kind])) * np.dtype(types[kind]).itemsize
                if not file.is_file() or file.stat().st_size != wanted:
                    raise ModelOptConfigError(
                        f"The recorded teacher {str(self.path)!r} is damaged: {file.name} must have {wanted} bytes. "
                        "Record the teacher again."
                    )
            self._shards.append(
                {kind: np.memmap(files[kind], types[kind], "r", shape=(rows, *shapes[kind])) for kind in _FILES}
            )
        keys = np.concatenate([np.asarray(shard["keys"]) for shard in self._shards])
        self._places = [(shard, row) for shard, rows in enumerate(found.shards.values()) for row in range(rows)]
        self._order = np.argsort(keys[:, 0], kind="stable")
        self._keys = keys[self._order]

    def find(self, keys: np.ndarray, device: Any = "cpu") -> RecordedLogits:
        """Return the recorded logits of samples.

        Args:
            keys: [b, 2], as `sample_keys` returns them.
            device: device of the tensors.

        Raises:
            ModelOptConfigError: If a sample was not recorded.
        """
        places = [self._place(key) for key in keys]
        gathered = {
            kind: torch.from_numpy(np.stack([self._shards[shard][kind][row] for shard, row in places]))
            for kind in _FILES[1:]
        }
        values = gathered["values"].view(_TYPES[self.manifest.dtype])
        entries, values, rest = (
            x.to(device, non_blocking=True).transpose(0, 1).contiguous()
            for x in (gathered["entries"].long(), values, gathered["rest"])
        )
        return RecordedLogits(entries, values, rest, self.manifest.temperature)

    def _place(self, key: np.ndarray) -> tuple[int, int]:
        position = int(np.searchsorted(self._keys[:, 0], key[0]))
        while position < len(self._keys) and self._keys[position, 0] == key[0]:
            if self._keys[position, 1] == key[1]:
                return self._places[self._order[position]]
            position += 1
        raise ModelOptConfigError(
            f"A training sample is not among the {self.manifest.samples} samples recorded in {str(self.path)!r}"
            f"{' (' + self.manifest.data + ')' if self.manifest.data else ''}: the data, the tokenizer or the sequence "
            "length differ, or the training is longer. Record the teacher with the settings of this training."
        )


def is_recording(path: Any) -> bool:
    """Return whether a path is a recorded teacher and not a checkpoint."""
    return isinstance(path, (str, os.PathLike)) and (Path(path) / MANIFEST).is_file()


def read_manifest(path: str | Path) -> Manifest:
    """Return the manifest of a recorded teacher.

    Raises:
        ModelOptConfigError: If it cannot be read, or has another format.
    """
    file = Path(path) / MANIFEST
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("format") != _FORMAT:
            raise ModelOptConfigError(f"{file} has format {found.get('format')!r}; this version reads {_FORMAT}.")
        return Manifest(**found)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, ModelOptConfigError):
            raise
        raise ModelOptConfigError(f"{str(file)!r} is not a valid manifest of a recorded teacher: {error}") from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest, the last file of a recorded teacher."""
    (path / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")


def sample_keys(batch: Mapping[str, Any]) -> np.ndarray:
    """Return a 128-bit digest of the teacher's input for each sample, as two integers [b, 2].

    Args:
        batch: ``tokens`` [b, s], and ``position_ids`` [b, s] and ``cu_seqlens`` if they exist.
    """
    arrays = [
        np.ascontiguousarray(batch[name].cpu().numpy(), dtype=np.int64) for name in _INPUTS if _is_tensor(batch, name)
    ]
    digests = []
    for row in zip(*(array.reshape(len(arrays[0]), -1) for array in arrays), strict=True):
        digest = hashlib.blake2b(digest_size=16)
        for part in row:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.tobytes())
        digests.append(np.frombuffer(digest.digest(), dtype=np.uint64))
    return np.stack(digests)


def _is_tensor(batch: Mapping[str, Any], name: str) -> bool:
    return isinstance(batch.get(name), Tensor)


def checkpoint_digests(path: str | Path) -> dict[str, str]:
    """Return the size of each file of a checkpoint's weights and a checksum of its beginning, by name."""
    from nemo.lightning.io.pl import ckpt_to_weights_subdir

    folder = ckpt_to_weights_subdir(path, is_saving=False)
    found = {}
    for file in sorted(entry for entry in Path(folder).iterdir() if entry.is_file()):
        with open(file, "rb") as opened:
            found[file.name] = f"{file.stat().st_size} bytes, checksum {zlib.crc32(opened.read(_HEAD)):08x}"
    return found


def tokenizer_digest(tokenizer: Any) -> dict[str, Any]:
    """Return the size of a tokenizer's vocabulary, and a checksum of its entries if they are accessible."""
    found: dict[str, Any] = {"vocab_size": getattr(tokenizer, "vocab_size", None)}
    vocabulary = getattr(tokenizer, "vocab", None)
    if isinstance(vocabulary, (list, tuple, dict)):
        entries = sorted(vocabulary) if isinstance(vocabulary, dict) else vocabulary
        found["checksum"] = f"{zlib.crc32(repr(list(entries)).encode()):08x}"
    return found

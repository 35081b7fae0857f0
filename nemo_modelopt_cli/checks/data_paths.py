"""Check Megatron's tokenized files and the folder of a chat data set before anything heavy is imported."""

from __future__ import annotations

import argparse
import math
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path

from nemo_modelopt_dropin.preflight import data_files

_FLAG = "--data_paths"
_ENDINGS = (".bin", ".idx")
# Header of an index file: its mark, version, type of the tokens, numbers of sequences and documents.
_HEADER = struct.Struct("<9sQBQQ")
_MARK = b"MMIDIDX\x00\x00"
_TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}
_LENGTH, _OFFSET = struct.Struct("<i"), struct.Struct("<q")


def problems(given: argparse.Namespace) -> list[str]:
    """Return what is wrong with --data_paths and --split of a script.

    Args:
        given: its arguments; ``use_chat_data``, if it has that, turns --data_paths into one folder.
    """
    paths = given.data_paths or []
    found = _split_problems(given.split)
    if getattr(given, "use_chat_data", False):
        validates = getattr(given, "limit_val_batches", 0) > 0
        return found + [one for path in paths[:1] for one in _chat_problems(path, validates)]
    prefixes, wrong = _prefixes(paths)
    return found + wrong + [f"{_FLAG} {one}" for prefix in prefixes for one in _file_problems(prefix)]


def _prefixes(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the paths of a blend without their weights, and what is wrong with its form."""
    weights = [_number(word) for word in paths]
    if all(weight is None for weight in weights):
        return list(paths), []
    prefixes = [word for word, weight in zip(paths, weights, strict=True) if weight is None]
    alternate = len(paths) % 2 == 0 and all((weight is None) is bool(i % 2) for i, weight in enumerate(weights))
    if not alternate:
        return prefixes, [
            f"{_FLAG} {' '.join(paths)}: a blend alternates weights and paths (0.3 first 0.7 second); there are "
            f"{len(paths) - len(prefixes)} weights and {len(prefixes)} paths"
        ]
    wrong = [word for word, weight in zip(paths[::2], weights[::2], strict=True) if not 0 < (weight or 0) < math.inf]
    return prefixes, [f"{_FLAG}: the weights of a blend must be positive, got {', '.join(wrong)}"] if wrong else []


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _file_problems(prefix: str) -> list[str]:
    """Return what is missing or cut off of the two files that a prefix stands for."""
    path = Path(prefix)
    if "://" in prefix:  # object storage
        return []
    if path.is_dir():
        inside = sorted(file.with_suffix("").name for file in path.glob("*.idx"))
        return [f"{prefix} is a folder; pass the common beginning of a .bin and an .idx file{_hint(path, inside)}"]
    files = [Path(f"{prefix}{ending}") for ending in _ENDINGS]
    missing = [str(file) for file in files if not file.is_file()]
    if missing and path.suffix in _ENDINGS and path.is_file():
        return [f"{prefix}: leave {path.suffix} out; the name stands for a .bin and an .idx file"]
    if missing:
        near = sorted(file.with_suffix("").name for file in path.parent.glob(f"{path.name}*.idx"))
        return [f"{prefix}: there is no {' and no '.join(missing)}{_hint(path.parent, near)}"]
    return _index_problems(files[1], files[0])


def _hint(folder: Path, names: list[str]) -> str:
    return f"; did you mean {folder / names[0]}?" if names else ""


def _index_problems(index: Path, tokens: Path) -> list[str]:
    """Return whether an index is no index, or one of the two files is shorter than it must be."""
    try:
        with open(index, "rb") as file:
            mark, version, kind, sequences, documents = _HEADER.unpack(file.read(_HEADER.size))
            if mark != _MARK or version != 1 or kind not in _TOKEN_BYTES:
                return [f"{index} is not an index of Megatron's tokenized files"]
            needed = _HEADER.size + sequences * (_LENGTH.size + _OFFSET.size) + documents * _OFFSET.size
            if index.stat().st_size < needed:
                return [f"{index} is cut off: it has {index.stat().st_size:,} of {needed:,} bytes"]
            if not sequences:
                return [f"{index} has no sequences"]
            file.seek(_HEADER.size + (sequences - 1) * _LENGTH.size)
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            file.seek(_HEADER.size + sequences * _LENGTH.size + (sequences - 1) * _OFFSET.size)
            (offset,) = _OFFSET.unpack(file.read(_OFFSET.size))
    except OSError as error:
        return [f"{index} cannot be read: {error.strerror or error}"]
    except struct.error:
        return [f"{index} is not an index of Megatron's tokenized files"]
    needed, size = offset + length * _TOKEN_BYTES[kind], tokens.stat().st_size
    return [f"{tokens} is cut off: it has {size:,} of {needed:,} bytes"] if size < needed else []


def _chat_problems(path: str, validates: bool) -> list[str]:
    """Return what is wrong with the folder of a chat data set."""
    if not os.path.isdir(path):
        return [f"{_FLAG} {path}: there is no such folder"]
    found = []
    for name in ("training.jsonl", *(["validation.jsonl"] if validates else [])):
        file = Path(path, name)
        wrong = data_files.problem(str(file)) if file.is_file() else f"{file} is missing"
        found += [f"{_FLAG}: {wrong}"] if wrong else []
    return found


def _split_problems(split: str) -> list[str]:
    """Return what is wrong with the shares of training, validation and test samples."""
    shares = [_number(word) for word in re.split(r"[,/;:\s]+", split.strip())]
    legal = len(shares) <= 3 and all(share is not None and 0 <= share < math.inf for share in shares)
    if legal and sum(share or 0 for share in shares) > 0:
        return []
    return [f"--split {split} must be up to three numbers of at least 0, not all 0, such as 99,1,0"]

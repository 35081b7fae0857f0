"""Lazy readers of local files of texts: JSON, JSON lines, Parquet and plain text. Nothing heavy is imported."""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

_JSON = (".json", ".jsonl", ".ndjson")
_TEXT = (".txt", ".text")
_KNOWN = (*_JSON, *_TEXT, ".parquet")
_CHUNK = 1 << 16
# Of a file of token ids, one list a line; whether a longer first line is one is not looked at.
_LONGEST_LINE = 1 << 20


class DataFileError(ValueError):
    """A file that cannot be used; the message says which and why."""


class NoFiles(DataFileError):
    """A name that no file is behind."""


class NoColumn(DataFileError):
    """Rows without the column that was asked for; the message names those that they have."""


def expand(name: str) -> list[Path]:
    """Return the files that a path, folder or glob stands for, in order of their names.

    Args:
        name: The path; a single file may have any ending and is then JSON.

    Raises:
        NoFiles: If there are none.
    """
    path = Path(name)
    if path.is_file():
        return [path]
    is_pattern = any(sign in name for sign in "*?[")
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file()]
    else:
        found = [Path(file) for file in glob.glob(name, recursive=True) if Path(file).is_file()] if is_pattern else []
    files = sorted(file for file in found if _kind(file) in _KNOWN)
    if files:
        return files
    reason = "there is no such file"
    if found:
        reason = f"none of its {len(found)} files ends in one of {list(_KNOWN)}"
    elif path.is_dir():
        reason = "the folder is empty"
    elif is_pattern:
        reason = "the pattern matches no file"
    raise NoFiles(f"{name!r} cannot be read: {reason}")


def rows(files: list[Path], column: str | None, usual: str) -> Iterator[Any]:
    """Yield the rows of files one after the other: the column's values, or the lines of text files.

    Args:
        files: What `expand` returned.
        column: The column asked for, None for the usual one.
        usual: The usual column.

    Raises:
        DataFileError: If a file cannot be read or has no such column.
    """
    for file in files:
        read = _reader(file)
        if read is _text_rows and column is not None:
            raise DataFileError(f"{file} is a text file and has no column {column!r}")
        try:
            yield from read(file, column or usual)
        except DataFileError:
            raise
        except (OSError, EOFError, ValueError) as error:
            # pyarrow's errors are ValueError or OSError, and so is a UnicodeDecodeError.
            raise DataFileError(f"{file} cannot be read: {error}") from error


def problem(name: str, column: str | None = None, usual: str = "text") -> str | None:
    """Return what is wrong with files up to their first row, None where nothing is.

    Args:
        name: what `expand` takes.
        column: the column asked for, None for the usual one.
        usual: the usual column.
    """
    try:
        if not any(True for _ in rows(expand(name), column, usual)):
            return f"{name} is empty"
    except DataFileError as error:
        return str(error)
    return None


def no_column(where: Any, column: str, columns: Iterable[str]) -> NoColumn:
    """Return the error for a missing column."""
    return NoColumn(f'{str(where)!r} has no column "{column}"; its columns are {list(columns)}')


def _kind(file: Path) -> str:
    return (file.with_suffix("") if file.suffix == ".gz" else file).suffix.lower()


def _reader(file: Path) -> Callable[[Path, str], Iterator[Any]]:
    if _kind(file) == ".parquet":
        return _parquet_rows
    return _text_rows if _kind(file) in _TEXT else _json_rows


def _open_text(file: Path) -> IO[str]:
    return gzip.open(file, "rt", encoding="utf-8-sig") if file.suffix == ".gz" else open(file, encoding="utf-8-sig")


def _text_rows(file: Path, _: str) -> Iterator[str]:
    with _open_text(file) as lines:
        yield from lines


def _parquet_rows(file: Path, column: str) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        if column not in table.schema_arrow.names:
            raise no_column(file, column, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=256, columns=[column]):
            yield from batch.column(0).to_pylist()


def _json_rows(file: Path, column: str) -> Iterator[Any]:
    """Yield the column of every object in a JSON-lines file or in a JSON array; plain texts and lists as they are."""
    for index, item in enumerate(_json_items(file)):
        if not isinstance(item, dict):
            yield item
            continue
        if index == 0 and column not in item:
            raise no_column(file, column, item)
        yield item.get(column)


def _json_items(file: Path) -> Iterator[Any]:
    with _open_text(file) as text:
        first = text.read(1)
        while first.isspace():
            first = text.read(1)
    with _open_text(file) as text:
        is_array = first == "[" and not _is_one_of_many(text)
    with _open_text(file) as text:
        if is_array:
            yield from _array_items(text, file)
            return
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataFileError(f"{file} cannot be read: line {number} is not valid JSON ({error})") from error


def _is_one_of_many(text: IO[str]) -> bool:
    """Return whether a file that begins with an array has one on every line: token ids, and not one array of rows."""
    line = next((line for line in iter(lambda: text.readline(_LONGEST_LINE), "") if line.strip()), "")
    try:
        item = json.loads(line)
    except json.JSONDecodeError:
        return False
    return bool(item) and all(isinstance(value, int) for value in item)


def _array_items(text: IO[str], file: Path) -> Iterator[Any]:
    """Yield the items of a JSON array without holding more than a few of them.

    Raises:
        DataFileError: If the array is broken or ends early.
    """
    decoder = json.JSONDecoder()
    buffer = text.read(_CHUNK).lstrip()[1:]
    number = 1
    while not (buffer := buffer.lstrip(" \t\r\n,")).startswith("]"):
        try:
            item, end = decoder.raw_decode(buffer)
        except json.JSONDecodeError as error:
            # The item may go on beyond what was read; doubling keeps long items linear.
            more = text.read(max(_CHUNK, len(buffer)))
            if not more:
                raise DataFileError(
                    f"{file} cannot be read: item {number} of the array is not valid JSON ({error})"
                ) from error
            buffer += more
            continue
        yield item
        buffer, number = buffer[end:], number + 1

"""Read local files of texts lazily: JSON, JSON lines, Parquet and plain text, compressed or not.

Checks and loading use the same readers. Nothing heavy is imported, except pyarrow for Parquet and ``.zst`` files.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import IO, Any

from nemo_modelopt_dropin.preflight import chat_rows
from nemo_modelopt_dropin.preflight.chat_rows import Chat

_JSON = (".json", ".jsonl", ".ndjson")
_TEXT = (".txt", ".text")
_KNOWN = (*_JSON, *_TEXT, ".parquet")
_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_ZSTD = ".zst"
_CHUNK = 1 << 16
# Longest line that is tested for being one of many lists of token ids.
_LONGEST_LINE = 1 << 20


class DataFileError(ValueError):
    """A file cannot be used; the message contains the file and the reason."""


class NoFiles(DataFileError):
    """No file matches a name."""


class NoColumn(DataFileError):
    """Rows lack the requested column; the message lists their columns."""


def expand(name: str) -> list[Path]:
    """Return the files of a path, folder or glob pattern, sorted by name.

    Args:
        name: The path or pattern; a single file with an unknown ending is read as JSON.

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


def rows(files: list[Path], column: str | None, usual: str) -> Iterator[str | list[int] | Chat]:
    """Yield the rows of all files: texts, token ids and conversations. Blank rows are skipped.

    Args:
        files: Result of `expand`.
        column: The column. None selects the usual one or one of `chat_rows.COLUMNS`; text files have lines instead.
        usual: The usual column.

    Raises:
        DataFileError: If a file cannot be read, lacks the column, or has a row that cannot be used. The message
            contains the file and the line, item or row.
    """
    for file in files:
        read = _reader(file)
        if read is _text_rows and column is not None:
            raise DataFileError(f"{file} is a text file and has no column {column!r}")
        place = ""
        try:
            for place, value in read(file, (column,) if column else (usual, *chat_rows.COLUMNS)):
                found = _content(value, f"{file}, {place}")
                if found:
                    yield found
        except DataFileError:
            raise
        except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
            # pyarrow's errors are ValueError or OSError, and so is a UnicodeDecodeError.
            raise DataFileError(f"{file} cannot be read{f' after {place}' if place else ''}: {error}") from error


def problem(name: str, column: str | None = None, usual: str = "text", limit: int | None = None) -> str | None:
    """Return what is wrong with files, None if they can be used.

    Args:
        name: Path or pattern for `expand`.
        column: The column, None for the usual one.
        usual: The usual column.
        limit: Number of rows with content to read; None reads all rows.
    """
    try:
        if not sum(1 for _ in islice(rows(expand(name), column, usual), limit)):
            return f"{name} is empty, or all of its rows are blank"
    except DataFileError as error:
        return str(error)
    return None


def holds_chats(name: str, column: str | None = None) -> bool:
    """Return whether the first row with content is a conversation; False if the files cannot be read.

    Args:
        name: Path or pattern for `expand`.
        column: The column, None for the usual one.
    """
    try:
        return isinstance(next(rows(expand(name), column, "text"), None), Chat)
    except DataFileError:
        return False


def _content(value: Any, place: str) -> str | list[int] | Chat | None:
    """Return a row's text, token ids or conversation; None if there is none.

    Raises:
        DataFileError: If it is something else, or a text that is not valid Unicode.
    """
    if value is None:
        return None
    try:
        row = content(value)
    except chat_rows.ChatError as error:
        raise DataFileError(f"{place}: {error}") from None
    if row is None:
        raise DataFileError(
            f"{place}: contains a value of type {type(value).__name__} instead of a text, a list of token ids or a "
            f"conversation: {str(value)[:60]}"
        )
    wrong = not_unicode(row)
    if wrong:
        raise DataFileError(f"{place}: {wrong}")
    return row if not isinstance(row, str) or row.strip() else None


def content(value: Any) -> str | list[int] | Chat | None:
    """Return a stored value as a text, token ids or a conversation; None if it is none of these.

    Raises:
        ChatError: If it is a list of objects that are not turns of a conversation.
    """
    if isinstance(value, (str, Chat)):
        return value
    if isinstance(value, Turns):
        return chat_rows.chat(value.turns, value.system)
    items = value.tolist() if hasattr(value, "tolist") else value
    if chat_rows.is_chat(items):
        return chat_rows.chat(items)
    if isinstance(items, (list, tuple)) and all(isinstance(i, Integral) and not isinstance(i, bool) for i in items):
        return [int(item) for item in items]
    return None


def not_unicode(row: str | list[int] | Chat) -> str | None:
    """Return what is wrong with a row's characters, None if nothing is.

    JSON may contain halves of surrogate pairs, on which tokenizers fail.
    """
    if isinstance(row, list):
        return None
    for text in (message["content"] for message in row.messages) if isinstance(row, Chat) else (row,):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return (
                f"character {error.start + 1} of the text is {ascii(text[error.start])}, half of a surrogate pair and "
                "not valid Unicode; remove the row or the character"
            )
    return None


def no_column(where: Any, column: str, columns: Iterable[str]) -> NoColumn:
    """Return the error for a missing column."""
    return NoColumn(f'{str(where)!r} has no column "{column}"; its columns are {list(columns)}')


class Turns:
    """The turns of a conversation and its system prompt, as a file stores them in separate columns.

    Args:
        turns: The list of turns.
        system: The prompt, None if there is none.
    """

    def __init__(self, turns: Any, system: Any):
        self.turns, self.system = turns, system


def pick(row: Mapping[str, Any], columns: Iterable[str]) -> Any:
    """Return the value of the first column that the row contains, None if it contains none of them."""
    name = next((name for name in columns if row.get(name) is not None), None)
    value = None if name is None else row[name]
    return Turns(value, row["system"]) if chat_rows.is_chat(value) and "system" in row else value


def _kind(file: Path) -> str:
    packed = file.suffix.lower() in (*_COMPRESSED, _ZSTD)
    return (file.with_suffix("") if packed else file).suffix.lower()


def _reader(file: Path) -> Callable[[Path, tuple[str, ...]], Iterator[tuple[str, Any]]]:
    if _kind(file) == ".parquet":
        return _parquet_rows
    return _text_rows if _kind(file) in _TEXT else _json_rows


def _open_text(file: Path) -> IO[str]:
    ending = file.suffix.lower()
    if ending == _ZSTD:
        import pyarrow  # noqa: ICN001  (unlike zstandard, it raises an error for a truncated file)

        return io.TextIOWrapper(pyarrow.input_stream(str(file), compression="zstd"), encoding="utf-8-sig")
    if ending in _COMPRESSED:
        return _COMPRESSED[ending](file, "rt", encoding="utf-8-sig")
    return open(file, encoding="utf-8-sig")


def _text_rows(file: Path, _: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    with _open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            yield f"line {number}", line


def _parquet_rows(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        wanted = [name for name in columns if name in names]
        if not wanted:
            raise no_column(file, columns[0], names)
        read = [wanted[0], *(["system"] if wanted[0] in chat_rows.COLUMNS and "system" in names else [])]
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=read):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", pick(row, wanted[:1])


def _json_rows(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the column of every object in a JSON-lines file or JSON array; texts and lists are yielded unchanged."""
    first = True
    for place, item in _json_items(file):
        if not isinstance(item, dict):
            yield place, item
        else:
            if first and not any(name in item for name in columns):
                raise no_column(file, columns[0], item)
            yield place, pick(item, columns)
        first = False


def _json_items(file: Path) -> Iterator[tuple[str, Any]]:
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
                item = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataFileError(f"{file} cannot be read: line {number} is not valid JSON ({error})") from error
            yield f"line {number}", item


def _is_one_of_many(text: IO[str]) -> bool:
    """Return whether a file that begins with an array has one array per line, rather than one array of rows."""
    lines = (line for line in iter(lambda: text.readline(_LONGEST_LINE), "") if line.strip())
    try:
        item = json.loads(next(lines, ""))
    except json.JSONDecodeError:
        return False
    ids = bool(item) and all(isinstance(value, int) for value in item)
    return ids or next(lines, "").lstrip().startswith("[")


def _array_items(text: IO[str], file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the items of a JSON array while only a few of them are in memory.

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
            # The item may continue after what was read; doubling the buffer keeps the time linear for long items.
            more = text.read(max(_CHUNK, len(buffer)))
            if not more:
                raise DataFileError(
                    f"{file} cannot be read: item {number} of the array is not valid JSON ({error})"
                ) from error
            buffer += more
            continue
        yield f"item {number} of the array", item
        buffer, number = buffer[end:], number + 1
    if (buffer[1:] + text.read(_CHUNK)).strip():
        raise DataFileError(f"{file} cannot be read: there is text after the end of the array")

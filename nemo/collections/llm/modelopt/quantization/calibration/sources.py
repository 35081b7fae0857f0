"""Read calibration rows from hub datasets, local files, `datasets` objects, iterables and Lightning data modules.

Every source becomes one lazy iterator over rows with content. A row is a text, a list of token ids or a conversation.
The data may be larger than memory, and reading stops when there are enough rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Union

import datasets

from nemo_modelopt_dropin.preflight import chat_rows, data_files

from ...errors import ModelOptConfigError

Row = Union[str, list[int], chat_rows.Chat]  # noqa: UP007

# name -> (arguments of datasets.load_dataset, text column)
HUB_DATASETS: dict[str, tuple[tuple, dict[str, Any], str]] = {
    "wikitext": (("wikitext", "wikitext-103-v1"), {"split": "train"}, "text"),
    "cnn_dailymail": (("cnn_dailymail",), {"name": "3.0.0", "split": "train"}, "article"),
}
DEFAULT_COLUMN = "text"
_COLUMNS = (DEFAULT_COLUMN, *chat_rows.COLUMNS)
# The keys of a data module's batches that may hold the rows, in order of preference.
_BATCH_KEYS = ("tokens", "input_ids", "text")
# The size of the window in which a stream is shuffled: the whole stream may not fit into memory, or may never end.
SHUFFLE_WINDOW = 10_000
_CHUNK = 256


class ReadRows(list):
    """Rows that `batches` returned: they are checked and cut, and are not read again."""


def is_replaced(load: Callable) -> bool:
    """Return whether ``load_dataset`` was replaced, as unit tests do; the replacement then loads local files too."""
    return load is not datasets.load_dataset


def label(data: Any) -> str:
    """Return the name of a dataset for messages: its name or path, or its class."""
    return str(data) if isinstance(data, (str, Path)) else type(data).__name__


def rows(
    data: Any, column: str | None, seed: int | None, load: Callable, chunk: int = _CHUNK, loads_files: bool = False
) -> Iterator[Row]:
    """Yield the rows of a dataset that have content.

    Args:
        data: "cnn_dailymail" or "wikitext"; a JSON, JSON-lines, Parquet or text file, a folder or a glob; a
            ``datasets.Dataset`` or ``IterableDataset``; an iterable of texts, of lists of token ids or of dictionaries;
            or a Lightning data module, whose training batches hold "tokens", "input_ids" or "text".
        column: The column or key of the text, the token ids or the conversation; None uses "text", or else
            "messages" or "conversations".
        seed: Shuffles reproducibly: datasets of known length completely, streams in a window of `SHUFFLE_WINDOW` rows.
            None keeps the order.
        load: ``datasets.load_dataset``, or its replacement.
        chunk: The number of rows of a dataset of known length to read at once.
        loads_files: Read local files with ``load`` too, as stock does.

    Raises:
        ModelOptConfigError: If the data cannot be read, has no such column, or holds values of another type.
    """
    is_file = isinstance(data, (str, Path)) and str(data) not in HUB_DATASETS
    if is_file and loads_files:
        table = load("json", data_files=data, split="train")
        return _contents(_sliced(table, column or DEFAULT_COLUMN, seed, chunk), label(data))
    return _contents(_open(data, column, seed, load, chunk), label(data))


def batches(content: Iterator[Row], batch_size: int, limit: int, max_characters: int) -> Iterator[list[Row]]:
    """Yield the first ``limit`` rows in lists of at most ``batch_size``; longer texts are cut."""
    taken = (row[:max_characters] if isinstance(row, str) else row for row in islice(content, limit))
    while batch := list(islice(taken, batch_size)):
        yield batch


def check(data: Any, column: str | None, limit: int = 1) -> None:
    """Check that data can be used, without loading a model and without consuming an iterator.

    Args:
        data: See `rows`.
        column: See `rows`.
        limit: The number of rows of files and lists to check. Of datasets only the columns are checked.

    Raises:
        ModelOptConfigError: With the data and what is wrong with it.
    """
    if isinstance(data, (str, Path)) and str(data) in HUB_DATASETS:
        return
    if isinstance(data, (list, tuple)) and not data:
        raise ModelOptConfigError("calibration_dataset is an empty list; pass texts or lists of token ids.")
    if isinstance(data, (str, Path, list, tuple)):
        content = _contents(_open(data, column, None, _no_load), label(data))
        if not sum(1 for _ in islice(content, limit)):
            raise ModelOptConfigError(f"calibration_dataset={label(data)!r} has no row with text: all rows are blank.")
        return
    if _is_table(data):
        _table(data, column)
    elif not hasattr(data, "train_dataloader") and not isinstance(data, Iterable):
        raise _unknown(data)


def _open(data: Any, column: str | None, seed: int | None, load: Callable, chunk: int = _CHUNK) -> Iterator[Any]:
    """Yield the rows as they are stored, including empty ones, in the order that the seed determines."""
    if isinstance(data, (str, Path)) and str(data) in HUB_DATASETS:
        arguments, keywords, usual = HUB_DATASETS[str(data)]
        try:
            return _sliced(load(*arguments, **keywords), column or usual, seed, chunk)
        except ConnectionError as error:
            raise ModelOptConfigError(
                f"calibration_dataset={str(data)!r} cannot be fetched from the hub: {error}. Pass the path of a local "
                "file, folder or glob instead."
            ) from error
    if isinstance(data, (str, Path)):
        return _window(_of_files(str(data), column), seed)
    if _is_table(data):
        table, name = _table(data, column)
        if hasattr(table, "__len__"):
            return _sliced(table, name, seed, chunk)
        return _window((row[name] for row in table), seed)
    if hasattr(data, "train_dataloader"):
        return _window(_of_module(data, column), seed)
    if isinstance(data, (list, tuple)):
        return _values((data[index] for index in _order(len(data), seed)), column)
    if isinstance(data, Iterable) and not isinstance(data, (bytes, Mapping)):
        return _window(_values(data, column), seed)
    raise _unknown(data)


def _of_files(name: str, column: str | None) -> Iterator[Any]:
    """Yield the rows of files.

    Raises:
        ModelOptConfigError: If they cannot be read.
    """
    try:
        yield from data_files.rows(data_files.expand(name), column, DEFAULT_COLUMN)
    except data_files.NoColumn as error:
        raise _no_column(error) from error
    except data_files.NoFiles as error:
        raise ModelOptConfigError(
            f"calibration_dataset={error}. Use one of {sorted(HUB_DATASETS)} or the path of a JSON, JSON-lines or "
            'Parquet file with a column "text" (see calibration_column), a text file, a folder or a glob.'
        ) from error
    except data_files.DataFileError as error:
        raise ModelOptConfigError(f"calibration_dataset: {error}.") from error


def _no_column(error: data_files.NoColumn) -> ModelOptConfigError:
    return ModelOptConfigError(f"calibration_dataset: {error}: name one of them with calibration_column.")


def _unknown(data: Any) -> ModelOptConfigError:
    return ModelOptConfigError(
        f"calibration_dataset is a {type(data).__name__}; use one of {sorted(HUB_DATASETS)}, the path of a "
        "file, folder or glob, a datasets.Dataset, an iterable of texts or of lists of token ids, or a Lightning data "
        "module."
    )


def _no_load(*_, **__):
    raise AssertionError("a check loads nothing from the hub")


def _is_table(data: Any) -> bool:
    return hasattr(data, "column_names")


def _table(data: Any, column: str | None) -> tuple[Any, str]:
    """Return a ``datasets`` object and its column; from a dictionary of splits, the training split.

    Raises:
        ModelOptConfigError: If it has no such split or column.
    """
    if isinstance(data, Mapping):
        splits = list(data)
        if "train" not in data and len(splits) != 1:
            raise ModelOptConfigError(f"calibration_dataset has the splits {splits}; pass one of them.")
        data = data["train" if "train" in data else splits[0]]
    names = _COLUMNS if column is None else (column,)
    # The columns of a stream may be unknown before it is read.
    if not isinstance(data.column_names, (list, tuple)):
        return data, names[0]
    name = next((name for name in names if name in data.column_names), None)
    if name is None:
        raise _no_column(data_files.no_column(label(data), names[0], data.column_names))
    return data, name


def _sliced(table: Any, column: str, seed: int | None, chunk: int) -> Iterator[Any]:
    """Yield a column of a dataset of known length, read in chunks."""
    length = len(table)
    if seed is None:
        for start in range(0, length, chunk):
            yield from table[start : min(start + chunk, length)][column]
        return
    order = _order(length, seed)
    while numbers := list(islice(order, chunk)):
        yield from table[numbers][column]


def _values(items: Iterable[Any], column: str | None) -> Iterator[Any]:
    """Yield the texts and token ids of an iterable; from dictionaries, the values of the column."""
    for index, item in enumerate(items):
        if not isinstance(item, Mapping):
            if column is not None:
                raise ModelOptConfigError(
                    f"calibration_column={column!r} needs rows with columns, but calibration_dataset has rows of type "
                    f"{type(item).__name__}; omit calibration_column."
                )
            yield item
            continue
        names = _COLUMNS if column is None else (column,)
        if index == 0 and not any(name in item for name in names):
            raise _no_column(data_files.no_column("an iterable", names[0], item))
        yield data_files.pick(item, names)


def _of_module(module: Any, column: str | None) -> Iterator[Any]:
    """Yield the rows of a Lightning data module's training batches, without the padding at their ends."""
    try:
        for step, arguments in (("prepare_data", ()), ("setup", ("fit",))):
            getattr(module, step, lambda *_: None)(*arguments)
        loader = module.train_dataloader()
    except Exception as error:
        # The user's class may raise any error; many classes need a trainer.
        raise ModelOptConfigError(
            f"calibration_dataset: {type(module).__name__} has no training data without a trainer: "
            f"{type(error).__name__}: {error}"
        ) from error
    keys = _BATCH_KEYS if column is None else (column,)
    for batch in loader:
        parts = batch if isinstance(batch, (list, tuple)) else [batch]
        fields = next((part for part in parts if isinstance(part, Mapping)), None)
        key = None if fields is None else next((key for key in keys if key in fields), None)
        if fields is None or key is None:
            actual = type(batch).__name__ if fields is None else f"one with {sorted(map(str, fields))}"
            raise ModelOptConfigError(
                f"calibration_dataset: the batches of {type(module).__name__} must be dictionaries with one of "
                f"{list(keys)}, but the first is {actual}."
            )
        for row in fields[key]:
            yield row if isinstance(row, str) else _without_padding(data_files.content(row) or row)


def _without_padding(row: Any) -> Any:
    """Return token ids without padding: a run of equal ids at the end is reduced to one."""
    if not isinstance(row, list):
        return row
    end = len(row)
    while end > 1 and row[end - 2] == row[end - 1]:
        end -= 1
    return row[:end]


def _contents(stored: Iterator[Any], name: str) -> Iterator[Row]:
    """Yield the texts, token ids and conversations that are not empty.

    Raises:
        ModelOptConfigError: If a row is none of these, or a text is not valid Unicode.
    """
    for number, value in enumerate(stored, 1):
        if value is None:
            continue
        try:
            row = data_files.content(value)
            wrong = row is not None and data_files.not_unicode(row)
        except chat_rows.ChatError as error:
            raise ModelOptConfigError(f"calibration_dataset={name!r}, row {number}: {error}.") from None
        if row is None:
            raise ModelOptConfigError(
                f"calibration_dataset={name!r} holds a value of type {type(value).__name__}; expected a text, a list "
                f"of token ids or a conversation: {str(value)[:60]}"
            )
        if wrong:
            raise ModelOptConfigError(f"calibration_dataset={name!r}, row {number}: {wrong}.")
        if row.strip() if isinstance(row, str) else row:
            yield row


def _order(length: int, seed: int | None) -> Iterator[int]:
    """Yield the numbers below ``length``, permuted by a seed; memory grows only with the numbers that are used."""
    if seed is None:
        yield from range(length)
        return
    draw = random.Random(seed)
    moved: dict[int, int] = {}
    for index in range(length):
        # Fisher-Yates shuffle; only the swapped positions are stored.
        other = draw.randrange(index, length)
        yield moved.pop(other, other) if other != index else moved.pop(index, index)
        if other != index:
            moved[other] = moved.pop(index, index)


def _window(stream: Iterator[Any], seed: int | None) -> Iterator[Any]:
    """Yield a stream, shuffled by a seed within a moving window."""
    if seed is None:
        yield from stream
        return
    draw = random.Random(seed)
    window = list(islice(stream, SHUFFLE_WINDOW))
    for value in stream:
        place = draw.randrange(len(window))
        window[place], value = value, window[place]
        yield value
    draw.shuffle(window)
    yield from window

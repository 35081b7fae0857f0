"""Where calibration rows come from: hub data sets, local files, `datasets` objects, iterables, Lightning data modules.

Every source becomes one lazy iterator over rows with content, a row being a text, a list of token ids or a
conversation: a data set larger than memory costs no memory, and reading stops when enough rows were taken.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Union

from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo_modelopt_dropin.preflight import chat_rows, data_files

Row = Union[str, list[int], chat_rows.Chat]  # noqa: UP007

# name -> (arguments of datasets.load_dataset, text column)
HUB_DATASETS: dict[str, tuple[tuple, dict[str, Any], str]] = {
    "wikitext": (("wikitext", "wikitext-103-v1"), {"split": "train"}, "text"),
    "cnn_dailymail": (("cnn_dailymail",), {"name": "3.0.0", "split": "train"}, "article"),
}
DEFAULT_COLUMN = "text"
_COLUMNS = (DEFAULT_COLUMN, *chat_rows.COLUMNS)
# What a data module's batches are looked through for, in this order.
_BATCH_KEYS = ("tokens", "input_ids", "text")
# Rows among which a stream is shuffled: the whole of it may not fit into memory, or never end.
SHUFFLE_WINDOW = 10_000
_CHUNK = 256


def label(data: Any) -> str:
    """Return what to call a data set in a message: its name or path, or its class."""
    return str(data) if isinstance(data, (str, Path)) else type(data).__name__


def rows(
    data: Any, column: str | None, seed: int | None, load: Callable, chunk: int = _CHUNK, loads_files: bool = False
) -> Iterator[Row]:
    """Yield the rows of a data set that have content.

    Args:
        data: "cnn_dailymail" or "wikitext"; a JSON, JSON-lines, Parquet or text file, a folder or glob of such; a
            ``datasets.Dataset`` or ``IterableDataset``; an iterable of texts, of lists of token ids or of dictionaries;
            or a Lightning data module, whose training batches hold "tokens", "input_ids" or "text".
        column: Which column or key holds the text, the token ids or the conversation; None takes "text", or else
            "messages" or "conversations".
        seed: Shuffles, the same way each time: data sets of known length as a whole, streams in a window of
            `SHUFFLE_WINDOW` rows. None keeps the order.
        load: ``datasets.load_dataset``, or what replaces it.
        chunk: Rows of a data set of known length to read at once.
        loads_files: Local files are read with ``load`` too, as in stock.

    Raises:
        ModelOptConfigError: If the data cannot be read, has no such column, or holds something else.
    """
    is_file = isinstance(data, (str, Path)) and str(data) not in HUB_DATASETS
    if is_file and loads_files:
        table = load("json", data_files=data, split="train")
        return _contents(_sliced(table, column or DEFAULT_COLUMN, seed, chunk), label(data))
    return _contents(_open(data, column, seed, load, chunk), label(data))


def batches(found: Iterator[Row], batch_size: int, limit: int, max_characters: int) -> Iterator[list[Row]]:
    """Yield lists of at most ``batch_size`` of the first ``limit`` rows; longer texts are cut."""
    taken = (row[:max_characters] if isinstance(row, str) else row for row in islice(found, limit))
    while batch := list(islice(taken, batch_size)):
        yield batch


def check(data: Any, column: str | None, limit: int = 1) -> None:
    """Raise for data that cannot be used, without loading a model and without using an iterator up.

    Args:
        data: see `rows`.
        column: see `rows`.
        limit: how many rows with content of files and lists to look at. Of data sets the columns are looked at.

    Raises:
        ModelOptConfigError: Naming the data and what is wrong with it.
    """
    if isinstance(data, (str, Path)) and str(data) in HUB_DATASETS:
        return
    if isinstance(data, (list, tuple)) and not data:
        raise ModelOptConfigError("calibration_dataset is an empty list; pass texts or lists of token ids.")
    if isinstance(data, (str, Path, list, tuple)):
        found = _contents(_open(data, column, None, _no_load), label(data))
        if not sum(1 for _ in islice(found, limit)):
            raise ModelOptConfigError(f"calibration_dataset={label(data)!r} has no row with text: all rows are blank.")
        return
    if _is_table(data):
        _table(data, column)
    elif not hasattr(data, "train_dataloader") and not isinstance(data, Iterable):
        raise _unknown(data)


def _open(data: Any, column: str | None, seed: int | None, load: Callable, chunk: int = _CHUNK) -> Iterator[Any]:
    """Yield rows as they are stored, empty ones included, in the order that the seed asks for."""
    if isinstance(data, (str, Path)) and str(data) in HUB_DATASETS:
        arguments, keywords, usual = HUB_DATASETS[str(data)]
        try:
            return _sliced(load(*arguments, **keywords), column or usual, seed, chunk)
        except ConnectionError as error:
            raise ModelOptConfigError(
                f"calibration_dataset={str(data)!r} cannot be fetched from the hub: {error}. Give the path of a local "
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
        ModelOptConfigError: Where they cannot be read.
    """
    try:
        yield from data_files.rows(data_files.expand(name), column, DEFAULT_COLUMN)
    except data_files.NoColumn as error:
        raise _no_column(error) from error
    except data_files.NoFiles as error:
        raise ModelOptConfigError(
            f"calibration_dataset={error}. Give one of {sorted(HUB_DATASETS)} or the path of a JSON, JSON-lines or "
            'Parquet file with a column "text" (see calibration_column), a text file, a folder or a glob.'
        ) from error
    except data_files.DataFileError as error:
        raise ModelOptConfigError(f"calibration_dataset: {error}.") from error


def _no_column(error: data_files.NoColumn) -> ModelOptConfigError:
    return ModelOptConfigError(f"calibration_dataset: {error}: name one of them with calibration_column.")


def _unknown(data: Any) -> ModelOptConfigError:
    return ModelOptConfigError(
        f"calibration_dataset is a {type(data).__name__}; give one of {sorted(HUB_DATASETS)}, the path of a "
        "file, folder or glob, a datasets.Dataset, an iterable of texts or of lists of token ids, or a Lightning data "
        "module."
    )


def _no_load(*_, **__):
    raise AssertionError("a check loads nothing from the hub")


def _is_table(data: Any) -> bool:
    return hasattr(data, "column_names")


def _table(data: Any, column: str | None) -> tuple[Any, str]:
    """Return a ``datasets`` object and its column; of a dictionary of splits the training split.

    Raises:
        ModelOptConfigError: If it has no such split or column.
    """
    if isinstance(data, Mapping):
        splits = list(data)
        if "train" not in data and len(splits) != 1:
            raise ModelOptConfigError(f"calibration_dataset has the splits {splits}; give one of them.")
        data = data["train" if "train" in data else splits[0]]
    names = _COLUMNS if column is None else (column,)
    # A stream may not know its columns before it is read.
    if not isinstance(data.column_names, (list, tuple)):
        return data, names[0]
    name = next((name for name in names if name in data.column_names), None)
    if name is None:
        raise _no_column(data_files.no_column(label(data), names[0], data.column_names))
    return data, name


def _sliced(table: Any, column: str, seed: int | None, chunk: int) -> Iterator[Any]:
    """Yield a column of a data set of known length, read in chunks."""
    length = len(table)
    if seed is None:
        for start in range(0, length, chunk):
            yield from table[start : min(start + chunk, length)][column]
        return
    order = _order(length, seed)
    while numbers := list(islice(order, chunk)):
        yield from table[numbers][column]


def _values(items: Iterable[Any], column: str | None) -> Iterator[Any]:
    """Yield texts and token ids of an iterable, out of dictionaries where it has such."""
    for index, item in enumerate(items):
        if not isinstance(item, Mapping):
            if column is not None:
                raise ModelOptConfigError(
                    f"calibration_column={column!r} needs rows with columns, but calibration_dataset has rows of type "
                    f"{type(item).__name__}; leave calibration_column out."
                )
            yield item
            continue
        names = _COLUMNS if column is None else (column,)
        if index == 0 and not any(name in item for name in names):
            raise _no_column(data_files.no_column("an iterable", names[0], item))
        yield data_files.pick(item, names)


def _of_module(module: Any, column: str | None) -> Iterator[Any]:
    """Yield the rows of a Lightning data module's training batches; padding at their ends is cut off."""
    try:
        for step, arguments in (("prepare_data", ()), ("setup", ("fit",))):
            getattr(module, step, lambda *_: None)(*arguments)
        loader = module.train_dataloader()
    except Exception as error:
        # Whatever goes wrong inside of the user's class: many want a trainer.
        raise ModelOptConfigError(
            f"calibration_dataset: {type(module).__name__} gives no training data outside of a trainer: "
            f"{type(error).__name__}: {error}"
        ) from error
    keys = _BATCH_KEYS if column is None else (column,)
    for batch in loader:
        parts = batch if isinstance(batch, (list, tuple)) else [batch]
        fields = next((part for part in parts if isinstance(part, Mapping)), None)
        key = None if fields is None else next((key for key in keys if key in fields), None)
        if fields is None or key is None:
            found = type(batch).__name__ if fields is None else f"one with {sorted(map(str, fields))}"
            raise ModelOptConfigError(
                f"calibration_dataset: the batches of {type(module).__name__} must be dictionaries with one of "
                f"{list(keys)}, but the first is {found}."
            )
        for row in fields[key]:
            yield row if isinstance(row, str) else _without_padding(data_files.content(row) or row)


def _without_padding(row: Any) -> Any:
    """Return token ids with a run of equal ids at the end, which is padding, cut down to one."""
    if not isinstance(row, list):
        return row
    end = len(row)
    while end > 1 and row[end - 2] == row[end - 1]:
        end -= 1
    return row[:end]


def _contents(stored: Iterator[Any], name: str) -> Iterator[Row]:
    """Yield texts, token ids and conversations, without empty rows.

    Raises:
        ModelOptConfigError: For a row that is none of these, or text that is not valid Unicode.
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
                f"calibration_dataset={name!r} holds a value of type {type(value).__name__} where a text or a list of "
                f"token ids (or a conversation) is expected: {str(value)[:60]}"
            )
        if wrong:
            raise ModelOptConfigError(f"calibration_dataset={name!r}, row {number}: {wrong}.")
        if row.strip() if isinstance(row, str) else row:
            yield row


def _order(length: int, seed: int | None) -> Iterator[int]:
    """Yield the numbers below ``length``, permuted by a seed; memory grows with the numbers taken only."""
    if seed is None:
        yield from range(length)
        return
    draw = random.Random(seed)
    moved: dict[int, int] = {}
    for index in range(length):
        # Fisher-Yates; only the places that were swapped are stored.
        other = draw.randrange(index, length)
        yield moved.pop(other, other) if other != index else moved.pop(index, index)
        if other != index:
            moved[other] = moved.pop(index, index)


def _window(found: Iterator[Any], seed: int | None) -> Iterator[Any]:
    """Yield a stream, shuffled by a seed in a window that moves along it."""
    if seed is None:
        yield from found
        return
    draw = random.Random(seed)
    window = list(islice(found, SHUFFLE_WINDOW))
    for value in found:
        place = draw.randrange(len(window))
        window[place], value = value, window[place]
        yield value
    draw.shuffle(window)
    yield from window

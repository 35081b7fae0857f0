"""Write the tensors of a Hugging Face checkpoint into files of limited size.

The files are planned from names and shapes, so they are the same in every layout of ranks. Each file is written by the
rank that holds its first parameter: pipeline stages write at the same time.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nemo.utils.get_rank import is_global_rank_zero

from nemo_modelopt_dropin.console import screen

from ... import _parallel, _staging
from . import parts, safetensors_stream
from .hf_names import Names, Rule
from .layouts.layer import Layer

# Tensors that transformers keeps in fp32.
_FP32 = (".e_score_correction_bias",)
Formats = dict[str, tuple[str, dict[str, Any]]]
# Name, values and the dtype in which they are written.
Stored = tuple[str, torch.Tensor, torch.dtype]


@dataclass
class Shard:
    """One file.

    Attributes:
        rules: What it contains.
        rank: The rank that writes it.
        bytes: Its size, estimated.
    """

    rules: list[Rule] = field(default_factory=list)
    rank: int = 0
    bytes: float = 0.0


def planned(names: Names, entries: dict[str, parts.Entry], dtype: torch.dtype, limit: int) -> list[Shard]:
    """Return the files of a checkpoint.

    Args:
        names: The rules of the model.
        entries: Its parameters.
        dtype: The checkpoint's dtype.
        limit: The largest size of a file in bytes; a larger tensor has a file of its own.
    """
    shards: list[Shard] = []
    for rule in names.rules:
        size = _size(names, rule, entries, dtype)
        if not shards or shards[-1].bytes + size > limit:
            shards.append(Shard(rank=entries[rule.sources[0]].ranks[0]))
        shards[-1].rules.append(rule)
        shards[-1].bytes += size
    return shards


def _size(names: Names, rule: Rule, entries: dict[str, parts.Entry], dtype: torch.dtype) -> float:
    """Return an upper bound of the size of a rule's tensors in bytes."""
    numbers = sum(math.prod(names.shapes[name]) for name in rule.targets)
    algorithm = entries[rule.sources[0]].algorithm
    if algorithm is None:
        return numbers * dtype.itemsize
    # Blocks of at least 16 weights have scales of up to two bytes, larger blocks and rows of four.
    return numbers * (0.75 if "4" in algorithm.partition("A")[0] else 1.125) + 64 * len(rule.targets)


class Writer:
    """Write the shards of a model, one parameter at a time.

    Attributes:
        formats: Format and facts of each quantized layer that this rank wrote, by name.
    """

    def __init__(self, names: Names, directory: parts.Directory, layout: Any, dtype: torch.dtype):
        """Store the settings.

        Args:
            names: The rules of the model.
            directory: Where its parameters are.
            layout: A module of `layouts`.
            dtype: The checkpoint's dtype.
        """
        self._names, self._directory, self._layout, self._dtype = names, directory, layout, dtype
        self._rank = torch.distributed.get_rank() if _parallel.is_distributed() else 0
        self._error: Exception | None = None
        self._files: dict[str, str] = {}
        self._bytes = 0
        self.formats: Formats = {}

    def write(self, folder: Path, limit: int, extra: dict[int, dict[str, torch.Tensor]]) -> None:
        """Write all files and the index; all ranks must call.

        Args:
            folder: The checkpoint.
            limit: The largest size of a file in bytes.
            extra: Further tensors by the number of the layer they are stored with.

        Raises:
            Exception: The first error of this rank.
            ExportError: If another rank could not write.
        """
        folder.mkdir(parents=True, exist_ok=True)
        shards = planned(self._names, self._directory.entries, self._dtype, limit)
        # After an error this rank still receives and sends, because others would wait for it.
        with _staging.fail_together("Writing the weights"):
            total = sum(len(shard.rules) for shard in shards)
            with screen.bar(total=total, desc="Writing the weights", unit="tensor", delay=5.0) as bar:
                for number, shard in enumerate(shards, 1):
                    name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                    self._write_shard(shard, folder / (name if len(shards) > 1 else "model.safetensors"), extra, bar)
            if self._error is not None:
                raise self._error
        self._write_index(folder, len(shards))

    def _write_shard(self, shard: Shard, path: Path, extra: dict[int, dict[str, torch.Tensor]], bar: Any) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_Kept(self))
            own = self._rank == shard.rank
            file = stack.enter_context(self._opened(shard, path, extra)) if own and self._error is None else None
            for rule in shard.rules:
                found = [self._directory.send(name, shard.rank) for name in rule.sources]
                bar.update()
                if file is None or self._error is not None:
                    continue
                with _Kept(self):
                    self._add(file, rule, found, extra)
                del found
            if file is not None and self._error is None:
                self._files |= dict.fromkeys(file.names, path.name)
                self._bytes += file.bytes

    def _opened(self, shard: Shard, path: Path, extra: dict[int, dict[str, torch.Tensor]]) -> safetensors_stream.Writer:
        modules = [name.removesuffix(".weight") for rule in shard.rules for name in rule.targets]
        names = [f"{module}.{leaf}" for module in modules for leaf in ("weight", *self._layout.LEAVES)]
        return safetensors_stream.Writer(path, names + [name for tensors in extra.values() for name in tensors])

    def _add(
        self, file: safetensors_stream.Writer, rule: Rule, found: list[Any], extra: dict[int, dict[str, torch.Tensor]]
    ) -> None:
        """Write the tensors of a rule into a file."""
        for name, value, dtype in self._stored(rule, found):
            file.add(name, value, dtype)
        if rule.layer is not None and _is_attention(rule):
            for name, value in extra.get(rule.layer, {}).items():
                file.add(name, value)

    def _stored(self, rule: Rule, found: list[Any]) -> Iterator[Stored]:
        """Return the tensors of a rule with the dtypes in which they are stored, one after the other.

        Args:
            rule: The rule.
            found: The parts of each of its parameters.
        """
        entries = [self._directory.entries[name] for name in rule.sources]
        values = [parts.joined(entry, one) for entry, one in zip(entries, found, strict=True)]
        if not any(isinstance(value, Layer) for value in values):
            return self._plain(rule, values)
        return self._quantized(rule, values[0], entries[0].shape)

    def _plain(self, rule: Rule, values: list[torch.Tensor]) -> Iterator[Stored]:
        for name, value in zip(rule.targets, rule.apply(values), strict=True):
            dtype = self._dtype if value.is_floating_point() and not name.endswith(_FP32) else value.dtype
            yield name, value, dtype

    def _quantized(self, rule: Rule, layer: Layer, shape: tuple[int, ...]) -> Iterator[Stored]:
        for name, index in zip(rule.targets, self._names.rows(rule, shape), strict=True):
            module = name.removesuffix(".weight")
            all_rows = len(index) == shape[0] and torch.equal(index, torch.arange(shape[0]))
            rows = layer if all_rows else layer.rows(index)
            self.formats[module] = rows.format
            for leaf, value in self._layout.tensors(rows, self._dtype).items():
                yield f"{module}.{leaf}", value, value.dtype

    def _write_index(self, folder: Path, count: int) -> None:
        found = _parallel.gather_objects((self._files, self._bytes))
        with _staging.fail_together("Writing the index"):
            if is_global_rank_zero() and count > 1:
                weight_map = {name: file for files, _ in found for name, file in files.items()}
                index = {
                    "metadata": {"total_size": sum(size for _, size in found)},
                    "weight_map": dict(sorted(weight_map.items())),
                }
                (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


class _Kept:
    """Keep the first error of a writer instead of raising it."""

    def __init__(self, writer: Writer):
        self._writer = writer

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> bool:
        if isinstance(error, Exception):
            self._writer._error = self._writer._error or error
            return True
        return False


def _is_attention(rule: Rule) -> bool:
    return rule.sources[0].endswith(".self_attention.linear_proj.weight")

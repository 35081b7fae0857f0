"""Large tensors of a checkpoint are read in pieces: the values that PyTorch reads, without a second copy in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import checkpoint

from nemo_modelopt_dropin.cpu_backend import pieces
from test_code.support import tiny

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")]

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64]


@pytest.fixture
def reader(monkeypatch):
    """Let PyTorch's reader read in pieces, and return a function that sets their bytes."""
    read = getattr(checkpoint.FileSystemReader.read_data, "__wrapped__", checkpoint.FileSystemReader.read_data)
    monkeypatch.setattr(checkpoint.FileSystemReader, "read_data", pieces.reading(read))
    return lambda size: monkeypatch.setattr(pieces, "PIECE", size)


def save(folder, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint.save(tensors, storage_writer=checkpoint.FileSystemWriter(folder), no_dist=True)


def load(folder, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    checkpoint.load(targets, storage_reader=checkpoint.FileSystemReader(folder), no_dist=True)
    return targets


def numbers(shape, dtype: torch.dtype) -> torch.Tensor:
    found = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 8
    return found.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (5, 3), (4, 6, 3), (), (0, 3), (3, 0)], ids=str)
def test_values_are_those_that_were_saved(reader, tmp_path, shape, dtype):
    # Of an odd length, so that what follows in the file begins at an odd byte.
    first, value = numbers((3,), torch.float8_e4m3fn), numbers(shape, dtype)
    save(tmp_path, {"a": first, "b": value, "object": [1, 2]})
    reader(8)
    found = load(tmp_path, {"a": torch.zeros_like(first), "b": torch.zeros_like(value), "object": None})
    assert found["object"] == [1, 2]
    for name, expected in (("a", first), ("b", value)):
        assert torch.equal(found[name].float(), expected.float()), name


def test_other_layouts_are_left_to_pytorch(reader, tmp_path):
    value = numbers((6, 4), torch.float32)
    stored = {"transposed": value.t(), "part": value[2:4], "columns": value[:, 1:3]}
    save(tmp_path, stored)
    reader(8)
    found = load(tmp_path, {name: torch.zeros(one.shape) for name, one in stored.items()})
    assert all(torch.equal(found[name], one) for name, one in stored.items())


def test_values_are_converted_as_they_are_read(reader, tmp_path):
    value = numbers((9, 5), torch.bfloat16)
    save(tmp_path, {"a": value})
    reader(16)
    assert torch.equal(load(tmp_path, {"a": torch.zeros(9, 5)})["a"], value.float())


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_part_of_a_tensor_is_read(data):
    import io
    from types import SimpleNamespace

    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    stored = numbers(shape, torch.bfloat16)
    offsets = [data.draw(st.integers(0, size - 1)) for size in shape]
    lengths = [data.draw(st.integers(1, size - offset)) for size, offset in zip(shape, offsets, strict=True)]
    part = stored[tuple(slice(a, a + n) for a, n in zip(offsets, lengths, strict=True))]
    stream = io.BytesIO(b"odd" + stored.view(torch.uint8).numpy().tobytes())
    target = torch.zeros(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", data.draw(st.integers(1, 64)))
        pieces._copy(stream, 3, stored, SimpleNamespace(storage_offsets=offsets, lengths=lengths), target)
    assert torch.equal(target, part.float())


def test_a_file_that_ends_early_is_named(reader, tmp_path):
    save(tmp_path, {"a": numbers((64, 64), torch.float32)})
    reader(64)
    (file,) = tmp_path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    # The table of contents of a tensor is at its end.
    with pytest.raises(checkpoint.CheckpointException, match="failed finding central directory|ends early"):
        load(tmp_path, {"a": torch.zeros(64, 64)})


def test_no_second_copy_is_in_memory(reader, tmp_path):
    value = numbers((4096, 1024), torch.bfloat16)
    save(tmp_path, {"a": value})
    target = {"a": torch.zeros(4096, 1024)}
    whole = tiny.peak_bytes(lambda: load(tmp_path, target))
    reader(1 << 18)
    assert tiny.peak_bytes(lambda: load(tmp_path, target)) < 1.2 * (1 << 18) < value.nbytes <= whole
    assert torch.equal(target["a"], value.float())


def resharded(folder: str) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Save a tensor of which each rank has some rows, and load some of its columns on each.

    Returns:
        What was loaded, what it should be, and whether it was read in pieces.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    tiny.init_parallel(tp=2)
    rank = torch.distributed.get_rank()
    whole, copied = numbers((8, 6), torch.bfloat16), []
    rows = whole[4 * rank : 4 * rank + 4].contiguous()
    dist_checkpointing.save({"w": ShardedTensor.from_rank_offsets("w", rows, (0, rank, 2))}, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", 12)
        copy = pieces._copy
        patch.setattr(pieces, "_copy", lambda *given: copied.append(given) or copy(*given))
        columns = ShardedTensor.from_rank_offsets("w", torch.zeros(8, 3), (1, rank, 2))
        found = dist_checkpointing.load({"w": columns}, folder)["w"]
    return found, whole[:, 3 * rank : 3 * rank + 3].float(), len(copied) == 2


def test_ranks_read_their_part_of_what_others_saved(ranks, tmp_path):
    (tmp_path / "saved").mkdir()
    for found, expected, in_pieces in ranks(2).run(resharded, str(tmp_path / "saved")):
        assert torch.equal(found.float(), expected) and in_pieces

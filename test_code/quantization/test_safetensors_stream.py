"""Files that are written one tensor at a time are read by safetensors, whatever the sizes and dtypes."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from test_code.support import allocations

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.float8_e4m3fn, torch.bool)


@pytest.fixture(scope="module")
def writer():
    from nemo.collections.llm.modelopt.quantization.export import safetensors_stream

    return safetensors_stream.Writer


def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(dtype)


def test_tensors_of_all_dtypes_and_odd_sizes_are_read(writer, tmp_path):
    # Sizes of one, of odd bytes on either side of what is kept to the end, and of a large tensor.
    shapes = [(), (3,), (5, 7), (257, 263), (512, 256)]
    expected = {f"{dtype}.{len(shape)}.{shape}": values(shape, dtype) for shape in shapes for dtype in DTYPES}
    with writer(tmp_path / "a.safetensors", list(expected)) as file:
        for name, value in expected.items():
            file.add(name, value)
    assert file.names == list(expected)
    assert file.bytes == sum(value.numel() * value.element_size() for value in expected.values())
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert torch.equal(found[name].view(torch.uint8) if value.dim() else found[name].float(),
                           value.view(torch.uint8) if value.dim() else value.float()), name  # fmt: skip
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_is_converted_in_pieces(writer, tmp_path, dtype, transposed):
    value = torch.randn(10_240, 1000)
    value = value.T if transposed else value
    expected = value.to(dtype)
    with writer(tmp_path / "a.safetensors", ["a", "odd"]) as file, allocations.Allocated() as allocated:
        file.add("a", value, dtype)
        file.add("odd", value[0, :3], dtype)
    assert file.bytes == (value.numel() + 3) * dtype.itemsize
    found = load_file(tmp_path / "a.safetensors")
    assert found["a"].dtype == dtype
    assert torch.equal(found["a"], expected) and torch.equal(found["odd"], expected[0, :3])
    if not transposed:  # safetensors files have rows, so these are copied
        assert allocated.peak < value.nbytes / 4


def test_a_file_has_the_permissions_of_the_umask(writer, tmp_path):
    mask = os.umask(0o027)
    try:
        with writer(tmp_path / "a.safetensors", ["a"]) as file:
            file.add("a", torch.ones(2))
    finally:
        os.umask(mask)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_header_that_is_too_long_is_an_error(writer, tmp_path):
    with (
        pytest.raises(ValueError, match="the header takes .* bytes, .* are reserved"),
        writer(tmp_path / "a.safetensors", []) as file,
    ):
        for number in range(9):
            file.add(f"a tensor that was not announced {number}", torch.ones(2))

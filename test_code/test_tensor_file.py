"""Values with tensors on disk without pickle: what is read equals what was written, and nothing read runs code."""

from __future__ import annotations

import json
import os
import stat

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo.collections.llm.modelopt import tensor_file
from nemo.collections.llm.modelopt.errors import ModelOptConfigError

_KEYS = st.one_of(st.text(max_size=5), st.integers(), st.sampled_from(["__tuple__", "__items__", "__tensor__"]))
_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(_KEYS, inner, max_size=3),
    ),
    max_leaves=8,
)


# Each example writes a file, which takes longer than the usual deadline on a busy machine.
@settings(deadline=None)
@given(value=_VALUES)
def test_structures_come_back_equal_with_their_types(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("file") / "value"
    tensor_file.save(path, value)
    assert repr(tensor_file.load(path)) == repr(value)


def test_tensors_and_dtypes_come_back_bit_for_bit(tmp_path):
    base = torch.randn(4, 6)
    value = {
        "plain": base,
        "view": base.t(),  # shares its memory
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.float64)),
        "codes": torch.tensor([1, -1], dtype=torch.int8),
        "block": (slice(None, 3), ..., slice(1, 8, 2)),
        -1: (torch.float8_e4m3fn, torch.Size([2, 3]), np.float32(0.5)),
    }
    tensor_file.save(tmp_path / "file", value)
    found = tensor_file.load(tmp_path / "file")
    for name in ("plain", "view", "scalar", "empty", "parameter", "codes"):
        assert torch.equal(found[name], value[name]) and found[name].dtype == value[name].dtype
    assert found["block"] == value["block"]
    assert found[-1] == (torch.float8_e4m3fn, (2, 3), 0.5)


def test_files_whose_header_has_the_length_128_are_read(tmp_path):
    # The length of the header comes first, and 128 is the first byte of a pickle.
    path, found = tmp_path / "value", set[int]()
    for count in range(1, 40):
        value = {"x": [torch.zeros(1)] * count}
        tensor_file.save(path, value)
        found.add(path.read_bytes()[0])
        assert len(tensor_file.load(path)["x"]) == count
    assert 0x80 in found


def test_what_only_a_pickle_could_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match="a function cannot be stored without a pickle"):
        tensor_file.save(tmp_path / "file", {"hook": lambda: None})
    assert list(tmp_path.iterdir()) == []


class _Planted:
    def __reduce__(self):
        return os.mkdir, (_Planted.path,)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_is_not_read(tmp_path, old_format):
    _Planted.path = str(tmp_path / "ran")
    torch.save(_Planted(), tmp_path / "file", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ModelOptConfigError, match="file is a pickle .* reading it can run any code"):
        tensor_file.load(tmp_path / "file")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("structure", ["{", '{"__dtype__": "load"}', '{"__tensor__": "no"}', '{"__items__": 3}', None])
def test_a_damaged_file_is_named(tmp_path, structure):
    from safetensors.torch import save_file

    if structure is None:
        (tmp_path / "file").write_bytes(b"\0" * 20)
    else:
        save_file({"structure": torch.frombuffer(bytearray(structure.encode()), dtype=torch.uint8)}, tmp_path / "file")
    with pytest.raises(ModelOptConfigError, match=r"file cannot be read \(\w+: "):
        tensor_file.load(tmp_path / "file")


def test_files_have_the_users_permissions(tmp_path):
    (tmp_path / "other").write_text(json.dumps({}))
    tensor_file.save(tmp_path / "file", {"a": torch.ones(1)})
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)

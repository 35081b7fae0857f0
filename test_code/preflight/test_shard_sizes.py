"""Sizes of weight files, as users write them."""

from __future__ import annotations

import pytest

from nemo_modelopt_dropin.preflight import shard_sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("4GiB", 2**32), ("1.5kB", 1500), ("7B", 7), (" 1TiB ", 2**40)],
)
def test_parse(text, size):
    assert shard_sizes.parse(text) == size
    assert shard_sizes.problem("max_shard_size", text) == []


@pytest.mark.parametrize("value", ["5", "", "GB", "-5GB", "0GB", "0.5B", "5 iB", "5GB of it", 5, None, True])
def test_no_size(value):
    assert shard_sizes.problem("max_shard_size", value) == [
        f"max_shard_size {value} is not a size of a file; use a number and a unit, such as '5GB', '500MB' or '4GiB'"
    ]

"""The benchmarks run, compare like with like, and write what they found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def ptq(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "benchmarks.ptq", raising=False)
    from benchmarks import ptq

    return ptq


def test_ptq_benchmark(ptq, ranks, stock_ranks, tmp_path):
    pools = {"stock": stock_ranks(1), "ours": ranks(1), "ours x 2": ranks(2)}
    result = ptq.measure(pools, tmp_path, ptq.QUICK, 1, "fp8")
    ptq.write(result, tmp_path / "results")
    rows = json.loads((tmp_path / "results" / "ptq.json").read_text())["rows"]
    # Stock pads; two ranks share what one does.
    assert rows["stock"]["positions computed"] == 16 * 64 >= rows["stock"]["real tokens"] > 0
    assert rows["ours x 2"]["real tokens"] == rows["ours"]["real tokens"] >= rows["stock"]["real tokens"]
    assert all(row["seconds"]["best"] > 0 and row["peak MiB"] >= 0 for row in rows.values())
    text = (tmp_path / "results" / "ptq.txt").read_text()
    assert all(name in text for name in (*rows, *result["ratios"])) and "target" in text
    assert (tmp_path / "results" / "ptq.png").read_bytes().startswith(b"\x89PNG")

"""Fixtures of the tests on Transformer Engine's layer specs: ranks, and the same model in both specs."""

from __future__ import annotations

import importlib.util

import pytest

from test_code.support import devices
from test_code.te_on_cpu import jobs

# These tests run on the CPU on every machine.
devices.prepare()


@pytest.fixture(scope="session", autouse=True)
def transformer_engine():
    """Fail with the command to use if these tests were started without the package."""
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.fail("transformer_engine is not importable: run these tests with `make test-te`.")


@pytest.fixture(scope="session")
def ranks_factory(tmp_path_factory):
    """Return pools of live ranks, as the suite's own fixture does; this process itself need not import NeMo."""
    from test_code.support.ranks import RankPool

    pools: dict[int, RankPool] = {}

    def get(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size, tmp_path_factory.mktemp(f"te{world_size}-"))
        return pools[world_size]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture
def ranks(ranks_factory):
    return ranks_factory


@pytest.fixture(scope="session")
def llama(ranks_factory, tmp_path_factory):
    """Return the checkpoints of one Llama by spec, and what `jobs.make_pair` returned."""
    folder = tmp_path_factory.mktemp("llama")
    made = ranks_factory(1).run(jobs.make_pair, str(folder), llama=True)[0]
    return {name: str(folder / name) for name in jobs.SPECS}, made


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Return the settings of a calibration on a few texts."""
    import json

    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    words = ["the model learns a scale", "one head forgets two batches and keeps its weights", "a rank", "layers"]
    path.write_text("\n".join(json.dumps({"text": " ".join(words[i % 4 :]) + f" {i} times."}) for i in range(24)))
    return {"calibration_dataset": str(path), "calibration_dataset_size": 8}

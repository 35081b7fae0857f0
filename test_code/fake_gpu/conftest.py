"""Fixtures of the tests on the fake GPU: a process that has it."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def gpu(tmp_path_factory):
    """Return a function that runs a job in the process with the fake GPU: ``gpu(jobs.function, argument)``."""
    from test_code.fake_gpu import device
    from test_code.support.ranks import RankPool

    if not device.AVAILABLE:
        pytest.skip("this PyTorch has no devices that are written in Python")
    pool = RankPool(1, tmp_path_factory.mktemp("fake_gpu-"), set_up=device.install)
    yield lambda job, *args, **kwargs: pool.run(job, *args, **kwargs)[0]
    pool.close()

"""The CPU backend: real NeMo training, optimizers, layouts and checkpoints on gloo ranks; and the pool of ranks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nemo_modelopt_dropin import cpu_backend as backend_module
from test_code.support import jobs_backend as jobs
from test_code.support.ranks import RankError, RankPool

# Layouts reorder fp32 sums: 4 steps of Adam at lr 1e-3 keep the losses together to this.
LAYOUT_TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def start(ranks_factory, tmp_path_factory):
    """A checkpoint from one rank that every layout starts from, and the losses one rank gets from there."""
    path = tmp_path_factory.mktemp("backend") / "start"
    ranks_factory(1).run(jobs.train, steps=2, save_to=str(path))
    losses = ranks_factory(1).run(jobs.train, restore=str(path))[0]
    return str(path), losses


LAYOUTS = {
    "dp2": {},
    "dp2, distributed optimizer": {"distributed": True},
    "tp2": {"tp": 2},
    "tp2 sp": {"tp": 2, "sp": True},
    "tp2, distributed optimizer": {"tp": 2, "distributed": True},
    "pp2": {"pp": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_trains_as_one_rank(ranks, start, layout):
    path, expected = start
    for losses in ranks(2).run(jobs.train, restore=path, **layout):
        assert losses == pytest.approx(expected, abs=LAYOUT_TOLERANCE)
    assert expected[0] != pytest.approx(expected[-1], abs=1e-3), "the training must move the loss"


def test_clipping_changes_the_training(ranks, start):
    """The gradient norm is above one at the start, so clipping at 0.1 must show in SGD-like small steps."""
    path, _ = start
    norms = ranks(2).run(jobs.clipped_norms, restore=path, tp=2)
    for before, after in norms:
        assert before > 0.1
        assert after == pytest.approx(0.1, rel=1e-4)


def test_checkpoints_move_between_layouts(ranks, start, tmp_path):
    """Saved at TP=2 with the distributed optimizer, loaded at PP=2 and on one rank: the same loss curve."""
    path, _ = start
    saved = str(tmp_path / "tp2")
    ranks(2).run(jobs.train, restore=path, save_to=saved, tp=2, distributed=True)
    one = ranks(1).run(jobs.train, restore=saved)[0]
    two = ranks(2).run(jobs.train, restore=saved, pp=2)[0]
    assert two == pytest.approx(one, abs=LAYOUT_TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hugging_face_weights_go_through_nemo_and_back(ranks, tmp_path, dtype):
    """Norms included, which NeMo's converters lose without Transformer Engine: not one bit differs."""
    [(count, differing)] = ranks(1).run(jobs.through_nemo_and_back, str(tmp_path), dtype)
    assert count == 21
    assert differing == {}


def test_enable_refuses_where_cuda_is_available(monkeypatch):
    monkeypatch.setattr(backend_module, "_state", {"enabled": False, "mode": None})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(backend_module.CpuBackendError, match="machine with CUDA.*CUDA_VISIBLE_DEVICES"):
        backend_module.enable()


def test_nothing_is_patched_by_importing():
    script = (
        "import torch; before = (torch.cuda.Stream, torch.Tensor.cuda, torch.distributed.all_gather_into_tensor)\n"
        "from nemo_modelopt_dropin import cpu_backend\n"
        "assert before == (torch.cuda.Stream, torch.Tensor.cuda, torch.distributed.all_gather_into_tensor)\n"
        "assert not cpu_backend.is_enabled()\n"
        "assert not torch.overrides._get_current_function_mode_stack()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_enable_twice_is_enable_once(cpu_backend):
    before = (torch.cuda.Stream, torch.Tensor.cuda)
    cpu_backend.enable()
    assert (torch.cuda.Stream, torch.Tensor.cuda) == before
    assert len(torch.overrides._get_current_function_mode_stack()) == 1


def test_devices_are_read_as_the_cpu(cpu_backend):
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2, device=0, pin_memory=True).device.type == "cpu"
    assert torch.ones(2).to("cuda", non_blocking=True).device.type == "cpu"
    assert torch.ones(2).to(torch.bfloat16).dtype == torch.bfloat16
    assert torch.ones(2).cuda().sum() == 2
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"


def test_tensor_types_go_round(cpu_backend):
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).half().type(torch.ones(1).type()).dtype == torch.float32


def test_pool_returns_values_in_order_of_rank(ranks):
    assert ranks(2).run(jobs.rank_and_sum, 3) == [(0, 7), (1, 7)]


def test_pool_shows_the_traceback_of_the_rank_that_failed_and_recovers(tmp_path):
    pool = RankPool(2, tmp_path)
    with pytest.raises(RankError, match="(?s)rank 0: no answer.*rank 1: Traceback.*rank 1 fails on purpose"):
        pool.run(jobs.fail_on, 1)
    assert pool.run(jobs.rank_and_sum, 1) == [(0, 3), (1, 3)]
    with pytest.raises(RankError, match=r"(?s)rank 0: finished.*rank 1: no answer \(limit 2 s\).*in hang_on"):
        pool.run(jobs.hang_on, 1, timeout=2)
    pool.close()

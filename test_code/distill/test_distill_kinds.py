"""Students and teachers of other kinds: mixtures of experts, adapters."""

from __future__ import annotations

import pytest

from test_code.support import jobs_distill, jobs_distill_kinds


def saved_keys(path):
    """Return the names of the tensors in a distributed checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader

    return set(FileSystemReader(path / "weights").read_metadata().state_dict_metadata)


def test_experts_learn_from_experts(ranks, tmp_path):
    with_balance, without = ranks(1).run(jobs_distill_kinds.experts, str(tmp_path / "teacher"))[0]
    for losses, steps, _ in (with_balance, without):
        assert len(losses) == 3 and all(loss > 0 for loss in losses)
        assert all(step["kd_loss"] == pytest.approx(loss, rel=1e-5) for step, loss in zip(steps, losses, strict=True))
    # The balancing loss is the student's own and works by its gradient: the first loss is the same, not the later ones.
    assert with_balance[0][0] == pytest.approx(without[0][0], rel=1e-6)
    assert with_balance[0][2] != pytest.approx(without[0][2], rel=1e-7)


@pytest.fixture(scope="module")
def teacher_path(ranks_factory, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "checkpoint"
    return ranks_factory(2).run(jobs_distill.teacher, str(path))[0]


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}], ids=["DP=2", "TP=2", "PP=2"])
def test_adapters_learn_from_the_teacher(ranks, teacher_path, tmp_path, layout):
    """NeMo's LoRA on the student: the teacher gets none, the base stays, the checkpoint holds adapters alone."""
    for found in ranks(2).run(jobs_distill_kinds.adapters, teacher_path, str(tmp_path), **layout):
        assert found["losses"][-1] < 0.8 * found["losses"][0]
        assert found["metrics"]["kd_loss"] == pytest.approx(found["losses"][-1], rel=1e-5)
        assert found["trained"] and all(".adapter." in name for name in found["trained"])
        assert found["teacher"], "the teacher stays as it was loaded"
        assert not found["teacher trains"]
    distilled, plain = (saved_keys(tmp_path / name) for name in ("distilled", "plain"))
    assert {key.removeprefix("module.") for key in distilled} == {key.removeprefix("module.") for key in plain}
    assert all("adapter" in key or key.startswith("optimizer") for key in distilled)


def test_pairs_that_do_not_go_with_adapters_are_refused(ranks, teacher_path, tmp_path):
    errors = ranks(1).run(jobs_distill_kinds.adapters_refused, teacher_path, str(tmp_path))[0]
    assert "LoRA freezes the projection" in errors["projection"] and "32 and 64" in errors["projection"]
    assert "without its adapter" in errors["inside"] and "'decoder.layers.1.self_attention'" in errors["inside"]

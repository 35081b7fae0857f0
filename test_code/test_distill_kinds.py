"""Students and teachers of other kinds: mixtures of experts."""

from __future__ import annotations

import pytest

from test_code import jobs_distill_kinds


def test_experts_learn_from_experts(ranks, tmp_path):
    with_balance, without = ranks(1).run(jobs_distill_kinds.experts, str(tmp_path / "teacher"))[0]
    for losses, steps, _ in (with_balance, without):
        assert len(losses) == 3 and all(loss > 0 for loss in losses)
        assert all(step["kd_loss"] == pytest.approx(loss, rel=1e-5) for step, loss in zip(steps, losses, strict=True))
    # The balancing loss is the student's own and works by its gradient: the first loss is the same, not the later ones.
    assert with_balance[0][0] == pytest.approx(without[0][0], rel=1e-6)
    assert with_balance[0][2] != pytest.approx(without[0][2], rel=1e-7)

"""Intermediate checkpoints: when they are written, that they are whole, and which one is resumed from."""

from __future__ import annotations

import os

import pytest
import torch

from nemo_modelopt_dropin import files


def train_with_interim(folder: str, asynchronous: bool) -> tuple[list[float], list[float], list[str]]:
    """Train with a checkpoint after each step, resume from the last one; return both curves and what was saved."""
    import os
    from pathlib import Path

    from nemo_modelopt_cli import intermediate
    from test_code.support import jobs_checkpoints, ranks, tiny

    here = Path(folder) / f"async {asynchronous}"
    layout = {"max_steps": 6, "strategy_kwargs": {"ckpt_async_save": asynchronous}}

    # Else the time that saving takes puts off the next checkpoint.
    share, intermediate._LONGEST_SHARE = intermediate._LONGEST_SHARE, 1e9

    def train(resume=None) -> list[float]:
        recorder = tiny.LossRecorder()
        run = tiny.trainer(callbacks=[recorder, intermediate.Interim(str(here), 1e-9)], **layout)
        torch.manual_seed(1234)
        run.fit(tiny.model(), jobs_checkpoints.CountedData(masked=False), ckpt_path=resume)
        return recorder.losses

    try:
        first = train()
        saved = sorted(os.listdir(here))
        ranks.reset()
        return first, train(str(here / saved[-1] / "weights")), saved
    finally:
        intermediate._LONGEST_SHARE = share


# --- when to save -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_seconds", [0.01, 1.0, 45.0, 1000.0])
def test_checkpoints_come_every_few_minutes(cpu_backend, step_seconds):
    from nemo_modelopt_cli.intermediate import Schedule

    now, asked, saved = [0.0], [], []
    schedule = Schedule(300, clock=lambda: now[0])

    def agree(value):
        asked.append(now[0])
        return value

    while now[0] < 3600:
        now[0] += step_seconds
        if schedule.is_due(agree):
            saved.append(now[0])
            now[0] += 2
            schedule.saved(2, agree)
    gaps = [later - earlier for earlier, later in zip([0.0, *saved], saved, strict=False)]
    assert saved and min(gaps) >= 300
    assert max(gaps) <= 302 + 2 * step_seconds
    assert len(asked) <= 30 * len(saved), "clocks are compared a few times for each checkpoint, not after each step"


def test_slow_checkpoints_come_less_often(cpu_backend):
    from nemo_modelopt_cli.intermediate import Schedule

    schedule = Schedule(300, clock=lambda: 0.0)
    schedule.saved(90, lambda value: value)
    assert schedule.seconds == 900


def test_the_newest_whole_checkpoint_is_resumed_from(cpu_backend, tmp_path):
    from nemo.lightning.pytorch.callbacks import ModelCheckpoint

    from nemo_modelopt_cli.intermediate import Steps, newest

    checkpoints, steps = tmp_path / "checkpoints", Steps(tmp_path / "interim")
    assert newest(checkpoints, steps) is None
    for i, folder in enumerate(("checkpoints/a-last", "interim/step-00000004", "checkpoints/b-last")):
        (tmp_path / folder).mkdir(parents=True)
        os.utime(tmp_path / folder, (i, i))
    # What a killed run leaves: a checkpoint that it was writing, and its lock.
    files.staging(tmp_path / "interim" / "step-00000009", files.TRAINING_CHECKPOINT).mkdir()
    (tmp_path / "interim" / ".step-00000009.lock").touch()
    assert newest(checkpoints, steps) == checkpoints / "b-last"
    ModelCheckpoint.set_checkpoint_unfinished_marker(checkpoints / "b-last")
    assert newest(checkpoints, steps) == tmp_path / "interim" / "step-00000004"
    steps.remove_before(checkpoints)
    assert steps.latest() is not None
    os.utime(tmp_path / "checkpoints" / "a-last", (5, 5))
    steps.remove_before(checkpoints)
    assert steps.latest() is None and not (tmp_path / "interim").exists()
    assert newest(checkpoints, steps) == checkpoints / "a-last"
    ModelCheckpoint.set_checkpoint_unfinished_marker(checkpoints / "a-last")
    assert newest(checkpoints, steps) is None


@pytest.mark.parametrize("asynchronous", [False, True])
def test_intermediate_checkpoints_are_whole(ranks, tmp_path, asynchronous):

    found = ranks(2).run(train_with_interim, str(tmp_path), asynchronous, timeout=300)
    for first, second, saved in found:
        assert saved == ["step-00000005"], "the last step is left to the final checkpoint, earlier ones are removed"
        assert second == first[-len(second) :], "the resumed steps repeat those of the first run"
        assert len(second) == 1

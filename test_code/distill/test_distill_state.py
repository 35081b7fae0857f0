"""What a distillation holds and keeps: aligned vocabularies, checkpoints, the optimizer, and one curve everywhere."""

from __future__ import annotations

import pytest
import torch

from test_code.support import jobs_distill, jobs_distill_state

EARLY = """
intermediate_layer_pairs:
  - [decoder.layers.0, decoder.layers.1, mse]
  - [decoder.final_layernorm, decoder.final_layernorm]
"""
PAIR = "intermediate_layer_pairs: [[decoder.final_layernorm, decoder.final_layernorm]]\n"


@pytest.fixture(scope="module")
def folder(ranks_factory, tmp_path_factory):
    """Return a folder with a teacher, one with more padding, and a plain student to start from."""
    folder = tmp_path_factory.mktemp("state")
    pool = ranks_factory(2)
    pool.run(jobs_distill.teacher, str(folder / "teacher"))
    pool.run(jobs_distill.teacher, str(folder / "padded"), vocab_size=264)
    pool.run(jobs_distill.teacher, str(folder / "teacher-student"), num_layers=2)
    (folder / "pair.yaml").write_text(PAIR)
    # At PP=2 the first pair is on the first stage of both models (of 2 and of 4 layers).
    (folder / "early.yaml").write_text(EARLY)
    return folder


def test_vocabularies_padded_differently_align(ranks, folder):
    run = ranks(2).run
    _, _, same = run(jobs_distill_state.teacher_rows, str(folder / "teacher"), 256, 256)[0]
    losses, steps, widened = run(jobs_distill_state.teacher_rows, str(folder / "teacher"), 264, 256)[0]
    for weight, wide in zip(same, widened, strict=True):
        assert torch.equal(wide[:256], weight) and (wide[256:] == 0).all() and len(wide) == 264
    assert losses[0] > 0 and 0.0 <= steps[0]["kd_top1_agreement"] <= 1.0
    losses, _, cut = run(jobs_distill_state.teacher_rows, str(folder / "padded"), 256, 264)[0]
    assert losses[0] > 0 and [len(weight) for weight in cut] == [256, 256]
    assert all(weight.isfinite().all() and (weight != 0).any(-1).all() for weight in cut)


def test_entries_that_one_model_lacks_do_not_count(ranks):
    # The second shard's padding begins inside of it, at its edge, and before it.
    for results in ranks(2).run(jobs_distill_state.loss_of_first_entries, [12, 8, 5]):
        for value, expected, gradient, expected_gradient in results.values():
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=2e-6)


def test_checkpoints_and_optimizer_hold_what_is_trained(ranks, folder):
    results = ranks(2).run(
        jobs_distill_state.checkpoints, str(folder / "teacher"), str(folder / "pair.yaml"), str(folder / "saved")
    )
    for result in results:
        sizes = result["sizes"]
        assert sizes["optimizer"] == sizes["student"] + sizes["projection"] and sizes["projection"] == 32 * 64 + 64
        full, weights = result["keys"]["full"], result["keys"]["weights only"]
        assert any("_loss_modules" in key for key in full)
        assert weights and not any("_loss_modules" in key or "_teacher" in key for key in weights)
        assert not any("_teacher" in key for key in full)
        # fp32 shards of two ranks, and the files' headers: the teacher would be 700 kB more.
        assert 0 < result["bytes"]["weights only"] < 2 * 4 * sizes["student"] + 150_000
        # Weights, and two moments and a master copy of each at most.
        assert result["bytes"]["full"] < 2 * 4 * 4 * sizes["optimizer"] + 150_000
        assert result["steps"] == 3
        for saved, resumed, later in zip(result["end"], result["resumed"], result["later"], strict=True):
            assert torch.equal(saved, resumed) and not torch.equal(resumed, later)
    # Both ranks go on with the same projection.
    assert all(torch.equal(a, b) for a, b in zip(results[0]["later"], results[1]["later"], strict=True))


def test_a_projection_of_an_earlier_stage_is_trained_and_saved_apart(ranks, folder):
    results = ranks(2).run(
        jobs_distill_state.early_projection, str(folder / "teacher"), str(folder / "early.yaml"), str(folder / "early")
    )
    for keys, moved, steps in results:
        assert moved > 0
        assert len([key for key in keys if "_loss_modules.stage_0." in key and "optimizer" not in key]) == 2
        assert [step["kd_intermediate_loss"] > 0 for step in steps] == [True, True]
    assert results[0][2][0]["kd_loss"] == results[1][2][0]["kd_loss"]


@pytest.fixture(scope="module")
def curves(ranks_factory, folder):
    return ranks_factory(2).run(
        jobs_distill_state.curves, str(folder / "teacher"), str(folder / "early.yaml"), 20, timeout=400
    )


@pytest.mark.parametrize("layout", ["TP=2", "TP=2 SP", "PP=2", "DP=2"])
def test_twenty_steps_give_the_same_curve_in_every_layout(curves, layout):
    alone = curves[0]["1 rank"]
    assert len(alone) == 20 and alone[-1] < 0.9 * alone[0]
    for rank in range(2):
        # fp32 sums in another order, twenty optimizer steps on.
        assert curves[rank][layout] == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("entries", [None, 17, 12, 9])
def test_what_is_observed_of_a_split_vocabulary(ranks, entries):
    for found, expected in ranks(2).run(jobs_distill_state.observed_of_shards, entries):
        assert 0.2 < expected["top1_agreement"].mean() < 0.9
        for name, value in expected.items():
            torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)


WATCHED = """
skip_lm_loss: false
intermediate_layer_pairs:
  - [decoder.layers.0, decoder.layers.1, mse]
  - [decoder.layers.3, decoder.layers.3]
"""


def test_what_is_logged(ranks, folder, tmp_path):
    (tmp_path / "watched.yaml").write_text(WATCHED)
    first = None
    for layout, (steps, teacher_loss) in (
        ranks(2).run(jobs_distill_state.watched, str(folder / "teacher"), str(tmp_path / "watched.yaml"))[0].items()
    ):
        pairs = [
            "kd_intermediate_loss/decoder.layers.0-decoder.layers.1",
            "kd_intermediate_loss/decoder.layers.3-decoder.layers.3",
        ]
        for step in steps:
            assert step["tokens_per_second"] > 0
            # fp32 means of the same numbers in another order.
            mean = (step[pairs[0]] + step[pairs[1]]) / 2
            assert step["kd_intermediate_loss"] == pytest.approx(mean, rel=1e-5), layout
            assert step[pairs[1]] > 2 * step[pairs[0]] > 0, layout
        # A plain training of the teacher begins with this loss on the same batch.
        assert steps[0]["teacher_lm_loss"] == pytest.approx(teacher_loss, rel=1e-5), layout
        if layout in ("1 rank", "DP=2"):  # with a split model the student begins with other weights
            first = first or steps[0]
            for name in ("kd_top1_agreement", *pairs):
                assert steps[0][name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), (layout, name)


def test_loading_a_teacher_takes_little_more_than_its_weights(ranks, tmp_path):
    weights, peak = ranks(1).run(jobs_distill_state.loading_peak, str(tmp_path / "teacher"))[0]
    assert weights > 8_000_000
    # One tensor at a time is read beside the model.
    assert weights < peak < 1.1 * weights


@pytest.mark.parametrize("tp", [1, 2])
def test_validation_logs_what_training_logs(ranks, folder, tmp_path, tp):
    (tmp_path / "watched.yaml").write_text(WATCHED + "validation_metrics: true\n")
    paths = str(folder / "teacher"), str(tmp_path / "watched.yaml")
    found, plain = ranks(2).run(jobs_distill_state.validated, *paths, tp, True)[0]
    pairs = [name for name in found if name.startswith("val_kd_intermediate_loss/")]
    assert len(pairs) == 2
    # The student is the teacher: fp32 rounding is left.
    assert found["val_kd_top1_agreement"] == 1 and abs(found["val_kd_logits_loss"]) < 1e-6
    assert found["val_lm_loss"] == pytest.approx(found["val_teacher_lm_loss"], rel=1e-6)
    assert found["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-6)
    assert found["val_teacher_lm_loss"] == pytest.approx(plain["val_loss"], rel=0.02)  # NeMo's is the mean of means
    other, _ = ranks(2).run(jobs_distill_state.validated, *paths, tp, False)[0]
    assert other["val_kd_logits_loss"] > 1e-3 and other["val_kd_top1_agreement"] < 1
    assert other["val_teacher_lm_loss"] == pytest.approx(found["val_teacher_lm_loss"], rel=1e-6)
    assert other["val_lm_loss"] != pytest.approx(found["val_lm_loss"], rel=1e-4)

"""`DistillationGPTModel` in real training: against stock, over layouts, its checkpoints, metrics and errors."""

from __future__ import annotations

import os
from unittest import mock

import pytest

from test_code.support import installed, tolerances
from test_code.support import jobs_distill as jobs

PAIR = "intermediate_layer_pairs: [[decoder.final_layernorm, decoder.final_layernorm]]\n"


def settings_of_training(teacher_path, path):
    """Distill one step; return how often the settings were opened, and which ones are used."""
    from test_code.support import tiny

    with mock.patch("builtins.open", wraps=open) as opened:
        model = jobs.distillation_model(teacher_path, path)
        tiny.fit(model, max_steps=1)
    state = tiny.core(model)._distillation
    temperature = state.settings.criterion[state.settings.logit_pair]._temperature
    times = sum(call.args[:1] == (path,) for call in opened.call_args_list)
    return times, state.settings is model._settings, temperature, state.settings.skip_lm_loss


@pytest.fixture(scope="module")
def teacher_path(ranks_factory, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "checkpoint"
    return ranks_factory(2).run(jobs.teacher, str(path))[0]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Write settings to a YAML file and return its path."""
    folder = tmp_path_factory.mktemp("settings")

    def write(text: str) -> str:
        path = folder / f"{len(list(folder.iterdir()))}.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture(scope="module")
def both(ranks_factory, stock_ranks, teacher_path, settings):
    """The losses of ours and of stock. Without masks in the data: stock averages micro-batches, not tokens."""
    arguments = (teacher_path, settings(PAIR), {"masked": False})
    ours = ranks_factory(2).run(jobs.distill_everywhere, *arguments)
    return ours, stock_ranks(2).run(jobs.distill_everywhere, *arguments)


def test_the_oracle_is_stock(stock_ranks, ranks):
    assert installed.is_stock(stock_ranks(2).run(jobs.which_subpackage)[0])
    assert ranks(2).run(jobs.which_subpackage)[0].startswith(os.getcwd())


@pytest.mark.parametrize("objective", ["logits", "pair", "projected pair"])
@pytest.mark.parametrize("layout", ["1 rank", "TP=2", "TP=2 SP", "PP=2"])
def test_training_losses_equal_stock(both, layout, objective):
    ours, stock = both
    for rank in range(2):
        mine, theirs = ours[rank][layout, objective], stock[rank][layout, objective]
        assert len(mine) == 6
        # fp32 sums in another order, six optimizer steps on: 1e-5 of the loss.
        assert mine == pytest.approx(theirs, rel=tolerances.of("loss"))


@pytest.mark.parametrize("objective", ["logits", "pair"])
@pytest.mark.parametrize("layout", ["TP=2", "TP=2 SP"])
def test_layouts_agree_where_their_weights_do(both, layout, objective):
    # Both draw the whole weights on the CPU and cut their shard out; a few percent would come from other weights.
    ours, _ = both
    assert ours[0][layout, objective] == pytest.approx(ours[0]["1 rank", objective], rel=2e-2)


def test_validation_before_and_between_training_steps_of_a_pipeline(ranks, teacher_path, settings):
    """Sanity step first, then training: nothing captured in one may reach the other (modelopt would warn)."""
    for losses, steps, val_losses in ranks(2).run(jobs.two_stage_training, teacher_path, settings(PAIR)):
        assert len(losses) == 4 and len(val_losses) == 2
        assert all(loss == loss and loss > 0 for loss in losses + val_losses)
        for loss, step in zip(losses, steps, strict=True):
            # Logged on both stages, under one name, with one value.
            assert step["kd_loss"] == pytest.approx(loss, rel=1e-5)
            assert step["kd_logits_loss"] > 0 and step["kd_intermediate_loss"] > 0
            # The dynamic rule: the intermediate part counts as much as the logits'. The mean over tokens of two
            # micro-batches' sums is the sum of the means.
            assert step["kd_loss"] == pytest.approx(2 * step["kd_logits_loss"], rel=1e-5)
            assert "lm_loss" not in step


def test_the_lm_loss_leaves_the_logits_to_the_kl(ranks, teacher_path, settings):
    paths = [settings("skip_lm_loss: true\n"), settings("skip_lm_loss: false\nkd_loss_scale: 0.5\n")]
    for alone, mixed in ranks(2).run(jobs.first_logits_loss, teacher_path, paths):
        assert mixed["kd_logits_loss"] == pytest.approx(alone["kd_logits_loss"], rel=1e-6)
        assert mixed["lm_loss"] > 1.0
        # Balanced to the language-model loss, then weighed.
        assert mixed["kd_loss"] == pytest.approx(1.5 * mixed["lm_loss"], rel=1e-5)


def test_a_cross_entropy_that_overwrites_bf16_logits_leaves_them_to_the_kl(ranks, teacher_path, settings):
    paths = [settings("skip_lm_loss: true\n"), settings("skip_lm_loss: false\nfused_logits: 'off'\n")]
    for alone, mixed in ranks(2).run(jobs.first_logits_loss_in_bf16, teacher_path, paths):
        # The same bf16 logits; the sum over tokens is in fp32.
        assert mixed["kd_logits_loss"] == pytest.approx(alone["kd_logits_loss"], rel=tolerances.of("loss"))


def test_per_token_loss_does_not_depend_on_micro_batches(ranks, teacher_path):
    for curves in ranks(2).run(jobs.curves_by_micro_batch, teacher_path, True):
        for curve in curves[1:]:
            assert curve == pytest.approx(curves[0], rel=tolerances.of("loss"))


def test_without_it_the_first_logged_loss_is_the_token_mean_all_the_same(ranks, teacher_path):
    curves = ranks(2).run(jobs.curves_by_micro_batch, teacher_path, False)[0]
    assert {round(curve[0], 6) for curve in curves} == {round(curves[0][0], 6)}


def test_checkpoints_hold_the_student_and_load_into_its_class(ranks, teacher_path, settings, tmp_path):
    results = ranks(2).run(jobs.checkpoint_of_student, teacher_path, settings(PAIR), str(tmp_path / "student"))
    for keys, losses, continued, moved, extra_in_buffers, teacher_trains in results:
        assert keys and not [key for key in keys if "_teacher_model" in key]
        assert len(losses) == 2 and continued[0] > 0
        assert not moved and not teacher_trains
        assert extra_in_buffers == 0


def test_through_nemos_own_api(ranks, teacher_path, tmp_path):
    for steps in ranks(2).run(jobs.through_nemo_api, teacher_path, str(tmp_path / "run")):
        assert [step["kd_logits_loss"] > 0 for step in steps] == [True, True]


def test_what_cannot_work_is_refused_before_the_teacher_is_loaded(ranks, teacher_path, settings):
    paths = {
        "layer": settings("intermediate_layer_pairs: [[decoder.final_layernom, decoder.final_layernorm]]"),
        "stage": settings("intermediate_layer_pairs: [[decoder.layers.1, decoder.layers.3]]"),
        "inside": settings("intermediate_layer_pairs: [[decoder.layers.3.mlp, decoder.layers.3.mlp]]"),
        "setting": settings("skip_lm_los: true"),
        "fused": settings("fused_logits: 'on'"),
    }
    expected = {
        "vpp in the strategy": "virtual_pipeline_model_parallel_size=2",
        "vocabulary": "4096 and 256 entries, the tokenizer 256",
        "layer": "no layer 'decoder.final_layernom'",
        "stage": "does not fall on one pipeline stage: the student's layer is on stage 0, the teacher's on stage 1",
        "recompute": "cannot be trained",
        "setting": "Did you mean 'skip_lm_loss'",
        "fused with fsdp": "fused_logits='on' is not supported with Megatron-FSDP",
    }
    for answers in ranks(2).run(jobs.refusals, teacher_path, paths):
        for label, text in expected.items():
            kind = "UnknownSettingError" if label == "setting" else "ModelOptConfigError"
            assert answers[label][0] == kind and text in answers[label][1], (label, answers[label])


@pytest.mark.parametrize("per_token", [False, True])
def test_losses_are_token_means_over_context_parallel_ranks(ranks, per_token):
    for batches in ranks(2).run(jobs.reduction_over_context_parallel, per_token):
        for loss, expected_loss, gradient, expected_gradient, reduced, expected_mean in batches:
            assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
            assert gradient.allclose(expected_gradient, rtol=1e-6)
            assert float(reduced) == pytest.approx(float(expected_mean), rel=1e-6)


def test_the_settings_are_read_once(ranks, teacher_path, settings):
    path = settings("logit_kl_temperature: 2.0\nskip_lm_loss: false\n")
    assert ranks(1).run(settings_of_training, teacher_path, path)[0] == (1, True, 2.0, False)


@pytest.mark.parametrize(
    ("path", "restore", "warns"),
    [(None, None, True), ("a checkpoint of this run", None, False), (None, "the student", False)],
)
def test_a_student_that_nothing_loads_is_mentioned(path, restore, warns):
    from types import SimpleNamespace
    from unittest.mock import patch

    from nemo.collections.llm.modelopt.distill import model as module

    trainer = SimpleNamespace(ckpt_path=path, strategy=SimpleNamespace(restore_config=restore))
    student = module.DistillationGPTModel.__new__(module.DistillationGPTModel)
    with patch.object(module.DistillationGPTModel, "trainer", trainer), patch.object(module, "logging") as log:
        student.on_fit_start()
    assert log.warning.called is warns
    assert not warns or "RestoreConfig(path=" in log.warning.call_args.args[0]

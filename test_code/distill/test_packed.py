"""Packed sequences: a distillation on them equals one on the same samples, each a sequence of its own."""

from __future__ import annotations

import pytest
import torch
import yaml

from test_code.support import chats, installed, jobs_distill, jobs_packed

# fp32 sums over other numbers of rows and columns, through 4 layers.
ROUNDING = 2e-5
OBJECTIVES = {
    "logits": {"fused_logits": "off"},
    "fused": {"fused_logits": "on"},
    "pairs and language model": {
        "intermediate_layer_pairs": [["decoder.layers.1", "decoder.layers.1"]],
        "skip_lm_loss": False,
        "loss_weights": {"kd_logits": 1.0, "intermediate": 0.3, "lm": 0.5},
        "logit_kl_topk": 16,
    },
}
METRICS = ("kd_loss", "kd_logits_loss", "kd_top1_agreement", "teacher_lm_loss")


@pytest.fixture(scope="module")
def teacher_path(ranks_factory, tmp_path_factory):
    return ranks_factory(1).run(jobs_distill.teacher, str(tmp_path_factory.mktemp("packed") / "teacher"))[0]


def settings(folder, name):
    (folder / "losses.yaml").write_text(yaml.safe_dump(OBJECTIVES[name]))
    return str(folder / "losses.yaml")


@pytest.mark.cpu
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        pytest.param({"window_size": (2, 0)}, marks=installed.local_windows),
        pytest.param(
            {"position_embedding_type": "learned_absolute", "softmax_type": "off-by-one"},
            marks=installed.local_windows,
        ),
    ],
)
def test_packed_sequences_do_not_attend_to_each_other(ranks, overrides):
    packed, alone, *gradients = ranks(1).run(jobs_packed.attention, **overrides)[0]
    torch.testing.assert_close(packed, alone, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(*gradients, rtol=ROUNDING, atol=ROUNDING * float(gradients[1].abs().max()))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_equal_those_of_single_samples(ranks, teacher_path, tmp_path, name):
    ((padded, packed, difference),) = ranks(1).run(
        jobs_packed.packed_and_padded, teacher_path, settings(tmp_path, name)
    )
    for metric in METRICS:
        assert packed[metric] == pytest.approx(padded[metric], rel=ROUNDING), metric
    assert packed["kd_loss"] > 0
    assert difference < ROUNDING


@pytest.mark.parametrize("layout", [{"tp": 2, "sp": True}, {"pp": 2}, {}])
def test_every_layout_trains_on_packed_sequences(ranks, teacher_path, tmp_path, layout):
    path = settings(tmp_path, "pairs and language model")
    for padded, packed, difference in ranks(2).run(jobs_packed.packed_and_padded, teacher_path, path, layout):
        for metric in (*METRICS, "kd_intermediate_loss", "lm_loss"):
            assert packed[metric] == pytest.approx(padded[metric], rel=ROUNDING), metric
        assert difference < ROUNDING


def test_nemos_packed_conversations_equal_its_single_ones(ranks, teacher_path, tmp_path):
    for name in ("training", "validation"):
        chats.write(tmp_path / "chats" / f"{name}.jsonl", 10)
    alone, packed = ranks(1).run(jobs_packed.nemos_modules, teacher_path, str(tmp_path / "chats"))[0]
    for metric in METRICS:
        assert packed[metric] == pytest.approx(alone[metric], rel=ROUNDING), metric


class _Packed:
    packed_sequence_size = 64


@pytest.mark.parametrize(
    ("student", "emulated", "message"),
    [
        ({"mtp_num_layers": 1}, True, "packed_sequence_size.*1 multi-token-prediction layers"),
        ({}, False, "packed_sequence_size.*Install Transformer Engine, use data that is not packed, or run on CPU"),
    ],
)
def test_what_cannot_keep_samples_apart_raises_an_error_before_a_model_is_built(
    monkeypatch, cpu_backend, student, emulated, message
):
    from nemo.collections.llm.modelopt.distill import _packed
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from test_code.support import tiny

    monkeypatch.setattr(_packed.state, "is_enabled", lambda: emulated)
    monkeypatch.setattr(_packed.gpt_layer_specs, "HAVE_TE", False)
    with pytest.raises(ModelOptConfigError, match=message):
        _packed.check_packed(_Packed(), tiny.config(**student))
    _packed.check_packed(tiny.data(), tiny.config(**student))

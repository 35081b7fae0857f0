"""Distillation steps on a fake GPU: whole Megatron models, every layout, sizes of Llama 3.1 8B; no mixes, no waits."""

from __future__ import annotations

import pytest
import torch

from test_code.fake_gpu import jobs_distill as jobs

pytestmark = pytest.mark.cpu

MICRO_BATCHES = 2
COSINE, MSE = ("decoder.layers.1", "decoder.layers.1"), ("decoder.layers.0", "decoder.layers.0", "mse")
SETTINGS = {
    "logits": {},
    "top-k": {"logit_kl_topk": 8},
    "jsd": {"logit_kl_direction": "jsd", "logit_kl_beta": 0.3, "logit_kl_temperature": 2.0},
    "in place": {"logit_kl_in_place": True, "logit_kl_direction": "reverse"},
    "lm": {"skip_lm_loss": False},
    "pairs": {"intermediate_layer_pairs": [COSINE, MSE], "skip_lm_loss": False},
    "weights": {"intermediate_layer_pairs": [COSINE], "loss_weights": {"kd_logits": 0.5, "intermediate": 0.1}},
    "fused": {"fused_logits": "on", "intermediate_layer_pairs": [COSINE]},
    "fused lm": {"fused_logits": "on", "skip_lm_loss": False, "logit_kl_topk": 8},
}
STUDENTS = {
    "multi-token prediction": {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1},
    "per-token loss": {"calculate_per_token_loss": True},
    "recomputed": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "biases": {"normalization": "LayerNorm", "add_bias_linear": True, "gated_linear_unit": False, "qk_layernorm": True},
    # Megatron's cross entropy overwrites logits in fp32.
    "fp32": {"bf16": False, "params_dtype": torch.float32, "pipeline_dtype": torch.float32},
}
# A fixed number of tokens for each expert, so that shapes do not depend on the data.
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 64,
    "moe_grouped_gemm": False,
    "moe_token_dispatcher_type": "alltoall",
    "moe_expert_capacity_factor": 1.0,
    "moe_pad_expert_input_to_capacity": True,
    "moe_aux_loss_coeff": 0.01,
}
# Rotary positions of a part of the sequence need Transformer Engine's attention.
POSITIONS = {"position_embedding_type": "learned_absolute"}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_step(gpu, settings, tp):
    """The student is half as wide as the teacher, so its hidden states are projected."""
    assert gpu(jobs.step, settings, tp) == MICRO_BATCHES


@pytest.mark.parametrize(("fault", "error"), [("item", "HostSync"), ("mix", "FakeTensorDeviceMismatchError")])
def test_a_fault_in_a_step_is_seen(gpu, fault, error):
    assert gpu(jobs.faulty_step, fault) == error


@pytest.mark.parametrize("settings", [SETTINGS["pairs"], SETTINGS["fused lm"]], ids=["pairs", "fused lm"])
def test_logging_step(gpu, settings):
    assert gpu(jobs.step, settings, 2, observing=True) == MICRO_BATCHES


@pytest.mark.parametrize("entries", [250, 128])
def test_step_with_different_padding(gpu, entries):
    """The last tensor-parallel rank has 122 of 128 entries of the vocabulary, or padding only."""
    assert gpu(jobs.step, {}, 2, observing=True, entries=entries) == MICRO_BATCHES


@pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS)
def test_step_of_a_kind_of_student(gpu, student):
    assert gpu(jobs.step, SETTINGS["lm"], 2, student=student) == MICRO_BATCHES


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("settings", [{}, SETTINGS["fused lm"]], ids=["logits", "fused lm"])
def test_step_with_experts(gpu, settings, ep):
    """Each expert takes a fixed number of tokens; otherwise Megatron reads how many it gets."""
    assert gpu(jobs.step, settings, 1, student=EXPERTS, teacher=EXPERTS, ep=ep) == MICRO_BATCHES


@pytest.mark.parametrize("name", ["logits", "lm", "weights", "fused lm"])
def test_step_of_a_part_of_the_sequence(gpu, name):
    """With two context-parallel ranks, the sums of losses and tokens are those of the whole sequence."""
    assert gpu(jobs.step, SETTINGS[name], 2, student=POSITIONS, teacher=POSITIONS, cp=2) == MICRO_BATCHES


@pytest.mark.parametrize("tp", [1, 2])
def test_step_of_adapters(gpu, tp):
    """The gradient passes through frozen weights, and the fused loss computes none of the output weight."""
    same = {"hidden_size": 64}
    for settings in (SETTINGS["pairs"], {"fused_logits": "on"}):
        assert gpu(jobs.step, settings, tp, teacher=same, adapters=True) == MICRO_BATCHES


@pytest.mark.parametrize("stage", [0, 1])
def test_step_with_tied_embeddings(gpu, stage):
    """The last stage has a copy of the embedding, which its fused output layer reads."""
    student = {"share_embeddings_and_output_weights": True}
    assert gpu(jobs.step, {"fused_logits": "on"}, 2, 2, stage, student=student) == stage * MICRO_BATCHES


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("name", ["logits", "pairs", "fused lm"])
def test_step_of_a_stage(gpu, name, stage):
    """Each pair is on another stage; messages carry both models' hidden states and the losses of the first stage."""
    assert gpu(jobs.step, SETTINGS[name], 2, 2, stage) == stage * MICRO_BATCHES


@pytest.mark.parametrize("tp", [1, 2])
def test_step_with_a_recorded_teacher(gpu, tmp_path, tp):
    assert gpu(jobs.recorded_step, str(tmp_path), tp) == MICRO_BATCHES


@pytest.mark.parametrize("tp", [1, 2])
def test_step_with_another_tokenizer(gpu, tp):
    assert gpu(jobs.aligned_step, tp) == MICRO_BATCHES


@pytest.mark.parametrize("settings", [{}, {"validation_metrics": True}])
def test_validation(gpu, settings):
    gpu(jobs.validation, settings, 2)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("name", ["pairs", "fused lm"])
def test_a_step_waits_once(gpu, name, micro_batches):
    """It waits for the check that the update is finite, which ranks do together; nothing waits in a micro-batch."""
    (place,) = gpu(jobs.waits_of_a_step, SETTINGS[name], micro_batches)
    assert place.endswith("any_rank_on_device")


@pytest.mark.parametrize(("pp", "stage"), [(1, 0), (2, 0), (2, 1)])
def test_metrics_stay_on_the_device(gpu, pp, stage):
    """A logging step reads one number, to watch the loss; the other steps read none."""
    logged, waits = gpu(jobs.logged_step, False, pp, stage)
    assert waits == [] and "kd_top1_agreement" not in logged
    logged, waits = gpu(jobs.logged_step, True, pp, stage)
    assert waits == ["on_train_batch_end"] and "kd_top1_agreement" in logged


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("pairs", "columns"), [([], 0), (jobs.LLAMA_PAIRS["width"], 3)])
def test_shapes_of_messages(gpu, pairs, columns, stage):
    """Sequence parallelism divides 4096 tokens by 8; the widths are 3072, 4096 and a column for each early pair."""
    shape = [(512, 2, 3072 + 4096 + columns)]
    assert gpu(jobs.shapes, 8, 4, stage, pairs) == (shape, shape)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_teacher_is_loaded_on_the_device(gpu, stage):
    """All weights are checked with one read."""
    waits, parameters = gpu(jobs.provided_teacher, 8, 4, stage)
    assert waits == ["check_weights"]
    # 8 of 32 layers and an embedding or output layer, an eighth of each; the norms are whole on every rank.
    layer = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336) // 8 + 2 * 4096
    assert parameters == 8 * layer + 128256 * 4096 // 8 + (4096 if stage == 3 else 0)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("kind", "fused"), [("width", "auto"), pytest.param("depth", "on", marks=pytest.mark.slow)])
def test_llama_8b_on_32_ranks(gpu, kind, fused, stage):
    """A step of Llama 3.1 8B with TP=8 and PP=4, sequences of 4096 tokens, and a pair of layers on every stage."""
    assert gpu(jobs.llama_step, kind, stage, fused) == (MICRO_BATCHES if stage == 3 else 0)

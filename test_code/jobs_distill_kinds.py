"""What ranks execute for distillations of mixtures of experts."""

from __future__ import annotations

from test_code import jobs_distill, ranks, tiny

MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "moe_aux_loss_coeff": 0.1}


def experts(path):
    """Distil experts from experts; return (losses, metrics, metrics without the student's own balancing loss)."""
    tiny.fit(tiny.model(**MOE), save_to=path, max_steps=1)
    ranks.reset()
    results = []
    for coefficient in (0.1, 0.0):
        student = {**MOE, "moe_aux_loss_coeff": coefficient}
        results.append(jobs_distill.distill(path, None, student, steps=3, teacher_overrides=MOE, metrics=True))
        ranks.reset()
    return results

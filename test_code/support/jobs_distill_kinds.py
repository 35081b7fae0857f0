"""What ranks execute for distillations of mixtures of experts."""

from __future__ import annotations

from test_code.support import jobs_distill, ranks, tiny

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


def _lora(targets=("linear_qkv", "linear_proj")):
    """Return NeMo's LoRA, which asks for classes of Transformer Engine: without it, for ones that no layer has."""
    from types import SimpleNamespace

    from nemo.collections.llm.peft import lora, utils

    if not lora.HAVE_TE:
        lora.te, utils.HAVE_TE = SimpleNamespace(Linear=type("Absent", (), {})), False
    return lora.LoRA(target_modules=list(targets), dim=4)


def _adapted(model, steps, save_to=None, callbacks=(), **layout):
    """Train the adapters of a model, and return the losses."""
    method = _lora()
    model.model_transform = method
    return tiny.fit(model, tiny.data(), max_steps=steps, save_to=save_to, callbacks=[method, *callbacks], **layout)


def adapters(teacher_path, folder, **layout):
    """Distil adapters; return losses, metrics, what was trained, what changed, and the keys of the checkpoint."""
    import torch

    from nemo.collections.llm.modelopt import DistillationGPTModel

    student, options = tiny.config(ffn_hidden_size=64), {"optim": tiny.optim(lr=3e-3), "tokenizer": tiny.tokenizer()}
    model = DistillationGPTModel(student, tiny.config(), teacher_path, None, **options)
    recorder, before = jobs_distill.Metrics(), jobs_distill.TeacherWeights()
    losses = _adapted(model, 8, f"{folder}/distilled", [recorder, before], **layout)
    core = tiny.core(model)
    teacher = dict(core.teacher_model.named_parameters())
    found = {
        "losses": losses,
        "metrics": recorder.steps[-1],
        "trained": [name for name, weight in core.named_parameters() if weight.requires_grad],
        "teacher": teacher.keys() == before.weights.keys()
        and all(torch.equal(weight, before.weights[name]) for name, weight in teacher.items()),
        "teacher trains": core.teacher_model.training,
    }
    ranks.reset()
    _adapted(tiny.model(ffn_hidden_size=64), 1, f"{folder}/plain", **layout)
    return found


def adapters_refused(teacher_path, folder):
    """Return the errors of pairs that do not go with adapters."""
    cases = {
        "projection": ("decoder.final_layernorm", {"hidden_size": 32}),
        "inside": ("decoder.layers.1.self_attention.linear_proj", {}),
    }
    errors = {}
    for name, (layer, student) in cases.items():
        path = f"{folder}/{name}.yaml"
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"intermediate_layer_pairs: [[{layer}, {layer}]]\n")
        try:
            _adapted(jobs_distill.distillation_model(teacher_path, path, student), 1)
        except ValueError as error:
            errors[name] = str(error)
        ranks.reset()
    return errors

"""Students and teachers of other kinds: mixtures of experts, adapters."""

from __future__ import annotations

import pytest

from test_code.support import jobs_distill, ranks, tiny

MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "moe_aux_loss_coeff": 0.1}


def experts(path):
    """Distill experts from experts; return (losses, metrics, metrics without the student's own balancing loss)."""
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
    """Distill adapters; return losses, metrics, what was trained, what changed, and the keys of the checkpoint."""
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


def saved_keys(path):
    """Return the names of the tensors in a distributed checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader

    return set(FileSystemReader(path / "weights").read_metadata().state_dict_metadata)


def test_experts_learn_from_experts(ranks, tmp_path):
    with_balance, without = ranks(1).run(experts, str(tmp_path / "teacher"))[0]
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
    for found in ranks(2).run(adapters, teacher_path, str(tmp_path), **layout):
        assert found["losses"][-1] < 0.8 * found["losses"][0]
        assert found["metrics"]["kd_loss"] == pytest.approx(found["losses"][-1], rel=1e-5)
        assert found["trained"] and all(".adapter." in name for name in found["trained"])
        assert found["teacher"], "the teacher stays as it was loaded"
        assert not found["teacher trains"]
    distilled, plain = (saved_keys(tmp_path / name) for name in ("distilled", "plain"))
    assert {key.removeprefix("module.") for key in distilled} == {key.removeprefix("module.") for key in plain}
    assert all("adapter" in key or key.startswith("optimizer") for key in distilled)


def test_pairs_that_do_not_go_with_adapters_are_refused(ranks, teacher_path, tmp_path):
    errors = ranks(1).run(adapters_refused, teacher_path, str(tmp_path))[0]
    assert "LoRA freezes the projection" in errors["projection"] and "32 and 64" in errors["projection"]
    assert "without its adapter" in errors["inside"] and "'decoder.layers.1.self_attention'" in errors["inside"]

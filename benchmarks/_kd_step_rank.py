"""Run the part of ``benchmarks/kd_step.py`` that a rank executes: timed distillation steps, on stock or on ours."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from test_code.support import installed, tiny

# Only every 50th row of the output layer's gradient is compared: sending all of them would take too long.
_EVERY = 50


def build(student: dict[str, int], teacher: dict[str, int], settings: dict[str, Any]) -> tuple[Any, Any]:
    """Build student and teacher from a fixed seed, wrapped in Megatron's DDP, and the reduction of their losses.

    Args:
        student: sizes of the student.
        teacher: sizes of the teacher.
        settings: settings of the DistillationConfig; ignored if the running subpackage lacks one of them.

    Returns:
        The wrapped model and NeMo's loss reduction.
    """
    import modelopt.torch.distill as mtd

    from nemo.collections.llm.modelopt.distill import model as reduction_module
    from nemo.collections.llm.modelopt.distill import utils

    configs = [tiny.config(**sizes) for sizes in (student, teacher)]
    torch.manual_seed(7)
    models = [config.configure_model(tiny.tokenizer()) for config in configs]
    known = utils.DistillationConfig.__dataclass_fields__
    kd = utils.load_distillation_config(None, *configs)
    if settings and set(settings) <= set(known):
        kd = utils.load_distillation_config(utils.DistillationConfig(**settings), *configs)
    wrapped = {"teacher_model": models[1], "criterion": kd.criterion, "loss_balancer": kd.loss_balancer}
    model = mtd.convert(models[0], mode=[("kd_loss", wrapped)])
    utils.adjust_distillation_model_for_mcore(model, kd)
    model.train()
    ddp = DistributedDataParallel(configs[0], DistributedDataParallelConfig(), model)
    return ddp, reduction_module._DistillationLossReduction(model.compute_kd_loss)


def _sizes(case: dict[str, Any]) -> list[dict[str, int]]:
    shared = {"seq_length": case["length"], "vocab_size": case["vocabulary"]}
    return [{**case[who], **shared} for who in ("student", "teacher")]


def batch(sequences: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Return random tokens with a loss mask that excludes every fifth token."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(vocabulary, (sequences, length + 1), generator=generator)
    mask = torch.ones(sequences, length)
    mask[:, ::5] = 0.0
    positions = torch.arange(length).expand(sequences, length).contiguous()
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask, "position_ids": positions}


def distillation_step(ddp: Any, reduction: Any, data: dict[str, torch.Tensor]) -> float:
    """Run both forward passes, the loss, and the backward pass into Megatron's gradient buffers; return the loss."""
    output = ddp(data["tokens"], data["position_ids"], None, labels=data["labels"])
    loss, *_ = reduction.forward(data, output)  # NeMo calls the reduction itself
    loss.backward()
    return float(loss.detach())


def models_alone(ddp: Any, gradient: torch.Tensor, data: dict[str, torch.Tensor]) -> float:
    """Run the step without a loss: backpropagate a fixed gradient of the logits, [s, b, v]."""
    ddp(data["tokens"], data["position_ids"], None, labels=data["labels"])
    student, teacher = ddp.module.output_layer, ddp.module.teacher_model.output_layer
    (logits, _), student._intermediate_output = student._intermediate_output, None
    teacher._intermediate_output = None
    logits.backward(gradient)
    return 0.0


def steps(case: dict[str, Any], settings: dict[str, Any], repeats: int, alone: bool = False) -> dict[str, Any]:
    """Time distillation steps and measure the peak that a step allocates beyond models and gradient buffers.

    Args:
        case: the sizes "student" and "teacher", "sequences", "length" and "vocabulary".
        settings: settings of the DistillationConfig.
        repeats: number of timed steps.
        alone: whether to run the models without a loss.

    Returns:
        CPU ``seconds`` of each step, ``peak bytes``, ``loss``, ``gradients`` by name, and the ``package`` that ran.
    """
    from benchmarks._measure import peak_bytes
    from nemo.collections.llm import modelopt

    tiny.init_parallel()
    ddp, reduction = build(*_sizes(case), settings)
    data = batch(case["sequences"], case["length"], case["vocabulary"])
    step = partial(distillation_step, ddp, reduction, data)
    if alone:
        gradient = torch.full((case["length"], case["sequences"], case["vocabulary"]), 1e-6)
        step = partial(models_alone, ddp, gradient, data)
    ddp.zero_grad_buffer()
    loss = step()
    gradients = {}
    for name, parameter in ddp.module.named_parameters():
        if parameter.requires_grad:
            whole = parameter.main_grad
            gradients[name] = whole[::_EVERY].clone() if len(whole) == case["vocabulary"] else whole.clone()
    found = {"loss": loss, "gradients": gradients, "peak bytes": peak_bytes(step), "seconds": []}
    for _ in range(repeats):
        start = time.process_time()
        step()
        found["seconds"].append(time.process_time() - start)
    found["package"] = "stock" if installed.is_stock(str(modelopt.__file__)) else "ours"
    return found


def reuses_teacher_logits(case: dict[str, Any], changes: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Return for each label whether the loss reuses the memory of the teacher's logits.

    Args:
        case: as for `steps`.
        changes: settings of the DistillationConfig by label; under "seen", a hook also receives the teacher's logits.
    """
    tiny.init_parallel()
    found = {}
    for label, settings in changes.items():
        ddp, reduction = build(*_sizes(case), settings)
        teacher, logits = ddp.module.teacher_model, []
        if label == "seen":
            teacher.output_layer.register_forward_hook(lambda _, inputs, output, kept=logits: kept.append(output[0]))
        distillation_step(ddp, reduction, batch(case["sequences"], case["length"], case["vocabulary"]))
        criterion = next(iter(ddp.module._layers_to_loss.values()))
        found[label] = criterion.reuse_teacher
    return found

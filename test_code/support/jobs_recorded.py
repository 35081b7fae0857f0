"""What ranks execute for the tests of recorded teachers."""

from __future__ import annotations

import contextlib
import os

import torch

from test_code.support import jobs_distill, ranks, tiny

TOPK = 7


def record(teacher_path, output, settings=None, steps=4, data=None, **layout):
    """Record a teacher and return what the data module's own loader is afterwards."""
    from nemo.collections.llm.modelopt.distill import dump_teacher_topk

    module = tiny.data(**(data or {}))
    dump_teacher_topk(teacher_path, output, module, tiny.trainer(**layout), steps, settings, tiny.tokenizer(), "test")
    return "val_dataloader" in vars(module)


def bars_of_recording(teacher_path, folder, settings):
    """Return how far each bar got, and its total, where a step has two micro-batches."""
    from unittest import mock

    from nemo_modelopt_dropin.console import screen

    bars, make = [], screen.bar

    def watched(*args, **options):
        bars.append(make(*args, **options))
        return bars[-1]

    own = f"{folder}/bars-{os.environ['RANK']}"
    shown = mock.patch.multiple(screen, is_quiet=lambda: True, bar=watched)
    with jobs_distill.alone(), shown:
        record(teacher_path, own, settings, data={"global_batch_size": 4, "micro_batch_size": 2})
    return [(bar.n, bar.total) for bar in bars]


def record_everywhere(teacher_path, folder, settings):
    """Record in every layout of two ranks."""
    layouts = {"tp": {"tp": 2}, "pp": {"pp": 2}, "dp": {}}
    for name, layout in layouts.items():
        record(teacher_path, f"{folder}/{name}", settings, **layout)
        ranks.reset()
    # Both ranks are alone here: each has a folder of its own.
    own = f"{folder}/one-{os.environ['RANK']}"
    with jobs_distill.alone():
        record(teacher_path, own, settings)


def losses_of_both(teacher_path, folder, settings, student=None):
    """Return, by layout, the metrics of each step with the teacher, and with a recording of another layout."""
    layouts = {
        "1 rank": ("tp", {}),
        "TP=2": ("pp", {"tp": 2}),
        "TP=2 SP": ("dp", {"tp": 2, "sp": True}),
        "PP=2": ("one-0", {"pp": 2}),
        "DP=2": ("tp", {}),
    }
    results = {}
    for name, (recording, layout) in layouts.items():
        results[name] = []
        for path in (teacher_path, f"{folder}/{recording}"):
            with jobs_distill.alone() if name == "1 rank" else contextlib.nullcontext():
                results[name].append(jobs_distill.distill(path, settings, student, steps=4, metrics=True, **layout))
            ranks.reset()
    return results


def held(recording, settings):
    """Distill from a recording; return the teacher's weights and keys that are held, and the validation loss."""
    held_bytes = {}
    with jobs_distill.alone():
        model = jobs_distill.distillation_model(recording, settings)
        tiny.fit(model, tiny.data(), max_steps=1)
        core = tiny.core(model)
        held_bytes["teacher"] = sum(p.numel() for p in core.teacher_model.parameters())
        held_bytes["keys"] = [key for key in core.sharded_state_dict() if "teacher" in key]
        held_bytes["validation"] = model.trainer.callback_metrics.get("val_loss")
    return held_bytes


def divergences(cases, v=40, k=6):
    """Return, by case, this rank's loss and gradient of a recorded teacher beside those with its logits at hand."""
    from nemo.collections.llm.modelopt._divergence.recorded_topk import RecordedLogits, recorded_divergence, top_entries
    from nemo.collections.llm.modelopt._divergence.vocab_parallel import kl_divergence

    tiny.init_parallel(tp=2)
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    results = {}
    for direction, temperature, topk, scale in cases:
        generator = torch.Generator().manual_seed(7)
        whole = [scale * torch.randn(5, 2, 2 * v, generator=generator) for _ in range(2)]
        student, teacher = (x[..., rank * v : (rank + 1) * v].clone() for x in whole)
        entries, values, rest = top_entries(teacher.flatten(0, 1), k, temperature, group)
        record = RecordedLogits(entries.view(5, 2, k), values.view(5, 2, k), rest.view(5, 2), temperature)
        outcomes = []
        for recorded in (True, False):
            logits = student.clone().requires_grad_()
            if recorded:
                loss = recorded_divergence(logits, record, direction, group, topk)
            else:
                loss = kl_divergence(logits, teacher, temperature, direction, group, topk=topk or k)
            (loss * torch.arange(1.0, 11).view(5, 2)).sum().backward()
            outcomes.append((loss.detach(), logits.grad))
        results[direction, temperature, topk, scale] = outcomes
    return results


def alone_from(recording, settings, data=None):
    """Distill two steps from a recording."""
    return jobs_distill.distill(recording, settings, steps=2, data=data)


def refusal(job, *args, **kwargs):
    """Return the error of a job, by name, that must be refused."""
    from nemo.collections.llm.modelopt import ModelOptConfigError

    try:
        globals()[job](*args, **kwargs)
    except ModelOptConfigError as error:
        return str(error)
    return ""

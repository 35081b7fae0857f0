"""What the process with the fake GPU executes for the tests of the losses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from test_code.fake_gpu import device

TOKENS, BATCH, VOCABULARY, HIDDEN = 16, 2, 512, 32


def control(name: str) -> str:
    """Return the name of the error that a faulty operation raises."""
    with device.session():
        numbers = torch.ones(4, device="cuda")
        faults = {
            "mix": lambda: numbers + torch.ones(4),
            "item": lambda: numbers.sum().item(),
            "float": lambda: float(numbers.sum()),
            "bool": lambda: bool(numbers.sum() > 0),
            "cpu": lambda: numbers.cpu(),
            "tolist": lambda: numbers.tolist(),
            "to": lambda: numbers.to("cpu", torch.float64),
            "copy_": lambda: torch.ones(4).copy_(numbers),
            "equal": lambda: torch.equal(numbers, numbers),
            "nonzero": lambda: numbers.nonzero(),
            "mask": lambda: numbers[numbers > 0],
            "index of the host": lambda: numbers[torch.tensor([1])],
            "upload": lambda: torch.tensor([1.0, 2.0], device="cuda"),
            "item in inference mode": torch.inference_mode()(lambda: numbers.sum().item()),
            "upload in inference mode": torch.inference_mode()(lambda: torch.ones(2).to("cuda")),
        }
        try:
            faults[name]()
        except RuntimeError as error:
            return type(error).__name__
        return "no error"


def allowed() -> None:
    """Do what neither mixes devices nor waits."""
    with device.session():
        numbers = torch.ones(4, device="cuda", requires_grad=True)
        changed = numbers * 2.0 + torch.tensor(1.0)  # a number of the host becomes an argument of the kernel
        with torch.no_grad():
            changed.detach()[changed > 0] = 0.0
        changed.sum().backward()
        torch.ones(4).to("cuda", non_blocking=True)
        torch.full((), 3.0, device="cuda")
        assert numbers.grad.device == numbers.device


def counted() -> tuple[list[str], list[Any]]:
    """Return what `device.count` notes, and what the host reads."""
    with device.session():
        numbers = torch.ones(2, device="cuda")
        with device.count() as waits:
            read = [bool(~torch.isfinite(numbers).all()), bool(torch.isnan(numbers).any()), float(numbers.sum())]
            read += [bool((numbers > 0).all()), torch.isfinite(numbers.sum()).view(1).tolist(), numbers.tolist()]
    return [wait.what.partition(".")[0] for wait in waits], read


def divergence(direction: str, tp: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
    """Compute a divergence and its gradient."""
    from nemo.collections.llm.modelopt._divergence.vocab_parallel import kl_divergence

    with _ranks(tp) as group:
        student, teacher = _tensors(dtype, (TOKENS, BATCH, VOCABULARY // tp), (TOKENS, BATCH, VOCABULARY // tp))
        loss = kl_divergence(student, teacher, 2.0, direction, group, **options)
        loss.sum().backward()
        _check(loss, (TOKENS, BATCH), student)


def recorded(direction: str, tp: int, **options: Any) -> None:
    """Extract the teacher's logits, and compute a divergence from them with its gradient."""
    from nemo.collections.llm.modelopt._divergence.recorded_topk import (
        RecordedLogits,
        recorded_divergence,
        top_entries,
    )

    with _ranks(tp) as group:
        student, teacher = _tensors(
            torch.bfloat16, (TOKENS, BATCH, VOCABULARY // tp), (TOKENS * BATCH, VOCABULARY // tp)
        )
        entries, values, rest = top_entries(teacher, 8, 1.0, group)
        shape = TOKENS, BATCH, 8
        kept = RecordedLogits(entries.view(shape), values.view(shape), rest.view(shape[:2]), 1.0)
        loss = recorded_divergence(student, kept, direction, group, **options)
        loss.sum().backward()
        _check(loss, (TOKENS, BATCH), student)


def write_record(folder: str, keys: Any, length: int, vocabulary: int) -> None:
    """Write a recorded teacher of a few samples.

    Args:
        folder: folder to create.
        keys: digests of the samples [b, 2].
        length: tokens of a sample.
        vocabulary: entries of the vocabulary.
    """
    from nemo.collections.llm.modelopt.distill.recorded import store

    path = Path(folder)
    (path / store.FOLDER).mkdir(parents=True)
    writer = store.Writer(path / store.FOLDER, 0)
    values = torch.ones(len(keys), length, 4, dtype=torch.bfloat16)
    writer.add(keys, torch.arange(4).expand_as(values), values, torch.zeros(len(keys), length))
    facts = {name: getattr(writer, name) for name in ("topk", "seq_length", "largest_entry", "dtype", "shards")}
    unused = {"temperature": 1.0, "vocab_size": vocabulary, "samples": len(keys), "teacher": {}, "tokenizer": {}}
    store.write_manifest(path, store.Manifest(**facts, **unused))


def read_record(folder: str, tp: int) -> None:
    """Write a recorded teacher, and compute a divergence from the logits that are read from its files."""
    import numpy as np

    from nemo.collections.llm.modelopt._divergence.recorded_topk import recorded_divergence
    from nemo.collections.llm.modelopt.distill.recorded.store import Recording

    keys = np.arange(2 * BATCH, dtype=np.uint64).reshape(BATCH, 2)
    write_record(folder, keys, TOKENS, VOCABULARY)
    with _ranks(tp) as group:
        (student,) = _tensors(torch.bfloat16, (TOKENS, BATCH, VOCABULARY // tp))
        loss = recorded_divergence(student, Recording(folder).find(keys, "cuda"), "forward", group)
        loss.sum().backward()
        _check(loss, (TOKENS, BATCH), student)


def waits_of_recording(folder: str) -> list[str]:
    """Return the functions that wait while a micro-batch of logits is recorded."""
    import numpy as np

    from nemo.collections.llm.modelopt._divergence.recorded_topk import top_entries
    from nemo.collections.llm.modelopt.distill.recorded.store import Writer

    with _ranks(2) as group:
        (logits,) = _tensors(torch.bfloat16, (TOKENS * BATCH, VOCABULARY // 2))
        with device.count() as waits:
            record = (x.view(BATCH, TOKENS, *x.shape[1:]) for x in top_entries(logits.detach(), 8, 1.0, group))
            Writer(Path(folder), 0).add(np.zeros((BATCH, 2), dtype=np.uint64), *record)
        return [wait.where.rpartition(" ")[-1] for wait in waits]


def fused(direction: str, tp: int, labels: bool, **options: Any) -> None:
    """Compute fused losses and their gradients."""
    from nemo.collections.llm.modelopt._divergence.fused_linear import Objective, fused_linear_losses

    with _ranks(tp) as group:
        shapes = (TOKENS, HIDDEN), (VOCABULARY // tp, HIDDEN), (TOKENS, 2 * HIDDEN), (VOCABULARY // tp, 2 * HIDDEN)
        hidden, weight, *of_teacher = _tensors(torch.bfloat16, *shapes)
        weight.requires_grad_()
        mask, tokens = torch.ones(TOKENS, device="cuda"), torch.zeros(TOKENS, dtype=torch.long, device="cuda")
        losses = fused_linear_losses(
            hidden,
            weight,
            *of_teacher,
            mask,
            Objective(direction=direction, group=group, chunk_rows=6, **options),
            tokens if labels else None,
        )
        (losses.divergence + losses.lm).backward()
        _check(losses.divergence, (), hidden, weight)


def sorted_distances(tp: int) -> None:
    """Compute the distance of sorted probabilities of models with different vocabularies, and its gradient."""
    from nemo.collections.llm.modelopt.distill._aligned import SortedLogitsLoss, see
    from nemo.collections.llm.modelopt.distill._state import DistillationState

    with _ranks(tp):
        student, teacher = _tensors(
            torch.bfloat16, (TOKENS, BATCH, VOCABULARY // tp), (TOKENS, BATCH, VOCABULARY // 2 // tp)
        )
        loss, state = SortedLogitsLoss(SimpleNamespace(tensor_model_parallel_size=tp), 2.0), DistillationState()
        batch = {"teacher_tokens": torch.zeros(BATCH, TOKENS, dtype=torch.long)}
        batch["counterparts"] = torch.arange(-3, TOKENS - 3).expand(BATCH, -1)
        see(state, loss, batch)
        value, *_ = loss(student, teacher)
        value.sum().backward()
        _check(value, (BATCH, TOKENS), student)
        assert state.teacher_inputs["input_ids"].device.type == device.GPU


def observed_metrics(tp: int, deferred: bool) -> None:
    """Compute the metrics of a logging step."""
    from nemo.collections.llm.modelopt.distill._deferred_logits import DeferredLogits
    from nemo.collections.llm.modelopt.distill._metrics import observed

    with _ranks(tp):
        student, teacher = _tensors(
            torch.bfloat16, (TOKENS, BATCH, VOCABULARY // tp), (TOKENS, BATCH, VOCABULARY // tp)
        )
        given: Any = teacher
        if deferred:
            given = object.__new__(DeferredLogits)
            given.hidden, given.weight = _tensors(torch.bfloat16, (TOKENS, BATCH, HIDDEN), (VOCABULARY // tp, HIDDEN))
            given.layer = SimpleNamespace(config=None)
        found = observed(student, given, torch.zeros(BATCH, TOKENS, dtype=torch.long, device="cuda"), VOCABULARY - 3)
        assert {name: tuple(value.shape) for name, value in found.items()} == {
            "teacher_lm_loss": (BATCH, TOKENS),
            "top1_agreement": (BATCH, TOKENS),
        }


def balancer(**options: Any) -> None:
    """Combine losses, and compute the gradient of the total."""
    from nemo.collections.llm.modelopt.distill.loss import LogitsAndIntermediatesLossBalancer

    names = "LogitsKLLoss_0", "HiddenStateCosineLoss_0", "MSELoss_0", "student_loss"
    with device.session():
        losses = {name: torch.ones((), device="cuda", requires_grad=True) for name in names}
        found = LogitsAndIntermediatesLossBalancer(**options)(losses)
        found["kd_loss"].backward()
        assert {value.device.type for value in found.values()} == {device.GPU}
        assert losses["LogitsKLLoss_0"].grad is not None


@contextlib.contextmanager
def _ranks(tp: int) -> Iterator[Any]:
    """Let this process be the last of ``tp`` tensor-parallel ranks; yields their group, None for one rank."""
    from megatron.core import parallel_state

    with device.session(tp, tp - 1, tensor_model_parallel_size=tp):
        yield parallel_state.get_tensor_model_parallel_group() if tp > 1 else None


def _tensors(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Return tensors on the fake GPU; gradients flow into the first."""
    return [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=not i) for i, shape in enumerate(shapes)]


def _check(loss: torch.Tensor, shape: tuple[int, ...], *inputs: torch.Tensor) -> None:
    """Check device, shape and precision of a loss and of the gradients of its inputs."""
    assert (loss.device.type, tuple(loss.shape), loss.dtype) == (device.GPU, shape, torch.float32)
    for tensor in inputs:
        found = tensor.grad.device, tensor.grad.shape, tensor.grad.dtype
        assert found == (tensor.device, tensor.shape, tensor.dtype)

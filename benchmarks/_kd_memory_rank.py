"""Run the part of ``benchmarks/kd_memory.py`` that a rank executes: a distillation step on fake tensors.

Fake tensors have shapes but no data, and the collectives of the fake process group do nothing. One CPU process can
therefore run models of any size and layout, with Megatron's own code, modelopt's hooks, and stock's losses or ours.
PyTorch's ``MemTracker`` counts the memory.
"""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from test_code.support import tiny


class FlashAttention(torch.nn.Module):
    """Replace Megatron's attention, which stores scores of shape [s, s], by PyTorch's, which does not."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def forward(self, query, key, value, *args, **kwargs):
        """Return causal attention, [s, b, h], of query [s, b, n, d] and of key and value [s, b, groups, d]."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def flash_spec(config: Any) -> Any:
    """Return Megatron's local layer with `FlashAttention`."""
    from nemo.collections.llm.gpt.model.base import local_layer_spec

    spec = local_layer_spec(config)
    spec.submodules.self_attention.submodules.core_attention = FlashAttention
    return spec


def join_fake_world(tp: int, pp: int) -> None:
    """Join a fake process group of tp x pp ranks as its last rank."""
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    size = tp * pp
    torch.distributed.init_process_group("fake", rank=size - 1, world_size=size, store=FakeStore())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, create_gloo_process_groups=False
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def models(case: dict[str, Any], settings: dict[str, Any]) -> tuple[Any, Any]:
    """Build the distillation model of this pipeline stage and the reduction of its losses."""
    import modelopt.torch.distill as mtd

    from nemo.collections.llm.modelopt.distill import model as reduction_module
    from nemo.collections.llm.modelopt.distill import utils

    dtype = getattr(torch, case["dtype"])
    layout = {
        "tensor_model_parallel_size": case["tp"],
        "pipeline_model_parallel_size": case["pp"],
        "sequence_parallel": case["tp"] > 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "seq_length": case["length"],
        "vocab_size": case["vocabulary"],
        "perform_initialization": False,
        "transformer_layer_spec": flash_spec,
    }
    configs = [tiny.config(**{**case[who], **layout}) for who in ("student", "teacher")]
    built = [config.configure_model(tiny.tokenizer(), pre_process=case["pp"] == 1) for config in configs]
    kd: Any = utils.DistillationConfig(**settings) if settings else None
    kd = utils.load_distillation_config(kd, *configs)
    wrapped = {"teacher_model": built[1], "criterion": kd.criterion, "loss_balancer": kd.loss_balancer}
    model = mtd.convert(built[0], mode=[("kd_loss", wrapped)])
    utils.adjust_distillation_model_for_mcore(model, kd)
    model.train()
    return model, reduction_module._DistillationLossReduction(model.compute_kd_loss)


def simulate(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, int]:
    """Simulate a distillation step of the last pipeline stage and return its memory without gradient buffers.

    Args:
        case: the sizes "student" and "teacher", "sequences", "length", "vocabulary", "tp", "pp" and "dtype".
        settings: settings of the DistillationConfig.

    Returns:
        Bytes: ``weights`` of both models; beyond the weights, ``activations`` (held at the end of the student's forward
        pass, including both models' logits), ``forward`` (peak of the forward pass and the loss) and ``step`` (peak of
        the whole step).
    """
    from megatron.core.tensor_parallel import random
    from torch._subclasses import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    join_fake_world(case["tp"], case["pp"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, reduction = models(case, settings)
        tokens = torch.zeros(case["sequences"], case["length"], dtype=torch.int64)
        data = {"loss_mask": torch.ones(case["sequences"], case["length"])}
        if case["pp"] > 1:
            widths = [case[who]["hidden_size"] for who in ("student", "teacher")]
            shape = case["length"] // case["tp"], case["sequences"]
            model.set_student_input_tensor_shape([(*shape, widths[0])])
            received = torch.zeros(*shape, sum(widths), dtype=getattr(torch, case["dtype"]), requires_grad=True)
            model.set_input_tensor([received])
        _add_up_gradients(model)
        # The tracker registers hooks on every parameter; the teacher still runs without a graph.
        model.teacher_model.requires_grad_(True)
        tracker = MemTracker()
        tracker.track_external(model)
        # No random numbers are drawn, and the generators' states cannot be compared without data.
        fork = mock.patch.object(random.CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext())
        with fork, tracker:
            weights = _total(tracker, "current")
            output = model(tokens, tokens, None, labels=tokens)
            activations = _total(tracker, "current")
            loss, *_ = reduction.forward(data, output)
            forward = _total(tracker, "peak")
            loss.backward()
            step = _total(tracker, "peak")
    return {
        "weights": weights,
        "activations": activations - weights,
        "forward": forward - weights,
        "step": step - weights,
    }


def measured(case: dict[str, Any], settings: dict[str, Any]) -> int:
    """Run a step on real tensors and return its peak beyond models and gradient buffers, by the allocator's events.

    Args:
        case: as for `simulate`, with one rank.
        settings: settings of the DistillationConfig.
    """
    from benchmarks._measure import peak_bytes

    tiny.init_parallel()
    model, reduction = models(case, settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    _add_up_gradients(model)
    tokens = torch.randint(case["vocabulary"], (case["sequences"], case["length"]))
    data = {"loss_mask": torch.ones(case["sequences"], case["length"])}

    def step():
        loss, *_ = reduction.forward(data, model(tokens, tokens.clamp(max=1), None, labels=tokens))
        loss.backward()

    step()
    return peak_bytes(step)


def _total(tracker: Any, when: str) -> int:
    return sum(memory["Total"] for memory in tracker.get_tracker_snapshot(when).values())


def _add_up_gradients(model: torch.nn.Module) -> None:
    """Drop each gradient once it is computed, because Megatron's DDP adds it to a buffer of its own."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

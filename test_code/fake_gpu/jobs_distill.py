"""What the process with the fake GPU executes for the tests of distillation steps."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch

from test_code.fake_gpu import device, models

TEACHER = {"hidden_size": 128, "ffn_hidden_size": 256}
# Two students of Llama 3.1 8B: narrower, and with fewer layers. The pairs are one of each of four pipeline stages.
LLAMA_STUDENTS = {
    "width": {"hidden_size": 3072, "num_attention_heads": 24, "kv_channels": 128},
    "depth": {"num_layers": 24},
}
LLAMA_PAIRS = {
    "width": [(f"decoder.layers.{8 * stage + 3}", f"decoder.layers.{8 * stage + 3}") for stage in range(4)],
    "depth": [(f"decoder.layers.{6 * stage + 3}", f"decoder.layers.{8 * stage + 3}", "mse") for stage in range(4)],
}


def step(
    settings: dict[str, Any],
    tp: int = 1,
    pp: int = 1,
    stage: int = 0,
    student: dict[str, Any] | None = None,
    observing: bool = False,
    entries: int | None = None,
    teacher: dict[str, Any] | None = None,
    adapters: bool = False,
    **more: int,
) -> int:
    """Build a small distillation and run a training step of one rank, which may not wait.

    Args:
        settings: fields of a ``DistillationConfig``.
        tp: tensor-parallel ranks, with sequence parallelism; this rank is the last of its stage.
        pp: pipeline stages.
        stage: this rank's stage.
        student: overrides of the student's configuration.
        observing: whether the metrics of a logging step are computed.
        entries: vocabulary entries that both models have.
        teacher: overrides of the teacher's configuration.
        adapters: whether only adapters of the student are trained.
        **more: further arguments of `models.layout`.

    Returns:
        Number of micro-batches that this rank computed a loss of.
    """
    with models.layout(tp, pp, stage, **more) as layout:
        config = models.config(**layout, **(student or {}))
        model = build(config, models.config(**{**TEACHER, **(teacher or {})}), settings)
        if adapters:
            add_adapters(model)
        model._distillation.observing = observing
        if entries is not None:
            model._distillation.settings.criterion["output_layer", "output_layer"].entries = entries
        reports = train(model, config)
        _check_gradients(model)
        return len(reports)


def faulty_step(fault: str) -> str:
    """Return the name of the error that a fault of the balancer raises in a step of a whole model."""
    from unittest import mock

    from nemo.collections.llm.modelopt.distill import loss

    faults = {
        "item": lambda part, target: part * (target.item() / part.item()),
        "mix": lambda part, target: part + torch.zeros(1),
    }
    with mock.patch.object(loss, "rescale", faults[fault]):
        try:
            step({"skip_lm_loss": False})
        except RuntimeError as error:
            return type(error).__name__
    return "no error"


def llama_step(kind: str, stage: int, fused: str) -> int:
    """Run a training step of one rank of Llama 3.1 8B and a student of it at TP=8 and PP=4, which may not wait.

    Args:
        kind: a key of `LLAMA_STUDENTS`.
        stage: this rank's pipeline stage.
        fused: setting ``fused_logits``.

    Returns:
        Number of micro-batches that this rank computed a loss of.
    """
    settings = {"intermediate_layer_pairs": LLAMA_PAIRS[kind], "skip_lm_loss": False, "fused_logits": fused}
    with models.layout(8, 4, stage) as layout:
        config = models.llama_8b(**layout, **LLAMA_STUDENTS[kind])
        model = build(config, models.llama_8b(), settings)
        reports = train(model, config)
        _check_gradients(model)
        # Numbers of each token from each rank, and nothing of the vocabulary's size.
        assert device.largest_double() <= 64 * 2 * config.seq_length
        return len(reports)


def waits_of_a_step(settings: dict[str, Any], micro_batches: int, tp: int = 2) -> list[str]:
    """Return the places at which the host waits in a step that Megatron's data parallelism and our checks finish."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from nemo.collections.llm.modelopt.distill._update_check import check_updates

    with models.layout(tp) as layout:
        config = models.config(**layout)
        model = build(config, models.config(**TEACHER), settings)
        options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, check_for_nan_in_grad=True)
        wrapped = DistributedDataParallel(config, options, model)
        config.finalize_model_grads_func = finalize_model_grads
        check_updates(config, wrapped, model)
        with device.count() as waits:
            train(wrapped, config, micro_batches)
        return [wait.where.rpartition("modelopt/")[-1] for wait in waits]


def logged_step(observing: bool, pp: int, stage: int) -> tuple[list[str], list[str]]:
    """Return what `DistillationGPTModel` logs at the end of a step, and the places at which the host waits for it."""
    from nemo.collections.llm.modelopt import DistillationGPTModel

    with models.layout(1, pp, stage) as layout:
        config = models.config(**layout)
        nemo_model: Any = DistillationGPTModel(config, models.config(**TEACHER), "unused")
        nemo_model.module = build(config, models.config(**TEACHER), {})
        state = nemo_model.module._distillation
        state.observing, state.step = observing, 1
        nemo_model._fused_logits = False
        logged: dict[str, Any] = {}
        nemo_model.log = lambda name, value, **options: logged.update({name: value})
        train(nemo_model.module, config, reduction=nemo_model.training_loss_reduction)
        with device.count() as waits:
            nemo_model.on_train_batch_end(None, None, 0)
        assert {value.device.type for value in logged.values()} == {device.GPU}
        return sorted(logged), [wait.where.rpartition(" ")[-1] for wait in waits]


def recorded_step(folder: str, tp: int) -> int:
    """Run a training step with a recorded teacher, which may not wait."""
    import numpy as np

    from nemo.collections.llm.modelopt.distill.recorded import store
    from test_code.fake_gpu.jobs_losses import write_record

    with models.layout(tp) as layout:
        config = models.config(**layout)
        tokens = torch.zeros(2, config.seq_length, dtype=torch.long)
        write_record(folder, store.sample_keys({"tokens": tokens}), config.seq_length, config.vocab_size)
        model = build(config, models.config(**TEACHER), {}, recorded=folder)
        model.teacher_model.see({"tokens": tokens})
        assert isinstance(model.teacher_model._keys, np.ndarray)
        reports = train(model, config)
        _check_gradients(model)
        return len(reports)


def aligned_step(tp: int) -> int:
    """Run a training step with a teacher that has another tokenizer, which may not wait."""
    from nemo.collections.llm.modelopt.distill._aligned import see

    with models.layout(tp) as layout:
        config = models.config(**layout)
        model = build(
            config,
            models.config(**TEACHER, vocab_size=512),
            {"logit_kl_vocabulary": "aligned-text", "fused_logits": "off"},
        )
        state = model._distillation
        loss = state.settings.criterion[state.settings.logit_pair]
        shape = 2, config.seq_length
        see(
            state,
            loss,
            {"teacher_tokens": torch.zeros(shape).long(), "counterparts": torch.arange(shape[1]).expand(shape)},
        )
        reports = train(model, config)
        _check_gradients(model)
        return len(reports)


def validation(settings: dict[str, Any], tp: int) -> None:
    """Run both models in a validation step, which may not wait."""
    from nemo.collections.llm.modelopt.distill.model import _DistillationLossReduction

    with models.layout(tp) as layout, torch.no_grad():
        config = models.config(**layout)
        model = build(config, models.config(**TEACHER), settings)
        model.eval()
        model._distillation.observing = True
        batch = models.batch(config)
        output = models.run(model, batch)
        if settings.get("validation_metrics"):
            reduction = _DistillationLossReduction(distillation_loss_fn=model.compute_kd_loss)
            assert reduction.forward(batch, output)[-1]["kd_sums"].device.type == device.GPU


def shapes(tp: int, pp: int, stage: int, pairs: list[tuple[str, ...]]) -> tuple[list[Any], list[Any]]:
    """Return the shapes of the messages that a rank receives and sends, for sizes of Llama 3.1 8B."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_tensor_shapes

    from nemo.collections.llm.modelopt.distill.utils import get_tensor_shapes_adjust_fn_for_distillation

    with models.layout(tp, pp, stage) as layout:
        config = models.llama_8b(**layout, **LLAMA_STUDENTS["width"])
        model = build(config, models.llama_8b(), {"intermediate_layer_pairs": pairs})
        sizes = {"seq_length": config.seq_length, "micro_batch_size": 2, "decoder_seq_length": None}
        groups = {
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
            "cp_group": parallel_state.get_context_parallel_group(),
        }
        received, sent = (get_tensor_shapes(**sizes, config=config, **groups) for _ in range(2))
        widen = get_tensor_shapes_adjust_fn_for_distillation([model], config.seq_length, 2)
        assert widen is not None
        assert get_tensor_shapes_adjust_fn_for_distillation([model], config.seq_length, 2, forward_only=True) is None
        return widen(received, sent)


def provided_teacher(tp: int, pp: int, stage: int) -> tuple[list[str], int]:
    """Load a teacher of Llama's sizes, and return the places at which the host waits and the teacher's parameters."""
    from nemo.collections.llm.modelopt.distill.utils import teacher_provider

    requested: dict[str, Any] = {}

    def load_checkpoint(path, sharded_state_dict, strict=None):
        requested.update(sharded_state_dict["state_dict"])
        return {"state_dict": {name: value.data for name, value in requested.items() if hasattr(value, "data")}}

    strategy = SimpleNamespace(
        ckpt_load_strictness=None,
        unwrapped_checkpoint_io=SimpleNamespace(load_content_metadata=lambda path: None),
        checkpoint_io=SimpleNamespace(load_checkpoint=load_checkpoint),
    )
    with models.layout(tp, pp, stage) as layout, device.count() as waits:
        trainer: Any = SimpleNamespace(strategy=strategy)
        teacher = teacher_provider(models.llama_8b(**layout), "unused", None, trainer)
        assert {parameter.device.type for parameter in teacher.parameters()} == {device.GPU}
        assert all(name.startswith("module.") for name in requested)
        return [wait.where.rpartition(" ")[-1] for wait in waits], sum(p.numel() for p in teacher.parameters())


def build(student: Any, teacher: Any, settings: dict[str, Any], recorded: str | None = None) -> Any:
    """Return the distillation model of two configurations, as `DistillationGPTModel` builds it.

    Args:
        student: configuration of the student.
        teacher: configuration of the teacher.
        settings: fields of a ``DistillationConfig``.
        recorded: folder of a recorded teacher.
    """
    import modelopt.torch.distill as mtd

    from nemo.collections.llm.modelopt.distill import utils
    from nemo.collections.llm.modelopt.distill._config import DistillationConfig
    from nemo.collections.llm.modelopt.distill._teacher import derive_teacher_config
    from nemo.collections.llm.modelopt.distill.recorded.teacher import recorded_teacher

    teacher = derive_teacher_config(student, teacher)
    with device.count():
        # The numbers of a projection are drawn on the host.
        chosen = utils.load_distillation_config(DistillationConfig(**settings), student, teacher)
    chosen.sample_length = student.seq_length
    parts: dict[str, Any] = {"criterion": chosen.criterion, "loss_balancer": chosen.loss_balancer}
    parts["teacher_model"] = (
        (lambda: recorded_teacher(teacher, recorded)) if recorded else (lambda: teacher.configure_model(None))
    )
    model = mtd.convert(student.configure_model(None), mode=[("kd_loss", parts)])
    utils.adjust_distillation_model_for_mcore(model, chosen)
    with device.count():
        # NeMo moves and converts the model too: the projection of hidden states is created in fp32.
        for loss in chosen.criterion.values():
            assert all(device.on_gpu(weight) for weight in loss.parameters())
            loss.bfloat16()
        model.cuda()
    model.train()
    return model


def add_adapters(model: Any) -> None:
    """Freeze the student and add NeMo's LoRA to its attention, as its callback does."""
    from nemo.collections.llm.peft import lora, utils

    from nemo.collections.llm import fn

    if not lora.HAVE_TE:  # NeMo asks for a class of Transformer Engine
        lora.te, utils.HAVE_TE = SimpleNamespace(Linear=type("Absent", (), {})), False
    model.requires_grad_(False)
    with device.count():
        fn.walk(model, lora.LoRA(target_modules=["linear_qkv", "linear_proj"], dim=4).transform)
        model.cuda()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".adapter." in name and "_teacher_model" not in name for name in trained)


def train(wrapped: Any, config: Any, micro_batches: int = 2, reduction: Any = None) -> list[Any]:
    """Run a training step with Megatron's own schedule of this layout, and return its reports.

    Args:
        wrapped: result of `build`, wrapped or not.
        config: configuration of the student.
        micro_batches: number of micro-batches.
        reduction: reduction of the losses.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from nemo.utils.model_utils import unwrap_model

    from nemo.collections.llm.modelopt.distill.model import _DistillationLossReduction
    from nemo.collections.llm.modelopt.distill.utils import get_tensor_shapes_adjust_fn_for_distillation

    core = unwrap_model(wrapped)
    pairs = core._distillation.settings.intermediate_layer_pairs
    reduction = reduction or _DistillationLossReduction(distillation_loss_fn=core.compute_kd_loss, pairs=pairs)
    batch = models.batch(config)
    sizes = {"seq_length": config.seq_length, "micro_batch_size": len(batch["tokens"])}

    def forward_step(batches, stage):
        inputs = next(batches)
        return models.run(stage, inputs), lambda output: reduction.forward(inputs, output)

    widen = get_tensor_shapes_adjust_fn_for_distillation(wrapped, **sizes)
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=itertools.repeat(batch),
        model=[wrapped],
        num_microbatches=micro_batches,
        **({"adjust_tensor_shapes_fn": widen} if widen else {}),
        **sizes,
    )
    if reports:
        assert reduction.reduce(reports).device.type == device.GPU
    return reports


def _check_gradients(model: Any) -> None:
    """Check that every parameter of the student has a gradient on its device, and none of the teacher."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or "_teacher_model" in name:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.device == parameter.device, name

"""NaN in a training: every rank stops before the weights are updated, and the losses never wait for the device."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from torch.utils._python_dispatch import TorchDispatchMode

from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from test_code.support import command_lines, jobs_prune, tiny
from test_code.support import jobs_distill as jobs
from test_code.support import ranks as rank_pools


@pytest.fixture(scope="module")
def teacher_path(ranks_factory, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "checkpoint"
    return ranks_factory(2).run(jobs.teacher, str(path))[0]


class Break(pl.Callback):
    """Put NaN into the data, a model or a gradient before a step, and keep the student's weights from then."""

    def __init__(self, what, step, only_rank):
        self.what, self.step, self.weights = what, step, {}
        self.here = only_rank is None or int(os.environ["RANK"]) == only_rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step + 1 != self.step:
            return
        core = tiny.core(pl_module)
        self.weights = {name: weight.detach().clone() for name, weight in core.named_parameters()}
        if not self.here or self.what == "data":
            return
        if self.what == "gradient":
            core.decoder.layers[0].mlp.linear_fc2.weight.register_hook(lambda gradient: gradient * torch.nan)
            return
        model = core if self.what == "student" else core.teacher_model
        with torch.no_grad():
            model.decoder.layers[0].mlp.linear_fc2.weight[0, 0] = torch.nan


def broken_trainings(teacher_path, cases, settings=None, check_gradients=True, **layout):
    """Return, by case, the error of a training and whether the student's weights are those before the broken step."""
    results = {}
    original = tiny.TinyDataset.__getitem__
    ddp = DistributedDataParallelConfig(check_for_nan_in_grad=check_gradients)
    for what, step, only_rank in cases:
        model = jobs.distillation_model(teacher_path, settings)
        breaks = Break(what, step, only_rank)

        def item(self, index, breaks=breaks):
            sample = original(self, index)
            if breaks.here and breaks.what == "data" and index >= 4 * (breaks.step - 1):
                sample["loss_mask"] = sample["loss_mask"] * torch.nan
            return sample

        with mock.patch.object(tiny.TinyDataset, "__getitem__", item):
            try:
                tiny.fit(model, tiny.data(), max_steps=4, callbacks=[breaks], strategy_kwargs={"ddp": ddp}, **layout)
                results[what] = ("no error", False)
            except ValueError as error:
                now = dict(tiny.core(model).named_parameters())
                same = [torch.equal(now[name].nan_to_num(7), w.nan_to_num(7)) for name, w in breaks.weights.items()]
                # The broken weight itself differs.
                results[what] = (str(error), len(same) - sum(same) <= 1)
        assert ddp.check_for_nan_in_grad is check_gradients  # the caller's settings are not changed
        rank_pools.reset()
    return results


REASONS = {
    "student": "lower learning rate",
    "teacher": "teacher's outputs hold NaN",
    "data": "loss mask of the batch",
    "gradient": "The gradient of step 2 is not finite, although the losses are",
}


def check(results, cases):
    messages = [found[what][0] for what, *_ in cases for found in results]
    assert len(set(messages)) == len(cases), "all ranks raise the same error"
    for what, step, only_rank in cases:
        message, unchanged = results[0][what]
        assert REASONS[what] in message and "the same command resumes from it" in message
        if what != "gradient":
            assert f"The loss of step {step} is not finite (kd_loss=nan" in message, message
        assert ("first on rank" in message) is bool(only_rank)
        assert all(found[what][1] for found in results)


@pytest.mark.parametrize("fused", ["on", "off"])
def test_the_first_loss_that_is_not_finite_ends_the_training(ranks, teacher_path, tmp_path, fused):
    """It names what is broken, and comes before the weights are updated."""
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"fused_logits: {fused}\nskip_lm_loss: false\n")
    cases = [("student", 3, None), ("teacher", 2, None), ("data", 3, None)]
    check(ranks(2).run(broken_trainings, teacher_path, cases, str(settings), tp=2), cases)


def test_no_rank_raises_alone(ranks, teacher_path):
    """NaN on one data-parallel rank only; before, the other waited for its gradients."""
    cases = [("data", 2, 1), ("student", 2, 1), ("teacher", 2, 1)]
    check(ranks(2).run(broken_trainings, teacher_path, cases), cases)


def test_a_gradient_that_is_not_finite_ends_the_training(ranks, teacher_path):
    check(ranks(2).run(broken_trainings, teacher_path, [("gradient", 2, None)]), [("gradient", 2, None)])


def test_pipeline_stages_raise_together(ranks, teacher_path):
    """Only the last stage, here rank 1, has losses and a loss mask."""
    check(ranks(2).run(broken_trainings, teacher_path, [("data", 2, 1)], pp=2), [("data", 2, 1)])


def broken_command(folder, arguments, step):
    """Run the command's work twice on this rank, the second time with a broken batch; return error and checkpoints."""
    command = command_lines.script_of("distill")
    make_trainer, messages = command.make_trainer, []

    def broken_trainer(given):
        trainer = make_trainer(given)
        trainer.callbacks.append(Break("student", step, 1))
        return trainer

    for steps, make in ((step - 1, make_trainer), (step + 1, broken_trainer), (step + 1, make_trainer)):
        with mock.patch.object(command, "make_trainer", make):
            try:
                command.work(command.resolve([*arguments, "--max_steps", str(steps)]))
                messages.append("finished")
            except ModelOptConfigError as error:
                messages.append(str(error))
        checkpoints = sorted(path.name for path in Path(folder, "log", "kd", "checkpoints").glob("*-last"))
        messages.append(checkpoints)
        rank_pools.reset()
    return messages


@pytest.mark.cpu
@pytest.mark.slow
def test_the_command_keeps_its_checkpoint_and_resumes_from_it(ranks, tmp_path):
    """Two data-parallel ranks, one with NaN."""
    texts = tiny.texts(40)
    for name, rows in (("text", texts[:30]), ("heldout", texts[30:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    ranks(1).run(jobs_prune.save_checkpoint, str(tmp_path / "model"))
    arguments = f"--cpu --devices 2 --name kd --log_dir {tmp_path}/log --model_path {tmp_path}/model --teacher_path "
    arguments += (
        f"{tmp_path}/model --text {tmp_path}/text.jsonl --heldout_text {tmp_path}/heldout.jsonl --seq_length 32 "
    )
    arguments += "--gbs 4 --mbs 2 --val_check_interval 1 --limit_val_batches 1 --save_minutes 0"
    for found in ranks(2).run(broken_command, str(tmp_path), arguments.split(), 3, timeout=240):
        first, before, broken, kept, resumed, after = found
        assert first == resumed == "finished"
        assert "The loss of step 3 is not finite" in broken and "first on rank 1" in broken
        assert kept == before and len(kept) == 1 and "consumed_samples=8.0" in kept[0]
        assert len(after) == 1 and "consumed_samples=16.0" in after[0]


class Waits(TorchDispatchMode):
    """Count what would wait for a device: tensors that become numbers of Python, and sizes that depend on values."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.strip("_") in [name.strip("_") for name in self.NAMES]:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def waits_in_losses(teacher_path, paths):
    """Return what waits for the device in the losses of three steps, and how often they were computed, by settings."""
    from nemo.collections.llm.modelopt.distill import model as module

    reduction = module._DistillationLossReduction
    results = []
    for path in paths:
        waits, calls = Waits(), []

        def forward(self, batch, output, original=reduction.forward, waits=waits, calls=calls):
            calls.append(1)
            with waits:
                return original(self, batch, output)

        with jobs.alone(), mock.patch.object(reduction, "forward", forward):
            jobs.distill(teacher_path, path, steps=2)
        rank_pools.reset()
        results.append((waits.found, len(calls)))
    return results


def test_the_losses_do_not_wait_for_the_device(ranks, teacher_path, tmp_path):
    with Waits() as waits:
        assert torch.tensor(1.0) > 0
    assert waits.found, "a comparison on the host is not noticed"
    pair = "intermediate_layer_pairs: [[decoder.final_layernorm, decoder.final_layernorm]]\n"
    texts = ["", pair + "skip_lm_loss: false\n", "logit_kl_topk: 5\n", "logit_kl_direction: jsd\n"]
    paths = [tmp_path / f"{i}.yaml" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    (found,) = ranks(1).run(waits_in_losses, teacher_path, [str(path) for path in paths])
    assert [waits for waits, _ in found] == [[]] * len(texts)
    assert all(calls == 4 for _, calls in found)  # two micro-batches in each of two steps


def test_the_first_broken_micro_batch_is_reported(cpu_backend):
    from nemo.collections.llm.modelopt.distill import _finite

    flags = _finite.FiniteFlags()
    for value, mask in ((1.0, 1.0), (torch.inf, 1.0), (torch.nan, torch.nan), (2.0, 1.0)):
        losses = {"kd_loss": torch.tensor(value, requires_grad=True), "logits_loss": torch.tensor(value)}
        flags.see_loss(losses, torch.tensor([mask]))
    assert bool(flags.broken())
    level, text = flags.report(7)
    assert level == 1 and "The loss of step 7 is not finite (kd_loss=inf, logits_loss=inf)" in text
    assert _finite.FiniteFlags().broken() is None and _finite.FiniteFlags().report(1) is None


@pytest.mark.parametrize(
    ("losses", "warned"),
    [
        ([1.0] * 20, False),
        ([2.0, *[1.0] * 9, 9.0], True),
        ([1.0] * 5 + [1.2] * 20, False),
        ([0.5] * 5 + [1.0] * 9, True),
    ],
)
def test_a_rising_loss_is_warned_about_once(losses, warned):
    from nemo.collections.llm.modelopt.distill import _finite

    watch = _finite.LossWatch()
    with mock.patch.object(_finite, "logging") as logging:
        for step, loss in enumerate(losses):
            watch.see(loss, step)
    assert logging.warning.call_count == warned
    if warned:
        assert "the logits loss rises" in logging.warning.call_args.args[0]

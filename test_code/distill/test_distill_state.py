"""What a distillation holds and keeps: aligned vocabularies, checkpoints, the optimizer, and one curve everywhere."""

from __future__ import annotations

import contextlib
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from test_code.support import jobs_distill, ranks, tiny, tolerances

EARLY = """
intermediate_layer_pairs:
  - [decoder.layers.0, decoder.layers.1, mse]
  - [decoder.final_layernorm, decoder.final_layernorm]
"""
PAIR = "intermediate_layer_pairs: [[decoder.final_layernorm, decoder.final_layernorm]]\n"


def teacher_rows(teacher_path, student_vocabulary, teacher_vocabulary):
    """Distill one step at TP=2 and return (losses, metrics, the teacher's whole embedding and output weight)."""
    from megatron.core import parallel_state

    recorder = jobs_distill.Metrics()
    model = jobs_distill.distillation_model(
        teacher_path, None, {"vocab_size": student_vocabulary}, {"vocab_size": teacher_vocabulary}
    )
    losses = tiny.fit(model, max_steps=1, tp=2, callbacks=[recorder])
    teacher = tiny.core(model).teacher_model
    weights = []
    for weight in (teacher.embedding.word_embeddings.weight, teacher.output_layer.weight):
        shards = [torch.empty_like(weight) for _ in range(2)]
        torch.distributed.all_gather(
            shards, weight.detach().contiguous(), group=parallel_state.get_tensor_model_parallel_group()
        )
        weights.append(torch.cat(shards))
    return losses, recorder.steps, weights


def loss_of_first_entries(entries):
    """Return, by number of entries that count, this rank's loss and gradient at TP=2, and those of fp64."""
    from types import SimpleNamespace

    from nemo.collections.llm.modelopt.distill.loss import LogitsKLLoss

    tiny.init_parallel(tp=2)
    part = slice(8 * torch.distributed.get_rank(), 8 * torch.distributed.get_rank() + 8)
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(5, 2, 16, generator=generator) * 3 for _ in range(2))
    results = {}
    for number in entries:
        loss = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=2, sequence_parallel=False))
        loss.entries = number
        mine = student[..., part].clone().requires_grad_()
        value = loss(mine, teacher[..., part].clone())[0]
        value.sum().backward()
        expected, gradient = jobs_distill.reference_kl(
            student[..., :number], teacher[..., :number], 1.0, "forward", torch.ones(5, 2)
        )
        whole = torch.zeros(5, 2, 16).double()
        whole[..., :number] = gradient
        results[number] = (value.detach().double(), expected.t(), mine.grad.double(), whole[..., part])
    return results


class Projection(pl.Callback):
    """Keep the projections as they are when training starts, and write both kinds of checkpoint at its end."""

    def __init__(self, folder=None):
        self.folder, self.weights = folder, []

    def on_train_start(self, trainer, pl_module):
        self.weights = [p.detach().clone() for p in tiny.core(pl_module).loss_modules.parameters()]

    def on_train_end(self, trainer, pl_module):
        self.weights_at_end = [p.detach().clone() for p in tiny.core(pl_module).loss_modules.parameters()]
        if self.folder is not None:
            tiny.save(trainer, self.folder / "full")
            trainer.save_checkpoint(self.folder / "weights only", weights_only=True)


def checkpoints(teacher_path, settings, folder):
    """Distill with a projection, save, resume; return the contents of the checkpoints and the training."""
    from nemo.collections.llm.modelopt import _saved_keys

    folder, student = Path(folder), {"hidden_size": 32}
    first = Projection(folder)
    model = jobs_distill.distillation_model(teacher_path, settings, student)
    tiny.fit(model, max_steps=2, callbacks=[first], tp=2)
    core = tiny.core(model)
    in_optimizer = sum(
        p.numel() for group in model.optimizers(use_pl_optimizer=False).param_groups for p in group["params"]
    )
    projection = sum(p.numel() for p in core.loss_modules.parameters())
    own = sum(p.numel() for p in core.parameters() if p.requires_grad)
    teacher = sum(p.numel() for p in core.teacher_model.parameters())
    bytes_of = {
        kind: sum(f.stat().st_size for f in (folder / kind / "weights").rglob("*.distcp"))
        for kind in ("full", "weights only")
    }
    keys = {kind: _saved_keys.saved_keys(folder / kind) for kind in ("full", "weights only")}
    ranks.reset()

    again = Projection()
    model = jobs_distill.distillation_model(teacher_path, settings, student)
    trainer = tiny.trainer(max_steps=3, tp=2, callbacks=[again])
    trainer.fit(model, tiny.data(), ckpt_path=str(folder / "full"))
    return {
        "keys": keys,
        "bytes": bytes_of,
        "sizes": {"optimizer": in_optimizer, "student": own - projection, "projection": projection, "teacher": teacher},
        "end": first.weights_at_end,
        "resumed": again.weights,
        "later": again.weights_at_end,
        "steps": trainer.global_step,
    }


def early_projection(teacher_path, settings, path):
    """Distill at PP=2 with other hidden sizes, save, and return (keys, how far projections moved, metrics)."""
    from nemo.collections.llm.modelopt import _saved_keys

    recorder, projection = jobs_distill.Metrics(), Projection()
    model = jobs_distill.distillation_model(teacher_path, settings, {"hidden_size": 32, "num_layers": 2})
    tiny.fit(model, max_steps=2, save_to=path, callbacks=[recorder, projection], pp=2)
    moved = [(a - b).abs().max() for a, b in zip(projection.weights, projection.weights_at_end, strict=True)]
    return _saved_keys.saved_keys(path), float(min(moved)), recorder.steps


def curves_on_ranks(teacher_path, settings, steps):
    """Return the curve of a distillation of ``steps`` steps in each layout of two ranks, and alone."""
    import contextlib

    layouts = {"1 rank": {}, "TP=2": {"tp": 2}, "TP=2 SP": {"tp": 2, "sp": True}, "PP=2": {"pp": 2}, "DP=2": {}}
    found = {}
    for layout, arguments in layouts.items():
        # The same student everywhere: pipeline stages draw their weights in another order.
        with jobs_distill.alone() if layout == "1 rank" else contextlib.nullcontext():
            model = jobs_distill.distillation_model(teacher_path, settings, {"ffn_hidden_size": 128, "num_layers": 2})
            data = tiny.data(samples=4 * steps)
            found[layout] = tiny.fit(model, data, restore=teacher_path + "-student", max_steps=steps, **arguments)
        ranks.reset()
    return found


def watched(teacher_path, settings):
    """Return, by layout, what is logged of each step, and the teacher's own language-model loss on the first batch."""
    layouts = {"1 rank": {}, "TP=2": {"tp": 2}, "PP=2": {"pp": 2}, "DP=2": {}}
    results = {}
    for name, layout in layouts.items():
        with jobs_distill.alone() if name == "1 rank" else contextlib.nullcontext():
            # At PP=2 a pair lies on either stage.
            _, steps, _ = jobs_distill.distill(teacher_path, settings, metrics=True, steps=4, **layout)
        ranks.reset()
        with jobs_distill.alone() if name == "1 rank" else contextlib.nullcontext():
            own = tiny.fit(tiny.model(), restore=teacher_path, max_steps=1, **layout)[0]
        ranks.reset()
        results[name] = steps, own
    return results


def observed_of_shards(entries):
    """Return the metrics observed over a vocabulary split over two ranks, and those of one process in fp64."""
    from nemo.collections.llm.modelopt.distill._metrics import observed

    tiny.init_parallel(tp=2)
    rank, v = torch.distributed.get_rank(), 12
    generator = torch.Generator().manual_seed(3)
    student, teacher = (3 * torch.randn(7, 2, 2 * v, generator=generator) for _ in range(2))
    teacher[::2] = student[::2] + 0.1 * teacher[::2]  # some agree
    labels = torch.randint(min(2 * v, entries or 2 * v), (2, 7), generator=generator)
    shards = [x[..., rank * v :][..., :v] for x in (student, teacher)]
    found = observed(*shards, labels, entries)
    z, y = (x[..., :entries].double().transpose(0, 1) for x in (student, teacher))
    loss = torch.nn.functional.cross_entropy(y.flatten(0, 1), labels.flatten(), reduction="none").view(2, 7)
    return found, {"teacher_lm_loss": loss, "top1_agreement": (z.argmax(-1) == y.argmax(-1)).double()}


def loading_peak(path):
    """Save a teacher of 8 MB, load it, and return (bytes of its weights, most bytes allocated at one time)."""
    from nemo.collections.llm.modelopt.distill.utils import teacher_provider

    settings = {"num_layers": 12, "hidden_size": 128, "ffn_hidden_size": 384}
    tiny.fit(tiny.model(**settings), save_to=path, max_steps=1)
    ranks.reset()
    trainer = tiny.trainer()
    model = tiny.model(**settings)
    trainer.strategy.connect(model)
    trainer.strategy._lightning_module = model
    trainer.strategy.setup_environment()
    found: list = []
    peak = tiny.peak_bytes(lambda: found.append(teacher_provider(model.config, path, model.tokenizer, trainer)))
    return sum(p.numel() * p.element_size() for p in found[0].parameters()), peak


def validated(teacher_path, settings, tp, same):
    """Return what validation logs of a student (the teacher, or another), and of the teacher as a plain model."""
    every = {"max_steps": 1, "tp": tp, "limit_val_batches": 2, "val_check_interval": 1}
    recorder, plain = Validation(), Validation()
    model = jobs_distill.distillation_model(teacher_path, settings, {"ffn_hidden_size": 128})
    model.optim.config.lr = 1e-12
    arguments = {"restore": teacher_path} if same else {}
    # With masks: one micro-batch has more tokens that count than another.
    tiny.fit(model, tiny.data(masked=True), callbacks=[recorder], **every, **arguments)
    ranks.reset()
    own = tiny.model(optimizer=tiny.optim(lr=1e-12))
    tiny.fit(own, tiny.data(masked=True), callbacks=[plain], restore=teacher_path, **every)
    return recorder.logged, plain.logged


class Validation(pl.Callback):
    """Keep what is logged at the end of a validation."""

    def on_validation_end(self, trainer, pl_module):
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items() if "val_" in name}


@pytest.fixture(scope="module")
def folder(ranks_factory, tmp_path_factory):
    """Return a folder with a teacher, one with more padding, and a plain student to start from."""
    folder = tmp_path_factory.mktemp("state")
    pool = ranks_factory(2)
    pool.run(jobs_distill.teacher, str(folder / "teacher"))
    pool.run(jobs_distill.teacher, str(folder / "padded"), vocab_size=264)
    pool.run(jobs_distill.teacher, str(folder / "teacher-student"), num_layers=2)
    (folder / "pair.yaml").write_text(PAIR)
    # At PP=2 the first pair is on the first stage of both models (of 2 and of 4 layers).
    (folder / "early.yaml").write_text(EARLY)
    return folder


def test_vocabularies_padded_differently_align(ranks, folder):
    run = ranks(2).run
    _, _, same = run(teacher_rows, str(folder / "teacher"), 256, 256)[0]
    losses, steps, widened = run(teacher_rows, str(folder / "teacher"), 264, 256)[0]
    for weight, wide in zip(same, widened, strict=True):
        assert torch.equal(wide[:256], weight) and (wide[256:] == 0).all() and len(wide) == 264
    assert losses[0] > 0 and 0.0 <= steps[0]["kd_top1_agreement"] <= 1.0
    losses, _, cut = run(teacher_rows, str(folder / "padded"), 256, 264)[0]
    assert losses[0] > 0 and [len(weight) for weight in cut] == [256, 256]
    assert all(weight.isfinite().all() and (weight != 0).any(-1).all() for weight in cut)


def test_entries_that_one_model_lacks_do_not_count(ranks):
    # The second shard's padding begins inside it, at its edge, and before it.
    for results in ranks(2).run(loss_of_first_entries, [12, 8, 5]):
        for value, expected, gradient, expected_gradient in results.values():
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=2e-6)


def test_checkpoints_and_optimizer_hold_what_is_trained(ranks, folder):
    results = ranks(2).run(checkpoints, str(folder / "teacher"), str(folder / "pair.yaml"), str(folder / "saved"))
    for result in results:
        sizes = result["sizes"]
        assert sizes["optimizer"] == sizes["student"] + sizes["projection"] and sizes["projection"] == 32 * 64 + 64
        full, weights = result["keys"]["full"], result["keys"]["weights only"]
        assert any("_loss_modules" in key for key in full)
        assert weights and not any("_loss_modules" in key or "_teacher" in key for key in weights)
        assert not any("_teacher" in key for key in full)
        # fp32 shards of two ranks, and the files' headers: the teacher would be 700 kB more.
        assert 0 < result["bytes"]["weights only"] < 2 * 4 * sizes["student"] + 150_000
        # Weights, and two moments and a master copy of each at most.
        assert result["bytes"]["full"] < 2 * 4 * 4 * sizes["optimizer"] + 150_000
        assert result["steps"] == 3
        for saved, resumed, later in zip(result["end"], result["resumed"], result["later"], strict=True):
            assert torch.equal(saved, resumed) and not torch.equal(resumed, later)
    # Both ranks continue with the same projection.
    assert all(torch.equal(a, b) for a, b in zip(results[0]["later"], results[1]["later"], strict=True))


def test_a_projection_of_an_earlier_stage_is_trained_and_saved_apart(ranks, folder):
    results = ranks(2).run(early_projection, str(folder / "teacher"), str(folder / "early.yaml"), str(folder / "early"))
    for keys, moved, steps in results:
        assert moved > 0
        assert len([key for key in keys if "_loss_modules.stage_0." in key and "optimizer" not in key]) == 2
        assert [step["kd_intermediate_loss"] > 0 for step in steps] == [True, True]
    assert results[0][2][0]["kd_loss"] == results[1][2][0]["kd_loss"]


@pytest.fixture(scope="module")
def curves(ranks_factory, folder):
    return ranks_factory(2).run(curves_on_ranks, str(folder / "teacher"), str(folder / "early.yaml"), 20, timeout=400)


@pytest.mark.parametrize("layout", ["TP=2", "TP=2 SP", "PP=2", "DP=2"])
def test_twenty_steps_give_the_same_curve_in_every_layout(curves, layout):
    alone = curves[0]["1 rank"]
    assert len(alone) == 20 and alone[-1] < 0.9 * alone[0]
    for rank in range(2):
        # fp32 sums in another order, twenty optimizer steps on.
        assert curves[rank][layout] == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("entries", [None, 17, 12, 9])
def test_what_is_observed_of_a_split_vocabulary(ranks, entries):
    for found, expected in ranks(2).run(observed_of_shards, entries):
        assert 0.2 < expected["top1_agreement"].mean() < 0.9
        for name, value in expected.items():
            torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)


WATCHED = """
skip_lm_loss: false
intermediate_layer_pairs:
  - [decoder.layers.0, decoder.layers.1, mse]
  - [decoder.layers.3, decoder.layers.3]
"""


def test_what_is_logged(ranks, folder, tmp_path):
    (tmp_path / "watched.yaml").write_text(WATCHED)
    first = None
    for layout, (steps, teacher_loss) in (
        ranks(2).run(watched, str(folder / "teacher"), str(tmp_path / "watched.yaml"))[0].items()
    ):
        pairs = [
            "kd_intermediate_loss/decoder.layers.0-decoder.layers.1",
            "kd_intermediate_loss/decoder.layers.3-decoder.layers.3",
        ]
        for step in steps:
            assert step["tokens_per_second"] > 0
            # fp32 means of the same numbers in another order.
            mean = (step[pairs[0]] + step[pairs[1]]) / 2
            assert step["kd_intermediate_loss"] == pytest.approx(mean, rel=tolerances.of("loss")), layout
            assert step[pairs[1]] > 2 * step[pairs[0]] > 0, layout
        # A plain training of the teacher begins with this loss on the same batch.
        assert steps[0]["teacher_lm_loss"] == pytest.approx(teacher_loss, rel=tolerances.of("loss")), layout
        if layout in ("1 rank", "DP=2"):  # with a split model the student begins with other weights
            first = first or steps[0]
            for name in ("kd_top1_agreement", *pairs):
                assert steps[0][name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), (layout, name)


def test_loading_a_teacher_takes_little_more_than_its_weights(ranks, tmp_path):
    weights, peak = ranks(1).run(loading_peak, str(tmp_path / "teacher"))[0]
    assert weights > 8_000_000
    # In addition to the model, one tensor at a time is read.
    assert weights < peak < 1.1 * weights


@pytest.mark.parametrize("tp", [1, 2])
def test_validation_logs_what_training_logs(ranks, folder, tmp_path, tp):
    (tmp_path / "watched.yaml").write_text(WATCHED + "validation_metrics: true\n")
    paths = str(folder / "teacher"), str(tmp_path / "watched.yaml")
    found, plain = ranks(2).run(validated, *paths, tp, True)[0]
    pairs = [name for name in found if name.startswith("val_kd_intermediate_loss/")]
    assert len(pairs) == 2
    # The student is the teacher: fp32 rounding is left.
    assert found["val_kd_top1_agreement"] == 1 and abs(found["val_kd_logits_loss"]) < 1e-6
    assert found["val_lm_loss"] == pytest.approx(found["val_teacher_lm_loss"], rel=1e-6)
    assert found["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-6)
    assert found["val_teacher_lm_loss"] == pytest.approx(plain["val_loss"], rel=0.02)  # NeMo's is the mean of means
    other, _ = ranks(2).run(validated, *paths, tp, False)[0]
    assert other["val_kd_logits_loss"] > 1e-3 and other["val_kd_top1_agreement"] < 1
    assert other["val_teacher_lm_loss"] == pytest.approx(found["val_teacher_lm_loss"], rel=1e-6)
    assert other["val_lm_loss"] != pytest.approx(found["val_lm_loss"], rel=1e-4)

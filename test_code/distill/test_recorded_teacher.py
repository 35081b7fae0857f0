"""A teacher recorded once, and trainings that do without it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from test_code.support import jobs_distill, ranks, tiny

SETTINGS = "logit_kl_topk: 7\nlogit_kl_temperature: 2.0\n"

TOPK = 7


def record_on_ranks(teacher_path, output, settings=None, steps=4, data=None, **layout):
    """Record a teacher and return what the data module's own loader is afterwards."""
    from nemo.collections.llm.modelopt.distill import dump_teacher_topk

    module = tiny.data(**(data or {}))
    dump_teacher_topk(teacher_path, output, module, tiny.trainer(**layout), steps, settings, tiny.tokenizer(), "test")
    return "val_dataloader" in vars(module)


def bars_of_recording(teacher_path, folder, settings):
    """Return the position and the total of each bar; a step has two micro-batches."""
    from unittest import mock

    from nemo_modelopt_dropin.console import screen

    bars, make = [], screen.bar

    def watched(*args, **options):
        bars.append(make(*args, **options))
        return bars[-1]

    own = f"{folder}/bars-{os.environ['RANK']}"
    shown = mock.patch.multiple(screen, is_quiet=lambda: True, bar=watched)
    with jobs_distill.alone(), shown:
        record_on_ranks(teacher_path, own, settings, data={"global_batch_size": 4, "micro_batch_size": 2})
    return [(bar.n, bar.total) for bar in bars]


def record_everywhere(teacher_path, folder, settings):
    """Record in every layout of two ranks."""
    layouts = {"tp": {"tp": 2}, "pp": {"pp": 2}, "dp": {}}
    for name, layout in layouts.items():
        record_on_ranks(teacher_path, f"{folder}/{name}", settings, **layout)
        ranks.reset()
    # Both ranks are alone here: each has a folder of its own.
    own = f"{folder}/one-{os.environ['RANK']}"
    with jobs_distill.alone():
        record_on_ranks(teacher_path, own, settings)


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
    """Return, by case, this rank's loss and gradient of a recorded teacher, and those computed from its logits."""
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
    """Return the error of a job, by name, that must raise one."""
    from nemo.collections.llm.modelopt import ModelOptConfigError

    try:
        globals()[job](*args, **kwargs)
    except ModelOptConfigError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def folder(ranks_factory, tmp_path_factory):
    """Return a folder with a teacher and its recordings made at one rank, TP=2, PP=2 and DP=2."""
    folder = tmp_path_factory.mktemp("recorded")
    ranks_factory(2).run(jobs_distill.teacher, str(folder / "teacher"))
    (folder / "topk.yaml").write_text(SETTINGS)
    (folder / "with_lm.yaml").write_text(SETTINGS + "skip_lm_loss: false\nloss_weights: {kd_logits: 2, lm: 0.5}\n")
    ranks_factory(2).run(record_everywhere, str(folder / "teacher"), str(folder), str(folder / "topk.yaml"))
    return folder


def _manifest(path: Path) -> dict:
    return json.loads((path / "teacher_topk.json").read_text())


@pytest.mark.parametrize("layout", ["tp", "pp", "dp"])
def test_every_layout_records_the_same(folder, layout, cpu_backend):
    from nemo.collections.llm.modelopt.distill.recorded.store import Recording

    one, other = Recording(folder / "one-0"), Recording(folder / layout)
    facts = [dataclasses.asdict(recording.manifest) for recording in (one, other)]
    shards = [found.pop("shards") for found in facts]
    assert facts[0] == facts[1] and facts[0]["samples"] == 16 and facts[0]["topk"] == 7
    assert [sum(found.values()) for found in shards] == [16, 16] and len(shards[1]) == (2 if layout == "dp" else 1)
    keys = np.concatenate([shard["keys"] for shard in one._shards])
    assert len({tuple(key) for key in keys}) > 4
    records = [recording.find(keys) for recording in (one, other)]
    # fp32 products are summed in another order at TP=2.
    torch.testing.assert_close(records[0].values, records[1].values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(records[0].rest, records[1].rest, rtol=1e-5, atol=1e-5)
    assert (records[0].entries == records[1].entries).float().mean() > 0.99


def test_the_bar_of_a_recording_counts_steps(ranks, folder):
    paths = str(folder / "teacher"), str(folder), str(folder / "topk.yaml")
    assert ranks(2).run(bars_of_recording, *paths)[0] == [(4, 4)]


@pytest.mark.parametrize("objective", ["topk", "with_lm"])
def test_losses_are_those_with_the_teacher(ranks, folder, objective):
    paths = str(folder / "teacher"), str(folder), str(folder / f"{objective}.yaml")
    for layout, (online, offline) in ranks(2).run(losses_of_both, *paths)[0].items():
        for with_teacher, without in zip(online[1], offline[1], strict=True):
            for name in ("reduced_train_loss", "kd_logits_loss", "kd_loss", "lm_loss"):
                if name in with_teacher:
                    # fp32 sums in another order, and what a step makes of them in the next.
                    assert without[name] == pytest.approx(with_teacher[name], abs=2e-6, rel=1e-3), (layout, name)
        assert online[1][0]["kd_logits_loss"] > 2e-3, layout


def test_no_teacher_is_held(ranks, folder):
    for result in ranks(2).run(held, str(folder / "dp"), str(folder / "topk.yaml")):
        assert result["teacher"] == 0 and result["keys"] == []


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("topk", [None, 4])
def test_divergence_over_a_split_vocabulary(ranks, direction, topk):
    cases = [(direction, temperature, topk, scale) for temperature in (1.0, 3.0) for scale in (1.0, 30.0)]
    for results in ranks(2).run(divergences, cases):
        for case, ((loss, gradient), (expected, expected_gradient)) in results.items():
            torch.testing.assert_close(loss, expected, rtol=2e-5, atol=2e-6, msg=str(case))
            torch.testing.assert_close(gradient, expected_gradient, rtol=2e-4, atol=2e-5, msg=str(case))


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    n=st.integers(1, 7),
    v=st.integers(2, 33),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    direction=st.sampled_from(["forward", "reverse", "jsd"]),
    in_place=st.booleans(),
)
def test_divergence_of_any_logits(cpu_backend, data, n, v, scale, dtype, direction, in_place):
    from nemo.collections.llm.modelopt._divergence.recorded_topk import RecordedLogits, recorded_divergence, top_entries
    from nemo.collections.llm.modelopt._divergence.vocab_parallel import kl_divergence

    k = data.draw(st.integers(1, v))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    student, teacher = ((scale * torch.randn(n, v)).to(dtype) for _ in range(2))
    if data.draw(st.booleans()):
        student[:, 0] = teacher[:, 0] = -torch.inf
    entries, values, rest = top_entries(teacher, k, 2.0)
    record = RecordedLogits(entries[:, None], values[:, None], rest[:, None], 2.0)
    mine, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = recorded_divergence(mine.view(n, 1, v) * 1, record, direction, in_place=in_place)
    expected = kl_divergence(theirs.view(n, 1, v), teacher.view(n, 1, v), 2.0, direction, topk=k)
    # Equal logits may be ordered differently: the value is the same.
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.sum().backward()
    expected.sum().backward()
    if len(set(teacher.flatten().tolist())) == teacher.numel():
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=tolerance, atol=tolerance)


class TestRefused:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("logit_kl_temperature: 1.0", r"recorded for logit_kl_temperature=2.0, the settings have 1.0"),
            ("logit_kl_temperature: 2.0\nlogit_kl_topk: 8", "7 entries were recorded, logit_kl_topk=8 needs more"),
            (SETTINGS + "fused_logits: on", "needs the teacher's output layer; use 'auto'"),
            (
                SETTINGS + "intermediate_layer_pairs: [[decoder.layers.1, decoder.layers.1]]",
                "intermediate_layer_pairs need the teacher's activations",
            ),
        ],
    )
    def test_settings(self, ranks, folder, tmp_path, text, message):
        (tmp_path / "settings.yaml").write_text(text)
        found = ranks(1).run(refusal, "alone_from", str(folder / "tp"), str(tmp_path / "settings.yaml"))[0]
        assert re.search(message, found), found

    @pytest.mark.parametrize(
        ("data", "message"),
        [({"seed": 5}, "sample is not among the 16"), ({"seq_length": 16}, "sample is not among the 16")],
    )
    def test_other_data(self, ranks, folder, data, message):
        found = ranks(1).run(refusal, "alone_from", str(folder / "tp"), str(folder / "topk.yaml"), data)[0]
        assert re.search(message, found), found

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tokenizer": {"vocab_size": 999}}, r"its tokenizer was \{'vocab_size': 999\}, the student's is"),
            ({"largest_entry": 5000}, "entry 5000 was recorded, the student's vocabulary has 256"),
            ({"seq_length": 99}, "is damaged"),
            ({"format": 2}, "has format 2; this version reads 1"),
            ({"unknown": 1}, "is not a valid manifest of a recorded teacher"),
        ],
    )
    def test_another_manifest(self, ranks, folder, tmp_path, change, message):
        shutil.copytree(folder / "tp", tmp_path / "tp")
        manifest = {**_manifest(folder / "tp"), **change}
        (tmp_path / "tp" / "teacher_topk.json").write_text(json.dumps(manifest))
        found = ranks(1).run(refusal, "alone_from", str(tmp_path / "tp"), str(folder / "topk.yaml"))[0]
        assert re.search(message, found), found

    def test_a_file_cut_off(self, ranks, folder, tmp_path):
        shutil.copytree(folder / "tp", tmp_path / "tp")
        values = next((tmp_path / "tp" / "topk").glob("*.values"))
        values.write_bytes(values.read_bytes()[:-8])
        found = ranks(1).run(refusal, "alone_from", str(tmp_path / "tp"), str(folder / "topk.yaml"))[0]
        assert re.search(r"is damaged: rank-0000.0000.values must have \d+ bytes", found), found

    def test_another_teacher(self, folder, tmp_path, cpu_backend):
        from nemo.collections.llm.modelopt import ModelOptConfigError
        from nemo.collections.llm.modelopt.distill.recorded.teacher import check_teacher

        check_teacher(str(folder / "tp"), str(folder / "teacher"))
        shutil.copytree(folder / "teacher", tmp_path / "teacher")
        weights = next((tmp_path / "teacher" / "weights").glob("*.distcp"))
        weights.write_bytes(weights.read_bytes()[:-1] + b"x" * 9)
        with pytest.raises(ModelOptConfigError, match=f"was not recorded from the teacher .*{weights.name} had"):
            check_teacher(str(folder / "tp"), str(tmp_path / "teacher"))

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"steps": 0}, "steps=0 must be a whole number"),
            ({"settings": "pair.yaml"}, "a recorded teacher holds only logits"),
            ({"output": "teacher"}, "exists; pass a new folder"),
        ],
    )
    def test_a_recording_that_cannot_be_made(self, ranks, folder, tmp_path, kwargs, message):
        (tmp_path / "pair.yaml").write_text("intermediate_layer_pairs: [[decoder.layers.1, decoder.layers.1]]")
        (tmp_path / "teacher").mkdir()
        output = tmp_path / kwargs.pop("output", "new")
        if "settings" in kwargs:
            kwargs["settings"] = str(tmp_path / kwargs["settings"])
        found = ranks(1).run(refusal, "record_on_ranks", str(folder / "teacher"), str(output), **kwargs)[0]
        assert re.search(message, found), found
        assert sorted(path.name for path in tmp_path.iterdir()) == ["pair.yaml", "teacher"]


def test_a_large_recording_has_several_shards(tmp_path, cpu_backend):
    from nemo.collections.llm.modelopt.distill.recorded import store

    (tmp_path / "topk").mkdir()
    writer = store.Writer(tmp_path / "topk", 0, shard_bytes=600)
    batches = [{"tokens": torch.arange(2 * 8).view(2, 8) + 100 * i} for i in range(5)]
    for i, batch in enumerate(batches):
        entries = torch.full((2, 8, 3), i)
        writer.add(store.sample_keys(batch), entries, entries.to(torch.bfloat16), torch.full((2, 8), float(i)))
    assert len(writer.shards) > 1 and sum(writer.shards.values()) == 10
    manifest = store.Manifest(3, 1.0, 8, 20, writer.largest_entry, writer.dtype, 10, writer.shards, {}, {})
    store.write_manifest(tmp_path, manifest)
    recording = store.Recording(tmp_path)
    for i in (4, 0, 2):
        found = recording.find(store.sample_keys(batches[i]))
        assert found.entries.shape == (8, 2, 3) and (found.entries == i).all()
        assert found.values.dtype == torch.bfloat16 and (found.values == i).all() and (found.rest == i).all()

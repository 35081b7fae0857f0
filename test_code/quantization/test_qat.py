"""Quantized checkpoints train on: finetuning (QAT), and as the student of a distillation (QAD)."""

from __future__ import annotations

import shutil

import pytest
import torch

from test_code.support import jobs_qat, jobs_quant
from test_code.support.jobs_hf import assert_same_logits

ALGORITHMS = ["fp8", "int4_awq"]


@pytest.fixture(scope="module")
def work(ranks_factory, tmp_path_factory):
    """Return a folder with a plain checkpoint of an llm.LlamaModel and a quantized one for each algorithm."""
    folder = tmp_path_factory.mktemp("qat")
    pool = ranks_factory(1)
    pool.run(jobs_quant.make_checkpoint, str(folder / "plain"), True)
    pool.run(jobs_quant.make_checkpoint, str(folder / "teacher"), True, 40)
    quant = {"calibration_dataset": jobs_quant.corpus(folder / "text.jsonl"), "calibration_dataset_size": 16}
    quant |= {"awq_block_size": 16, "enable_kv_cache": False}
    for algorithm in ALGORITHMS:
        pool.run(jobs_quant.ptq, str(folder / "plain"), str(folder / algorithm), algorithm, quant=quant)
    return folder


def same(first, second):
    return set(first) == set(second) and all(torch.equal(first[name], amax) for name, amax in second.items())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_finetuning_keeps_the_quantizers_and_exports(ranks, work, tmp_path, algorithm):
    start = ranks(1).run(jobs_quant.restored_amax, str(work / algorithm))[0]
    result = ranks(1).run(jobs_qat.finetune, str(work / algorithm), str(tmp_path / "trained"))[0]
    # Batches differ in difficulty: compare means over a few of them.
    assert sum(result["losses"][-5:]) < sum(result["losses"][:5])
    assert result["without"] == [] and result["seen"] > 20
    assert same(result["amax"], start)
    # The export compares the logits itself.
    ranks(1).run(jobs_quant.export_loaded, str(tmp_path / "trained"), str(tmp_path / "hf"))
    assert_same_logits(*ranks(1).run(jobs_quant.hf_logits, str(tmp_path / "hf"), str(tmp_path / "trained"))[0])


@pytest.mark.parametrize(
    ("algorithm", "layout"), [("fp8", {}), ("int4_awq", {"tp": 2})], ids=["fp8 on one rank", "int4_awq on two"]
)
def test_distilling_into_a_quantized_student(ranks, work, tmp_path, algorithm, layout):
    start = ranks(1).run(jobs_quant.restored_amax, str(work / algorithm))[0]
    saved = tmp_path / "student"
    results = ranks(2 if layout else 1).run(
        jobs_qat.distill, str(work / "teacher"), str(work / algorithm), str(saved), **layout
    )
    # The teacher trained longer. Batches differ in difficulty: compare means over a few of them.
    assert sum(results[0]["losses"][-4:]) < sum(results[0]["losses"][:4])
    assert results[0]["teacher"] == []
    names = ranks(1).run(jobs_qat.checkpoint_names, str(saved))[0]
    assert not [name for name in names if "teacher" in name or "loss_modules" in name]
    # A student is loaded as its own class: with the context it had before it was distilled.
    shutil.rmtree(saved / "context")
    shutil.copytree(work / algorithm / "context", saved / "context")
    assert same(ranks(1).run(jobs_quant.restored_amax, str(saved))[0], start)
    if not layout:
        assert same(results[0]["amax"], start)
        before, after = (ranks(1).run(jobs_qat.logits, str(path))[0] for path in (work / algorithm, saved))
        assert torch.isfinite(after).all() and not torch.equal(before, after)


def test_a_quantized_checkpoint_serves_as_teacher(ranks, work, tmp_path):
    """The student starts with the very weights that were quantized: all there is to learn is the quantization."""
    first = {}
    for teacher in ("plain", "fp8"):
        saved = tmp_path / f"from-{teacher}"
        first[teacher] = ranks(1).run(jobs_qat.distill, str(work / teacher), str(work / "plain"), str(saved), steps=1)[
            0
        ]
    assert first["plain"]["teacher"] == [] and len(first["fp8"]["teacher"]) > 10
    # Rounding of fp32 against fp8's few percent of logits that a barely trained model keeps near zero.
    assert abs(first["plain"]["losses"][0]) < 1e-6 < first["fp8"]["losses"][0]
    names = ranks(1).run(jobs_qat.checkpoint_names, str(tmp_path / "from-fp8"))[0]
    assert names and not any("quantizer" in name or "teacher" in name for name in names)

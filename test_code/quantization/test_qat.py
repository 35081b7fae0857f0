"""Training of quantized checkpoints: finetuning (QAT), and distillation as a student (QAD)."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from test_code.support import jobs_quant, tiny
from test_code.support.jobs_hf import assert_same_logits
from test_code.support.jobs_quant import amax_of

ALGORITHMS = ["fp8", "int4_awq"]


class Gradients(pl.Callback):
    """Keep the names of the weights that got no gradient in the last step."""

    def __init__(self):
        self.without: list[str] = []
        self.seen = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        grads = {
            n: getattr(p, "main_grad", None) for n, p in tiny.core(pl_module).named_parameters() if p.requires_grad
        }
        self.seen = len(grads)
        self.without = [n for n, grad in grads.items() if grad is None or not bool(grad.abs().sum() > 0)]


def finetune(checkpoint, saved, steps: int = 24) -> dict:
    """Finetune a quantized checkpoint and save it."""
    from nemo.lightning.ckpt_utils import ckpt_to_context_subdir

    from nemo import lightning as nl
    from nemo.collections.llm.modelopt import set_modelopt_spec_if_exists_in_ckpt

    model = nl.io.load_context(path=ckpt_to_context_subdir(checkpoint), subpath="model")
    model.optim = tiny.optim(lr=3e-3)
    model.optim.connect(model)
    set_modelopt_spec_if_exists_in_ckpt(model, checkpoint)
    gradients = Gradients()
    losses = tiny.fit(model, restore=checkpoint, max_steps=steps, save_to=saved, callbacks=[gradients])
    return {"losses": losses, "amax": amax_of(model), "seen": gradients.seen, "without": gradients.without}


def distill(teacher, student, saved, steps: int = 16, **layout) -> dict:
    """Distil into a quantized student and save it."""
    from nemo.collections.llm.modelopt import DistillationGPTModel

    model = DistillationGPTModel(
        tiny.config(), tiny.config(), str(teacher), None, optim=tiny.optim(lr=1e-3), tokenizer=tiny.tokenizer()
    )
    losses = tiny.fit(model, restore=student, max_steps=steps, save_to=saved, **layout)
    core = tiny.core(model)
    from modelopt.torch.quantization.nn import TensorQuantizer

    names = [n for n, module in core.named_modules() if isinstance(module, TensorQuantizer) and module.is_enabled]
    amax = {name: value for name, value in amax_of(model).items() if "teacher" not in name}
    return {"losses": losses, "amax": amax, "teacher": [name for name in names if "teacher" in name]}


def checkpoint_names(path) -> list[str]:
    """Return the names of all tensors in a NeMo checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader

    return sorted(FileSystemReader(str(Path(path) / "weights")).read_metadata().state_dict_metadata)


def logits(checkpoint) -> torch.Tensor:
    """Restore a NeMo checkpoint for inference and return its logits on fixed tokens."""
    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec

    model, _ = setup_trainer_and_restore_model_with_modelopt_spec(str(checkpoint))
    with torch.no_grad():
        return tiny.run(tiny.core(model).eval(), torch.arange(3, 35).unsqueeze(0))


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
    result = ranks(1).run(finetune, str(work / algorithm), str(tmp_path / "trained"))[0]
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
    results = ranks(2 if layout else 1).run(distill, str(work / "teacher"), str(work / algorithm), str(saved), **layout)
    # The teacher trained longer. Batches differ in difficulty: compare means over a few of them.
    assert sum(results[0]["losses"][-4:]) < sum(results[0]["losses"][:4])
    assert results[0]["teacher"] == []
    names = ranks(1).run(checkpoint_names, str(saved))[0]
    assert not [name for name in names if "teacher" in name or "loss_modules" in name]
    # A student is loaded as its own class: with the context it had before it was distilled.
    shutil.rmtree(saved / "context")
    shutil.copytree(work / algorithm / "context", saved / "context")
    assert same(ranks(1).run(jobs_quant.restored_amax, str(saved))[0], start)
    if not layout:
        assert same(results[0]["amax"], start)
        before, after = (ranks(1).run(logits, str(path))[0] for path in (work / algorithm, saved))
        assert torch.isfinite(after).all() and not torch.equal(before, after)


def test_a_quantized_checkpoint_serves_as_teacher(ranks, work, tmp_path):
    """The student starts with the weights that were quantized, so it only learns to compensate the quantization."""
    first = {}
    for teacher in ("plain", "fp8"):
        saved = tmp_path / f"from-{teacher}"
        first[teacher] = ranks(1).run(distill, str(work / teacher), str(work / "plain"), str(saved), steps=1)[0]
    assert first["plain"]["teacher"] == [] and len(first["fp8"]["teacher"]) > 10
    # Rounding of fp32 against fp8's few percent of logits that a barely trained model keeps near zero.
    assert abs(first["plain"]["losses"][0]) < 1e-6 < first["fp8"]["losses"][0]
    names = ranks(1).run(checkpoint_names, str(tmp_path / "from-fp8"))[0]
    assert names and not any("quantizer" in name or "teacher" in name for name in names)

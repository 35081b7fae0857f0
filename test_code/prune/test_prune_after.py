"""What a width- and depth-pruned checkpoint is good for: Hugging Face export, quantization, distillation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from test_code.support import jobs_prune_after as jobs
from test_code.support import jobs_quant, ranks

# 40 / 2 heads is not the 16 channels that a head keeps.
REQUEST = {
    "target_hidden_size": 40,
    "target_ffn_hidden_size": 64,
    "target_num_attention_heads": 2,
    "target_num_query_groups": 1,
    "target_num_layers": 3,
}


def export_to_hf(folder: str) -> tuple[dict, tuple]:
    """Export the pruned checkpoint to Hugging Face; return its configuration, and both models' logits."""
    from nemo.collections import llm

    llm.export_ckpt(f"{folder}/pruned", "hf", output_path=f"{folder}/hf")
    ranks.reset()
    logits = jobs_quant.plain_logits(f"{folder}/hf", f"{folder}/pruned")
    return json.loads((Path(folder) / "hf" / "config.json").read_text()), logits


def quantize(folder: str) -> dict:
    """Quantize the pruned checkpoint to FP8 in Hugging Face's layout, whose logits the export itself compares."""
    from test_code.support import tiny

    text = Path(folder) / "texts.jsonl"
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in tiny.texts(12)))
    data = {"calibration_dataset": str(text), "calibration_dataset_size": 8}
    jobs_quant.ptq(f"{folder}/pruned", f"{folder}/fp8", fmt="hf", quant=data)
    return json.loads((Path(folder) / "fp8" / "config.json").read_text())


def distill(folder: str) -> list[float]:
    """Distill the original into the pruned checkpoint; return the losses."""
    from nemo import lightning as nl
    from nemo.collections import llm
    from test_code.support import tiny

    recorder = tiny.LossRecorder()
    llm.distill(
        student_model_path=f"{folder}/pruned",
        teacher_model_path=f"{folder}/original",
        data=tiny.data(),
        trainer=tiny.trainer(max_steps=3, callbacks=[recorder]),
        log=nl.NeMoLogger(name="log", log_dir=f"{folder}/log", use_datetime_version=False),
        resume=nl.AutoResume(restore_config=nl.RestoreConfig(path=f"{folder}/pruned", load_artifacts=False)),
        optim=tiny.optim(),
    )
    return recorder.losses


@pytest.fixture(scope="module")
def folder(ranks_factory, tmp_path_factory):
    """Return a folder with the checkpoints ``original`` and ``pruned``."""
    path = str(tmp_path_factory.mktemp("after"))
    ranks_factory(1).run(jobs.make, path, REQUEST)
    return path


def test_hugging_face_export_has_the_sizes_and_the_same_logits(ranks, folder):
    config, (theirs, ours) = ranks(1).run(export_to_hf, folder)[0]
    assert {name: config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")} == {
        "hidden_size": 40,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "head_dim": 16,
    }
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]) == (2, 1, 256)
    # fp32 on both sides, other matmuls.
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_it_is_quantized_and_exported(ranks, folder):
    config = ranks(1).run(quantize, folder)[0]
    assert config["head_dim"] == 16
    assert config["hidden_size"] == 40


def test_it_is_distilled(ranks, folder):
    losses = ranks(1).run(distill, folder)[0]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)

"""What ranks execute for the tests of what a pruned checkpoint is good for."""

from __future__ import annotations

import json
from pathlib import Path

from test_code.support import jobs_quant, ranks


def make(folder: str, request: dict) -> None:
    """Write a tiny Llama checkpoint and one that llm.prune has made of it."""
    from test_code.support import jobs_prune, tiny

    jobs_quant.make_checkpoint(f"{folder}/original", llama=True, steps=2, kv_channels=16, vocab_size=tiny.VOCABULARY)
    ranks.reset()
    jobs_prune.prune_checkpoint(f"{folder}/original", f"{folder}/pruned", request)


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

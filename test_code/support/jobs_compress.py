"""Jobs of the compression tests, run on live ranks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from nemo import lightning as nl
from nemo.collections import llm
from nemo_modelopt_cli import tokens
from nemo_modelopt_cli.compress import jobs, stages, training
from nemo_modelopt_cli.compress.settings import Job, Layout, Pruning, Quantization
from test_code.support import devices, tiny


def make_teacher(folder: str, in_bf16: bool = False, llama: bool = False) -> None:
    """Write a tiny trained checkpoint, training and held-out texts, and the held-out tokens."""
    here = Path(folder)
    texts = tiny.texts(120)
    for name, rows in (("train", texts[:100]), ("heldout", texts[100:])):
        (here / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    np.save(here / "heldout.npy", tokens.encode(here / "heldout.jsonl", tiny.tokenizer()))
    options: dict = {}
    kind: dict = {}
    if in_bf16:
        kind = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
        options["plugins"] = nl.MegatronMixedPrecision("bf16-mixed", params_dtype=torch.bfloat16)
    model = tiny.model(vocab_size=tiny.VOCABULARY, **kind)
    if llama:  # a kind of model that has a Hugging Face format
        names = llm.LlamaConfig.__dataclass_fields__
        settings = {name: getattr(model.config, name) for name in names if hasattr(model.config, name)}
        model = llm.LlamaModel(llm.LlamaConfig(**settings), optim=tiny.optim(), tokenizer=tiny.tokenizer())
    tiny.fit(model, max_steps=4, save_to=here / "checkpoint", **options)
    training.release()


def _pruning(here: Path, layout: dict, pruning: dict, quantization: dict | None = None) -> Job:
    texts = {f"{name}_text": str(here / f"{name}.jsonl") for name in ("train", "heldout")}
    settings = Pruning(num_samples=8, **pruning)
    return Job(
        str(here / "checkpoint"),
        **texts,
        seq_length=32,
        layout=Layout(cpu=not devices.machine().on_gpus, **layout),
        pruning=settings,
        quantization=Quantization(**(quantization or {})),
    )


def tokenize(folder: str) -> None:
    """Write the tokens that `prune` reads below ``folder``/pruned."""
    here = Path(folder)
    (here / "pruned").mkdir(exist_ok=True)
    jobs.tokenize(here / "pruned", _pruning(here, {}, {}))


def prune(folder: str, layout: dict, pruning: dict, quantization: dict | None = None) -> dict:
    """Return what the stage that prunes reports of the tiny teacher, pruned below ``folder``/pruned."""
    here = Path(folder)
    return jobs.prune(here / "pruned", _pruning(here, layout, pruning, quantization), here / "pruned")


def quantize_and_export(folder: str) -> dict:
    """Quantize the tiny teacher below ``folder``/quantize, export Hugging Face files below ``folder``/export.

    Returns:
        What the step that quantizes reports.
    """
    here = Path(folder)
    quantization = {"formats": ("hf",), "calibration_size": 8, "calibration_batch_size": 2, "calibration_seq_len": 32}
    job = _pruning(here, {}, {}, quantization)
    tokenize(folder)
    for name in ("quantize", "export"):
        (here / name).mkdir()
    found = jobs.quantize(here / "quantize", job, here / "checkpoint", here / "pruned")
    record = stages.Record("quantize", "", "", {}, found, 0.0)
    (here / "quantize" / stages.DONE).write_text(json.dumps(asdict(record)))
    jobs.export(here / "export", job, here / "quantize" / "checkpoint", here / "pruned", here)
    return found

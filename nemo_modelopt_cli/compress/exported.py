"""An exported Hugging Face checkpoint: its held-out loss, computed from the files, and its model card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from nemo_modelopt_cli.compress import facts, stages
from nemo_modelopt_cli.compress.settings import Job
from nemo_modelopt_cli.tokens import Windows
from nemo_modelopt_dropin.report import model_card


def heldout_loss(folder: Path, ids: np.ndarray, seq_length: int, batch_size: int) -> float | None:
    """Return the mean next-token loss over the windows that `heldout.heldout_loss` uses.

    Weights are used as the files hold them; inputs of linear layers are scaled and quantized as the files specify.

    Args:
        folder: a Hugging Face checkpoint.
        ids: token ids `[n]`.
        seq_length: tokens per window.
        batch_size: windows per forward pass.

    Returns:
        Nats per token; None, with a warning, if the model cannot be run from these files.

    Raises:
        ExportError: if a tensor is missing, or its shape differs from ``config.json``.
    """
    from nemo.utils import logging

    from nemo.collections.llm.modelopt import _heldout
    from nemo.collections.llm.modelopt.quantization.export import hf_files, hf_verify

    hf_files.verify(folder)
    if (reason := hf_files.obstacle(folder)) is not None:
        logging.warning(f"The loss of the exported checkpoint was not measured: {reason}")
        return None
    model = hf_verify.load(folder)
    windows = Windows(ids, seq_length)
    total = tokens = 0.0
    with torch.no_grad():
        for start in range(0, len(windows), batch_size):
            rows = [windows[i] for i in range(start, min(start + batch_size, len(windows)))]
            logits = model(torch.stack([row["tokens"] for row in rows])).logits
            labels = torch.stack([row["labels"] for row in rows])
            losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            total += float(_heldout.weighted_sum(losses))
            tokens += labels.numel()
    return total / tokens


def describe(folder: Path, job: Job, root: Path) -> None:
    """Add how the model was pruned, distilled and quantized, and the held-out losses, to the model card.

    Args:
        folder: the Hugging Face checkpoint.
        job: the settings.
        root: the run's folder, with the records of the steps before.
    """
    from nemo.collections.llm.modelopt.quantization.export import hf_card

    found = {name: stages.read_record(root / name) for name in facts.MODELS}
    records = {name: record for name, record in found.items() if record is not None}
    teacher, quantization = Path(job.teacher).name, job.quantization
    model_card.retitle(folder, f"{teacher}, compressed to {Path(quantization.algorithm).name}")
    calibrated = model_card.calibration_data(
        job.train_text, f"at most {quantization.calibration_size}", quantization.calibration_seq_len
    )
    steps = [f"- {sentence}" for sentence in facts.done(records, job)]
    lines = [f"- Original model: `{teacher}`", *steps, model_card.method(quantization.algorithm), calibrated]
    model_card.add(folder, "Compression", lines)
    rows = [
        f"| {facts.MODELS[name]} | {record.result['heldout_loss']:.4f} | {record.result['parameters']:,} |"
        for name, record in records.items()
        if "heldout_loss" in record.result
    ]
    kl = records["quantize"].result.get("kl_to_original") if "quantize" in records else None
    if rows and kl is not None:
        tokens = records["quantize"].result["evaluation_tokens"]
        rows += ["", f"KL of the quantized model to the one before: {kl:.2e} nats, on {tokens} tokens."]
    table = ["| model | held-out loss (nats per token) | parameters |", "|---|---|---|", *rows]
    model_card.add(folder, "Measured quality", table if rows else [])
    model_card.set_base(folder, hf_card.base_model(job.teacher, None))

"""Held-out loss of an exported Hugging Face checkpoint, computed from the files as they were written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from nemo_modelopt_cli.tokens import Windows


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

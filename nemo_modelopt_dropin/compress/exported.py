"""Held-out loss of an exported Hugging Face checkpoint: what was written is read back and computed with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from nemo_modelopt_dropin.compress.tokens import Windows


def dequantized(folder: Path) -> dict[str, torch.Tensor] | None:
    """Return the checkpoint's weights in fp32, FP8 ones multiplied by their scales; None for packed formats.

    Activation scales are left out: the weights alone are judged.
    """
    from safetensors.torch import load_file

    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    found = {}
    for name, value in stored.items():
        if name.endswith(("_scale", "_scale_2")):
            continue
        if not value.is_floating_point():
            return None
        value = value.float()
        if (scale := stored.get(f"{name}_scale")) is not None:
            value = value * scale.float()
        found[name] = value
    return found


def heldout_loss(folder: Path, ids: np.ndarray, seq_length: int, batch_size: int) -> float | None:
    """Return the mean next-token loss over the windows that `heldout.heldout_loss` uses, or None for packed formats.

    Args:
        folder: a Hugging Face checkpoint.
        ids: token ids `[n]`.
        seq_length: tokens a window.
        batch_size: windows a pass.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    weights = dequantized(folder)
    if weights is None:
        return None
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    content.pop("quantization_config", None)
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name not in (model._tied_weights_keys or [])]
    if missing or unexpected:
        raise ValueError(f"{folder} does not fit its config.json: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.eval()
    windows = Windows(ids, seq_length)
    total = tokens = 0.0
    with torch.no_grad():
        for start in range(0, len(windows), batch_size):
            rows = [windows[i] for i in range(start, min(start + batch_size, len(windows)))]
            logits = model(torch.stack([row["tokens"] for row in rows])).logits
            labels = torch.stack([row["labels"] for row in rows])
            total += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            tokens += labels.numel()
    return total / tokens

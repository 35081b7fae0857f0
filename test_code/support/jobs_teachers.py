"""What ranks execute for the tests of wrong teachers: another tokenizer, NaN weights, logits that overflow."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import torch

from test_code.support import jobs_distill, tiny


class Damage(pl.Callback):
    """Change weights before the checkpoint is written."""

    def __init__(self, how: str):
        self.how = how

    @torch.no_grad()
    def on_train_end(self, trainer, pl_module):
        core = tiny.core(pl_module)
        if self.how == "nan":
            core.decoder.layers[1].mlp.linear_fc1.weight[3, 5] = float("nan")
        elif self.how == "inf":
            core.decoder.layers[2].self_attention.linear_proj.weight[0, 0] = float("-inf")
        elif self.how == "overflow":
            core.output_layer.weight.fill_(1e38)
            core.decoder.final_layernorm.weight.fill_(1e3)


def make(path: str, how: str) -> str:
    """Write a teacher damaged in its weights ("nan", "inf", "overflow") or tokenizer ("vocabulary", "merges")."""
    with jobs_distill.alone():
        # The callback comes first: those that were given run before the one that saves.
        run = tiny.trainer(max_steps=1, callbacks=[Damage(how), tiny.SaveAtEnd(path)])
        run.fit(tiny.model(), tiny.data())
    file = next((Path(path) / "context").rglob("tokenizer.json"))
    content = json.loads(file.read_text())
    merges, words = content["model"]["merges"], content["model"]["vocab"]
    if how == "vocabulary":
        a, b = sorted(words)[40], sorted(words)[41]
        words[a], words[b] = words[b], words[a]
    elif how == "merges":
        merges[-1], merges[-2] = merges[-2], merges[-1]
    file.write_text(json.dumps(content))
    return path


def train(teacher_path: str, settings: str | None) -> tuple[str | None, int]:
    """Distill for two steps; return the class and text of the error, and the number of steps that were made."""
    with jobs_distill.alone():
        model = jobs_distill.distillation_model(teacher_path, settings)
        run = tiny.trainer(max_steps=2)
        try:
            run.fit(model, tiny.data())
        except Exception as error:
            return f"{type(error).__name__}: {error}", run.global_step
    return None, run.global_step

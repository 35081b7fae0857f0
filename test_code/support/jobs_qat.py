"""What ranks execute for the tests of training quantized models (QAT, and distillation: QAD)."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch

from test_code.support import tiny
from test_code.support.jobs_quant import amax_of


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
    """Go on training a quantized checkpoint as a finetuning does, and save it."""
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
        return tiny.core(model).eval()(torch.arange(3, 35).unsqueeze(0), torch.arange(32).unsqueeze(0), None)

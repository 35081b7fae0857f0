"""Losses of other projects, for `kd_loss.py --peers`. They are imported if they are installed, and no dependencies.

Only the module of the loss is loaded, so that neither trainers nor kernels of a project need to be importable. Each
function takes logits [n, v] of the student and the teacher and returns the mean over tokens of a divergence.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

CHUNKS = 8  # torchtune's default
NOTES = """\
In a training step the gradient takes the memory of the teacher's logits. "Two softmaxes and a write" is less than any
loss does: read both logits, take both softmaxes by PyTorch's operation, the fastest one that it has for exponentials,
and write a tensor of their size; for the top-k loss, select the entries, too. "torch.compile" takes the exponentials
in the loops that add them up, and its gradients are of a graph that must be compiled for every shape. TRL computes
in the type of the logits: its bf16 gradients differ by 1e-2 and more. The time of Liger's and our fused losses is
bounded by the matrix products alone. "Naive topk" is the formula in PyTorch: no other project has a top-k loss with
all other entries as one."""
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _file(package: str, name: str) -> Path | None:
    """Return a file of an installed package without importing it; None if the package is missing."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((Path(folder) / name for folder in folders if (Path(folder) / name).is_file()), None)


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"peer_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _function(file: Path, name: str) -> Any:
    """Return one function of a file that cannot be imported without a trainer's dependencies."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    found.decorator_list = []
    names: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(ast.Module([found], []), str(file), "exec"), names)  # noqa: S102
    return names[name]


def naive(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compute the forward KL as a formula in PyTorch, in fp32."""
    log_p, log_q = (torch.log_softmax(x.float(), -1) for x in (student, teacher))
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def losses() -> tuple[dict[str, Loss], dict[str, Loss], list[str]]:
    """Return forward KL losses, JSD losses, and the names of the projects that are not installed."""
    kl: dict[str, Loss] = {"torch.compile of the naive form": torch.compile(naive)}
    jsd: dict[str, Loss] = {}
    missing = []
    file = _file("torchtune", "modules/loss/kd_losses.py")
    if file is None:
        missing.append("torchtune")
    else:
        whole, chunked = _module(file).ForwardKLLoss(), _module(file).ForwardKLWithChunkedOutputLoss(CHUNKS)

        def of_chunks(student, teacher):
            labels = torch.zeros(1, len(student), dtype=torch.long)
            parts = [list(x.unsqueeze(0).chunk(CHUNKS, dim=1)) for x in (student, teacher)]
            return chunked(*parts, labels)

        kl["torchtune"] = lambda student, teacher: whole(student, teacher, torch.zeros(len(student)))
        kl[f"torchtune in {CHUNKS} chunks"] = of_chunks
    file = _file("trl", "experimental/gkd/gkd_trainer.py") or _file("trl", "trainer/gkd_trainer.py")
    if file is None:
        missing.append("trl")
    else:
        trl = _function(file, "generalized_jsd_loss")
        kl["TRL at beta 0"] = lambda student, teacher: trl(student, teacher, beta=0)
        jsd["TRL at beta 0.5"] = lambda student, teacher: trl(student, teacher, beta=0.5)
    return kl, jsd, missing


def liger(beta: float) -> Any:
    """Return Liger's linear JSD in its PyTorch form, not compiled; None if Liger is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)


@torch.no_grad()
def floor(student: torch.Tensor, teacher: torch.Tensor, out: torch.Tensor, rows: int, topk: int | None = None) -> None:
    """Read both logits, take two softmaxes and write a tensor of their size: less than any of the losses does.

    Args:
        student: logits [n, v].
        teacher: logits [n, v].
        out: [n, v].
        rows: tokens of a chunk.
        topk: number of entries to select first; None selects none.
    """
    from nemo.collections.llm.modelopt._divergence.topk import likeliest

    buffers = torch.empty(2, rows, student.shape[1])
    for start in range(0, len(student), rows):
        part = slice(start, start + rows)
        z, y = buffers[:, : len(student[part])]
        logits = [
            x[part] if x.dtype == z.dtype else buffer.copy_(x[part]) for x, buffer in ((student, z), (teacher, y))
        ]
        if topk is not None:
            likeliest(logits[1], topk)
        torch.softmax(logits[0], -1, out=z)
        torch.softmax(logits[1], -1, out=y)
        torch.sub(z, y, out=out[part])

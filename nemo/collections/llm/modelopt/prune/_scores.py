"""Importance scores on disk: measured once, used for every further target on the same model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from nemo.utils import logging
from torch import nn

from ..errors import ModelOptConfigError
from ._checks import model_sizes

_FINGERPRINT = "fingerprint.json"
_SCORES = "scores.pth"


def fingerprint(core: nn.Module) -> dict[str, Any]:
    """Return what must agree for scores to be used again: sizes, weights, number of ranks, modelopt's version.

    Weights are compared by the sum and the sum of squares of each parameter. All ranks must call it.
    """
    import modelopt

    digest = hashlib.sha256()
    for name, parameter in core.named_parameters():
        numbers = parameter.detach().to(torch.float64)
        digest.update(
            f"{name} {tuple(parameter.shape)} {float(numbers.sum())!r} {float(numbers.square().sum())!r}".encode()
        )
    digests: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, digest.hexdigest())
    return {
        "modelopt": modelopt.__version__,
        "ranks": len(digests),
        "sizes": model_sizes(core),
        "weights": hashlib.sha256("".join(digests).encode()).hexdigest(),
    }


def prepare(folder: str | Path, current: dict[str, Any]) -> str:
    """Return the file name to give modelopt, after checking that scores in the folder belong to this model.

    Args:
        folder: where scores are or will be; made by `record` and never shared by two models.
        current: `fingerprint` of the model. All ranks must call this.

    Raises:
        ModelOptConfigError: where the scores there were measured on another model or layout.
    """
    folder = Path(folder)
    problem = [_difference(folder, current) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise ModelOptConfigError(
            f"scores_path={str(folder)!r} holds scores of another run ({problem[0]}); "
            "use the same model and number of ranks, or give another folder."
        )
    return str(folder / _SCORES)


def complete(folder: str | Path) -> bool:
    """Return whether the folder holds scores that a finished measurement left."""
    return (Path(folder) / _FINGERPRINT).exists()


def _difference(folder: Path, current: dict[str, Any]) -> str | None:
    """Return how a stored fingerprint differs, None where it does not; scores without a fingerprint are removed."""
    stored = folder / _FINGERPRINT
    if stored.exists():
        known = json.loads(stored.read_text())
        return ", ".join(
            f"{key}: {known.get(key)} there, {current[key]} now" for key in current if known.get(key) != current[key]
        )
    if folder.exists() and not folder.is_dir():
        return "it is a file, not a folder"
    folder.mkdir(parents=True, exist_ok=True)
    # A run that was cut off leaves files of some ranks only.
    for half in folder.glob(f"{Path(_SCORES).stem}*.pth"):
        half.unlink()
    return None


def record(folder: str | Path, current: dict[str, Any]) -> None:
    """Mark the scores in the folder as complete and as this model's. All ranks must call it."""
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        beside = Path(folder) / (_FINGERPRINT + ".partial")
        beside.write_text(json.dumps(current, indent=1))
        beside.replace(Path(folder) / _FINGERPRINT)
        logging.info(f"Importance scores are in {folder}")
    torch.distributed.barrier()

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


# Attributes of a data module that say how far it has been read.
_PROGRESS = ("init_global_step", "global_step", "consumed_samples")


def describe_data(data_module: Any, trainer: Any) -> dict[str, Any]:
    """Return what tells one measurement's data from another's: the data module's class and settings, the batches.

    Settings are its public attributes that are numbers, texts and lists of them; files named there count with their
    size. The tokens themselves are not read.

    Args:
        data_module: the data that importance is measured on.
        trainer: its ``limit_val_batches`` is the number of batches.
    """
    found = {
        name: _plain(value)
        for name, value in sorted(vars(data_module).items())
        if not name.startswith("_") and name not in _PROGRESS
    }
    limit = getattr(trainer, "limit_val_batches", None)
    return {
        "class": f"{type(data_module).__module__}.{type(data_module).__qualname__}",
        "batches": limit if isinstance(limit, int | float) else None,
        **{name: value for name, value in found.items() if value is not None},
    }


def _plain(value: Any) -> Any:
    """Return a setting as JSON has it, None for anything else and for what is empty."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | Path):
        files = [Path(f"{value}{ending}") for ending in ("", ".bin")] if str(value) else []
        sizes = [file.stat().st_size for file in files if file.is_file()]
        return f"{value} ({sizes[0]} bytes)" if sizes else str(value)
    if isinstance(value, list | tuple):
        inner = [_plain(entry) for entry in value]
        return inner if inner and all(entry is not None for entry in inner) else None
    if isinstance(value, dict):
        entries = {str(key): _plain(entry) for key, entry in value.items()}
        return {key: entry for key, entry in entries.items() if entry is not None} or None
    return None


def fingerprint(core: nn.Module, data: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what must agree for scores to be used again: sizes, weights, data, number of ranks, modelopt's version.

    Weights are compared by the sum and the sum of squares of each parameter. All ranks must call it.

    Args:
        core: the Megatron-Core model.
        data: what `describe_data` returned.
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
        "data": json.loads(json.dumps(data or {})),
        "sizes": model_sizes(core),
        "weights": hashlib.sha256("".join(digests).encode()).hexdigest(),
    }


def prepare(folder: str | Path, current: dict[str, Any]) -> str:
    """Return the file name to give modelopt, after checking that scores in the folder belong to this model.

    Args:
        folder: where scores are or will be; made by `record` and never shared by two models.
        current: `fingerprint` of the model. All ranks must call this.

    Raises:
        ModelOptConfigError: where the scores there were measured on another model, data or layout.
    """
    folder = Path(folder)
    problem = [_difference(folder, current) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise ModelOptConfigError(
            f"scores_path={str(folder)!r} holds scores of another run ({problem[0]}); "
            "use the same model, data and number of ranks, or give another folder."
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
        return ", ".join(_differences(known, current))
    if folder.exists() and not folder.is_dir():
        return "it is a file, not a folder"
    folder.mkdir(parents=True, exist_ok=True)
    # A run that was cut off leaves files of some ranks only.
    for half in folder.glob(f"{Path(_SCORES).stem}*.pth"):
        half.unlink()
    return None


def _differences(known: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """Return a phrase for each entry that differs."""
    found: list[str] = []
    for key in sorted({*known, *current}):
        there, now = known.get(key), current.get(key)
        if isinstance(there, dict) and isinstance(now, dict):
            found += _differences(there, now, f"{key} ")
        elif there != now:
            found.append(f"{prefix}{key}: {there} there, {now} now")
    return found


def record(folder: str | Path, current: dict[str, Any]) -> None:
    """Mark the scores in the folder as complete and as this model's. All ranks must call it."""
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        beside = Path(folder) / (_FINGERPRINT + ".partial")
        beside.write_text(json.dumps(current, indent=1))
        beside.replace(Path(folder) / _FINGERPRINT)
        logging.info(f"Importance scores are in {folder}")
    torch.distributed.barrier()

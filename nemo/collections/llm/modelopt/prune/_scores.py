"""Importance scores on disk: measured once, used for every further target on the same model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from nemo.utils import logging
from torch import nn

from nemo_modelopt_dropin import files

from .. import _parallel, _staging, tensor_file
from ..errors import ModelOptConfigError
from ._checks import model_sizes

_FINGERPRINT = "fingerprint.json"
# Numbers of a weight that are in fp64 at a time.
_SUMMED = 1 << 22

# Attributes of a data module that hold how far it has been read.
_PROGRESS = ("init_global_step", "global_step", "consumed_samples")


def describe_data(data_module: Any, trainer: Any) -> dict[str, Any]:
    """Return what identifies the data of a measurement: the data module's class and settings, the batches.

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
    named = list(core.named_parameters())
    # One read of all numbers.
    sums = torch.stack([_sums(parameter.detach()) for _, parameter in named]).tolist()
    for (name, parameter), (total, squares) in zip(named, sums, strict=True):
        digest.update(f"{name} {tuple(parameter.shape)} {total!r} {squares!r}".encode())
    digests = _parallel.gather_objects(digest.hexdigest())
    return {
        "modelopt": modelopt.__version__,
        "ranks": len(digests),
        "data": json.loads(json.dumps(data or {})),
        "sizes": model_sizes(core),
        "weights": hashlib.sha256("".join(digests).encode()).hexdigest(),
    }


def _sums(weight: torch.Tensor) -> torch.Tensor:
    """Return [2] in fp64: the sum and the sum of squares, without a copy of the whole weight in fp64."""
    total = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for part in weight.reshape(-1).split(_SUMMED):
        numbers = part.double()
        total += torch.stack([numbers.sum(), numbers.square().sum()])
    return total


def prepare(folder: str | Path, current: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """Return this rank's scores in a folder if there are any, after checking that they belong to this model.

    Args:
        folder: where scores are or will be; made by `record` and never shared by two models.
        current: `fingerprint` of the model. All ranks must call this.
        device: of the model.

    Raises:
        ModelOptConfigError: if the scores were measured on another model, data or layout, or cannot be read, or the
            folder holds something else.
    """
    folder = Path(folder)
    problem = _parallel.from_rank_zero(_problem(folder, current) if torch.distributed.get_rank() == 0 else None)
    if problem:
        raise ModelOptConfigError(f"scores_path={str(folder)!r} {problem}.")
    found, reason = None, None
    if (folder / _FINGERPRINT).exists():
        try:
            found = tensor_file.load(folder / _file_name(), device)
        except (ModelOptConfigError, OSError) as error:
            reason = f"{error} Measure them again in a new folder."
    reasons = _parallel.gather_objects(reason)
    if any(reasons):
        raise ModelOptConfigError(f"scores_path={str(folder)!r}: {next(filter(None, reasons))}")
    return found


def _file_name() -> str:
    return f"scores-rank{torch.distributed.get_rank()}{tensor_file.SUFFIX}"


def _problem(folder: Path, current: dict[str, Any]) -> str | None:
    """Return why scores in the folder cannot be used, or why none can be written there; None if there is no reason."""
    old = sorted(file.name for file in folder.glob("*.pth"))
    if old:
        return f"holds {old}, which torch.save wrote: reading them can run any code. Delete the folder to measure again"
    found = files.problem(folder, files.PRUNING_SCORES)
    if found:
        return f"cannot be used: {found}"
    stored = folder / _FINGERPRINT
    if not stored.exists():
        return None
    try:
        differences = _differences(json.loads(stored.read_text()), current)
    except (OSError, ValueError, AttributeError) as error:
        return f"has a damaged {_FINGERPRINT} ({type(error).__name__}: {error}); use another folder"
    if not differences:
        return None
    return (
        f"holds scores of another run ({', '.join(differences)}); use the same model, data and number of ranks, or "
        "another folder"
    )


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


def record(folder: str | Path, current: dict[str, Any], found: dict[str, Any]) -> None:
    """Write the scores of all ranks and what they were measured on. All ranks must call it.

    Args:
        folder: see `prepare`.
        current: `fingerprint` of the model.
        found: this rank's scores.
    """
    with _staging.staged(Path(folder), files.PRUNING_SCORES) as beside:
        beside.mkdir(parents=True, exist_ok=True)
        tensor_file.save(beside / _file_name(), found)
        if torch.distributed.get_rank() == 0:
            files.write_json(beside / _FINGERPRINT, current)
    logging.info(f"Importance scores are in {folder}")

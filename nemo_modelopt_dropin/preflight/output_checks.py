"""Whether a folder can be written, and whether something would be lost there. Standard library only."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from nemo_modelopt_dropin import files

# Files and folders of a report.
REPORT_FILES = ("report.json", "report.html", "figures")

# Names that identify the format of a checkpoint.
_MARKS = {
    "nemo": ("context", "weights"),
    "hf": ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors", "pytorch_model*.bin"),
    "trtllm": ("rank*.safetensors",),
}


def formats_in(folder: Path) -> list[str]:
    """Return the formats of the checkpoints in a folder."""
    return [name for name, marks in _MARKS.items() if any(any(folder.glob(mark)) for mark in marks)]


def problems(flag: str, output: str | None, inputs: Mapping[str, str | None], wanted: str) -> list[str]:
    """Return why a checkpoint of the format ``wanted`` cannot be written to a folder."""
    return place_problems(flag, output, inputs) or content_problems(flag, output, wanted)


def place_problems(flag: str, output: str | None, inputs: Mapping[str, str | None]) -> list[str]:
    """Return why a folder cannot be written, or which inputs would be overwritten.

    Args:
        flag: Flag that sets the folder.
        output: The folder, which need not exist.
        inputs: Flag -> path of each input.
    """
    if not output:
        return []
    folder = Path(output)
    for name, path in inputs.items():
        if not path or not _exists(path):
            continue
        own, other = folder.resolve(), Path(path).resolve()
        if own == other:
            return [f"{flag} {output} is {name} itself, which would be overwritten; use another folder"]
        if other in own.parents:
            return [f"{flag} {output} lies inside {name} {path}; use a folder outside it"]
        if own in other.parents:
            return [f"{name} {path} lies inside {flag} {output}, which this command writes; use another folder"]
    reason = unwritable(folder)
    return [f"{flag} {output} cannot be written: {reason}; use another folder"] if reason else []


def unwritable(folder: Path) -> str | None:
    """Return why a folder cannot be created or written, None if it can.

    Permissions alone do not decide: file systems may be read-only or virtual. So a temporary folder is created in the
    nearest existing parent.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        return f"{place} is a file"
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".nemo-modelopt-"):
            return None
    except OSError as error:
        return f"{place} cannot be written to ({error.strerror})"


def _exists(path: str) -> bool:
    """Return whether a path exists, as a file, a folder or the prefix of a tokenized data set of Megatron."""
    return any(os.path.lexists(f"{path}{ending}") for ending in ("", ".bin", ".idx"))


def input_paths(flag: str, values: Iterable[str] | str | None) -> dict[str, str]:
    """Return the paths of a setting that takes several, by flag; a pattern is replaced by its first match.

    Args:
        flag: Flag that sets them.
        values: One or more paths or patterns. The weights of a blend are included; they match no file.
    """
    found = {}
    for number, value in enumerate([values] if isinstance(values, str) else values or ()):
        path = value if _exists(value) else next(glob.iglob(value, recursive=True), value)
        found[flag if number == 0 else f"{flag} ({number + 1})"] = path
    return found


def config_paths(config: str | os.PathLike[str] | None, output: str | None) -> dict[str, str]:
    """Return the file of settings as an input, unless it is the run file in the command's own output."""
    if not config or not output or Path(config).resolve() == (Path(output) / files.RUN_FILE).resolve():
        return {}
    return {"--config": str(config)}


def state_problems(flag: str, folder: str | None, kind: str, outputs: Mapping[str, str | None]) -> list[str]:
    """Return why a folder for intermediate content cannot be used.

    Args:
        flag: Flag that sets the folder.
        folder: The folder, which is written and removed.
        kind: Kind of its content.
        outputs: Flag -> other paths that this command writes.
    """
    if not folder:
        return []
    nested = nesting_problems(flag, folder, outputs)
    found = None if nested else files.problem(Path(folder), kind)
    return [f"{flag}: {found}"] if found else nested


def nesting_problems(flag: str, path: str | None, outputs: Mapping[str, str | None]) -> list[str]:
    """Return which of the outputs, each of which is replaced as a whole, contains a path.

    Args:
        flag: Flag that sets the path.
        path: The path, which is written first.
        outputs: Flag -> other paths that are written.
    """
    for name, other in outputs.items():
        if path and other:
            own, whole = Path(path).resolve(), Path(other).resolve()
            if own == whole or whole in own.parents:
                return [f"{flag} {path} lies inside {name} {other}, or is the same; use another path"]
    return []


def report_problems(flag: str, folder: str | None, outputs: Mapping[str, str | None] | None = None) -> list[str]:
    """Return why a report cannot be written into a folder.

    Args:
        flag: Flag that sets the folder.
        folder: Folder of the report.
        outputs: Flag -> checkpoints that this command writes; their folders hold nothing else.
    """
    nested = nesting_problems(flag, folder, outputs or {})
    if nested:
        return nested
    found = files.taken(Path(folder), REPORT_FILES) if folder else None
    return [f"{flag}: {found}"] if found else []


def content_problems(flag: str, output: str | None, wanted: str) -> list[str]:
    """Return why a checkpoint cannot be written into an existing folder, because it would be mixed with other files.

    An earlier checkpoint of this command in the same format is replaced.

    Args:
        flag: Flag that sets the folder.
        output: The folder.
        wanted: Format of the new checkpoint: "nemo", "hf" or "trtllm".
    """
    folder = Path(output or "")
    if not output or not folder.is_dir():
        return []
    found = files.problem(folder, files.checkpoint(wanted))
    others = [name for name in formats_in(folder) if name != wanted]
    if found and others:
        return [f"{flag} {output} holds a checkpoint of format {', '.join(others)} already; use another folder"]
    return [f"{flag}: {found}"] if found else []

"""Whether a folder can be written, and whether something would be lost there. Standard library only."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from nemo_modelopt_dropin import run_file

# Names by which a checkpoint's format is known.
_MARKS = {
    "nemo": ("context", "weights"),
    "hf": ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors", "pytorch_model*.bin"),
    "trtllm": ("rank*.safetensors",),
}


def formats_in(folder: Path) -> list[str]:
    """Return the formats of the checkpoints in a folder."""
    return [name for name, marks in _MARKS.items() if any(any(folder.glob(mark)) for mark in marks)]


def problems(flag: str, output: str | None, inputs: Mapping[str, str | None], wanted: str) -> list[str]:
    """Return why a checkpoint of the format ``wanted`` cannot be written to a folder; see the two that follow."""
    return place_problems(flag, output, inputs) or content_problems(flag, output, wanted)


def place_problems(flag: str, output: str | None, inputs: Mapping[str, str | None]) -> list[str]:
    """Return why a folder cannot be written, or what of the inputs would be overwritten.

    Args:
        flag: that names the folder.
        output: the folder, which need not exist.
        inputs: flag -> path of what is read.
    """
    if not output:
        return []
    folder = Path(output)
    for name, path in inputs.items():
        if path and Path(path).exists():
            own, other = folder.resolve(), Path(path).resolve()
            if own == other:
                return [f"{flag} {output} is {name} itself, which would be overwritten; give another folder"]
            if other in own.parents:
                return [f"{flag} {output} lies inside of {name} {path}; give a folder outside of it"]
    above = folder.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        return [f"{flag} {output} cannot be made: {above} is a file; give a folder"]
    try:
        with tempfile.TemporaryDirectory(dir=above, prefix=".nemo-modelopt-"):
            return []
    except OSError as error:
        return [f"{flag} {output} cannot be written: {above}: {error.strerror}"]


def content_problems(flag: str, output: str | None, wanted: str) -> list[str]:
    """Return why a checkpoint cannot be written into a folder that exists: it would be mixed with something else.

    What this command wrote there before, in the same format, is replaced.

    Args:
        flag: that names the folder.
        output: the folder.
        wanted: format of the checkpoint to come, a key of ``formats_in``.
    """
    folder = Path(output or "")
    if not output or not folder.is_dir() or not any(folder.iterdir()):
        return []
    others = [name for name in formats_in(folder) if name != wanted]
    if others:
        return [f"{flag} {output} holds a checkpoint of format {', '.join(others)} already; give another folder"]
    if not (folder / run_file.NAME).is_file():
        return [f"{flag} {output} exists and was not written by this command; give another folder"]
    return []

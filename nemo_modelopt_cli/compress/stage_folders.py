"""The folders of a stage: the finished result, the one being written, and the swap between them.

A stage that has a finished result runs again in ``<name>.new``; that folder replaces the result once it is complete. A
stage's folder always holds ``stage.json`` or ``working.json``, and a folder without them is never removed. Standard
library only.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from nemo_modelopt_dropin import files

DONE = "stage.json"
WORKING = "working.json"


class StageError(RuntimeError):
    """A run folder cannot be used, for example because it holds other files or the settings changed."""


def final(root: Path, name: str) -> Path:
    """Return the folder of a stage's finished result."""
    return root / name


def beside(root: Path, name: str) -> Path:
    """Return the folder in which a stage with a finished result is run again."""
    return root / f"{name}.new"


def _replaced(root: Path, name: str) -> Path:
    return root / f"{name}.old"


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; values that JSON cannot hold are written as text."""
    files.write_json(path, content, default=str)


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, or an empty dictionary if it cannot be read as one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def recover(root: Path, name: str) -> None:
    """Complete a swap that was killed between its steps."""
    place, new, old = final(root, name), beside(root, name), _replaced(root, name)
    if (new / DONE).is_file():
        swap(root, name)
    elif old.exists() and not place.exists():
        old.rename(place)
    elif old.exists():
        discard(old)


def swap(root: Path, name: str) -> None:
    """Replace the finished result by the complete one in ``<name>.new``, and remove it."""
    place, new, old = final(root, name), beside(root, name), _replaced(root, name)
    if place.exists():
        discard(old)
        place.rename(old)
    new.rename(place)
    discard(old)


def has_progress(folder: Path) -> bool:
    """Return whether an unfinished stage has left anything behind in its folder."""
    return (folder / WORKING).is_file() and any(entry.name not in (WORKING, "log") for entry in folder.iterdir())


def discard(folder: Path) -> None:
    """Remove a stage's folder; do nothing if it does not exist.

    Raises:
        StageError: If the folder is neither empty nor the folder of a stage.
    """
    if not folder.exists():
        return
    marked = (folder / DONE).is_file() or (folder / WORKING).is_file()
    # A kill while the first marker was written leaves only its temporary file.
    if not marked and any(not (e.name.startswith(f".{WORKING}.") and e.suffix == ".part") for e in folder.iterdir()):
        raise StageError(
            f"{folder} holds files that this command did not write; move them away, or use another --output"
        )
    # The marker of an unfinished stage is removed last: a kill in between leaves a folder that is ours and unfinished.
    if not (folder / WORKING).is_file():
        write_json(folder / WORKING, {})
    (folder / DONE).unlink(missing_ok=True)
    for entry in list(folder.iterdir()):
        if entry.name == WORKING:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    (folder / WORKING).unlink()
    folder.unlink() if folder.is_symlink() else folder.rmdir()


def relocated(value: Any, source: Path, target: Path) -> Any:
    """Return a JSON value in which paths below one folder are paths below another."""
    if isinstance(value, dict):
        return {key: relocated(one, source, target) for key, one in value.items()}
    if isinstance(value, list):
        return [relocated(one, source, target) for one in value]
    if isinstance(value, str) and (value == str(source) or value.startswith(f"{source}{os.sep}")):
        return f"{target}{value[len(str(source)) :]}"
    return value

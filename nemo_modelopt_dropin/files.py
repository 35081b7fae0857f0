"""Write and replace files and folders without deleting files of the user. Standard library only.

Everything that this package writes follows three rules:

- It deletes or replaces only folders that contain its marker, and in them only the entries that the marker lists.
- It writes next to the target and renames, so that readers see the old content or the new one, never a part of it.
- One run at a time writes to an output (see `locks`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from nemo_modelopt_dropin import locks, ranks
from nemo_modelopt_dropin.errors import ModelOptConfigError

MARKER = ".nemo-modelopt.json"
# Holds the settings of a command, in its output.
RUN_FILE = "run.yaml"

# Kinds of content.
CALIBRATION_STATE = "calibration state"
PRUNING_SCORES = "folder of pruning scores"
RECORDED_TEACHER = "recorded teacher"
REPORT = "report"
TRAINING_CHECKPOINT = "training checkpoint"
TRAINING_RUN = "training run"
COMPRESSION_RUN = "compression run"
EVALUATION = "evaluation"
STAGE = "stage of a compression run"
# Folders that are written in place.
_STAYING = (TRAINING_RUN, COMPRESSION_RUN, EVALUATION)
_FORMATS = {"nemo": "NeMo checkpoint", "hf": "Hugging Face checkpoint", "trtllm": "TensorRT-LLM checkpoint"}

_SHOWN = 3
_UNFINISHED = "unfinished "


def checkpoint(export_format: str) -> str:
    """Return the kind of content of an export in the format "nemo", "hf" or "trtllm"."""
    return _FORMATS[export_format]


# --- which folders are ours -------------------------------------------------------------------------------------------


def mark(folder: Path, kind: str, entries: Iterable[str] | None = None) -> None:
    """Mark a folder as written by this package.

    Args:
        folder: The folder; it must exist.
        kind: Kind of its content, for example "calibration state".
        entries: Names of the entries that are ours; by default all current entries of the folder.
    """
    folder = Path(folder)
    found = sorted(_names(folder)) if entries is None else sorted(set(entries))
    write_json(folder / MARKER, {"kind": kind, "entries": found})


def claim(folder: Path, *names: str) -> None:
    """Add entries to those that the marker of a folder lists; do nothing if the folder has no marker."""
    content = _marker(Path(folder))
    if content is not None:
        mark(folder, content["kind"], {*content["entries"], *names})


def taken(folder: Path, names: Iterable[str]) -> str | None:
    """Return why entries with these names cannot be written into a folder, or None if they can.

    They cannot if an entry of the user has one of the names.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        return f"{folder} is a file; use a folder"
    own = (_marker(folder) or {"entries": ()})["entries"]
    found = [name for name in names if os.path.lexists(folder / name) and name not in own]
    if not found:
        return None
    return f"{folder} holds {_listed(found)}, which this package did not write; use another folder, or move it away"


def own(folder: Path, kind: str, *names: str) -> None:
    """Mark entries of a folder as ours before they are written; the folder need not exist.

    Args:
        folder: The folder; if it is marked, its kind of content does not change.
        kind: Kind of content if it is not marked.
        *names: The entries.

    Raises:
        ModelOptConfigError: If an entry of the user has one of these names.
    """
    problem_found = taken(folder, names)
    if problem_found:
        raise ModelOptConfigError(f"cannot write: {problem_found}.")
    folder.mkdir(parents=True, exist_ok=True)
    content = _marker(folder) or {"kind": kind, "entries": []}
    mark(folder, content["kind"], {*content["entries"], *names})


def remove_entries(folder: Path, *names: str) -> None:
    """Remove the entries with these names that are ours."""
    content = _marker(folder)
    if content is None:
        return
    for name in {*names} & {*content["entries"]}:
        _delete(folder / name)
    mark(folder, content["kind"], {*content["entries"]} - {*names})


def kind_of(folder: Path) -> str | None:
    """Return the kind of content of a marked folder, or None if it has no marker."""
    content = _marker(Path(folder))
    return content["kind"] if content else None


def is_ours(folder: Path, kind: str) -> bool:
    """Return whether this package wrote the folder, as content of this kind."""
    return kind_of(folder) == kind


def problem(path: Path, kind: str) -> str | None:
    """Return why content cannot be written to a path without losing files of the user, or None if it can.

    The path may not exist, be an empty folder, or be a folder of ours with the same kind of content.
    """
    path = Path(path)
    if not path.exists():
        return f"{path} is a broken link; remove it or use another folder" if path.is_symlink() else None
    if not path.is_dir():
        return f"{path} is a file; use a folder"
    if kind not in _STAYING and os.path.ismount(path):
        return f"{path} is a mount point, which cannot be replaced as a whole; use a folder in it"
    names, found = _names(path), kind_of(path)
    if found == kind or (not names and found is None):
        return None
    if found is not None:
        return f"{path} holds a {found}, not a {kind}; use another folder, or remove it yourself"
    return (
        f"{path} holds {_listed(names)}, which this package did not write and will not replace; use another folder, "
        "or move the other files away"
    )


def check(path: Path, kind: str, setting: str) -> None:
    """Raise an error if writing content to a path would lose files of the user.

    Args:
        path: The folder to write.
        kind: Its kind of content.
        setting: Name of the setting or flag with the path, for the message.

    Raises:
        ModelOptConfigError: With the existing content and what to do.
    """
    found = problem(path, kind)
    if found:
        raise ModelOptConfigError(f"{setting}: {found}.")


def remove(folder: Path, kind: str) -> None:
    """Remove our entries of a folder, and the folder if it is then empty; do nothing if it does not exist.

    Raises:
        ModelOptConfigError: If the folder is neither empty nor ours.
    """
    folder = Path(folder)
    gone = folder.with_name(f".{folder.name}.removed")
    for one in (gone, folder):
        if one.exists():
            check(one, kind, "cannot remove")
    if gone.exists():  # from a killed run
        _clear(gone)
    if not folder.exists():
        return
    if not folder.is_symlink() and not _foreign(folder):
        with contextlib.suppress(OSError):  # for example of a mount point
            folder = folder.rename(gone)  # in one step: a killed run must not leave a part that looks complete
    _clear(folder)


def _clear(folder: Path) -> None:
    """Remove our entries of a folder, the marker last, and the folder if it is then empty."""
    for name in (_marker(folder) or {"entries": ()})["entries"]:
        _delete(folder / name)
    if _names(folder):
        return  # the marker stays with the user's files, so that the folder can be written again
    _remove_marker(folder)


def _remove_marker(folder: Path) -> None:
    """Remove the marker of a folder that contains nothing else, and the folder."""
    for entry in [*folder.iterdir()]:
        if _is_marker_part(entry.name):
            entry.unlink()
    (folder / MARKER).unlink(missing_ok=True)
    if not folder.is_symlink():
        folder.rmdir()


def _marker(folder: Path) -> dict[str, Any] | None:
    """Return the content of a folder's marker, or None if it is missing or cannot be read."""
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("kind"), str):
        return None
    entries = content.get("entries")
    if not isinstance(entries, list):
        return None
    # Anybody may have written the marker, so names that lead out of the folder are ignored.
    return {"kind": content["kind"], "entries": [one for one in entries if isinstance(one, str) and _is_name(one)]}


def _is_name(entry: str) -> bool:
    return entry not in ("", ".", "..", MARKER) and "/" not in entry and "\0" not in entry


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name != MARKER and not _is_marker_part(entry.name))


def _is_marker_part(name: str) -> bool:
    """Return whether a file is a marker that was being written when its process was killed."""
    return re.fullmatch(rf"\.{re.escape(MARKER)}\.\d+\.part", name) is not None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- write next to the target, then rename ----------------------------------------------------------------------------


def beside_path(path: Path) -> Path:
    """Return the path that `replacing` yields; ranks on several hosts may have the same process number."""
    return path.with_name(f".{path.name}.{ranks.number()}{os.getpid():07d}.part")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to; it replaces the file at ``path`` if the context ends without an error."""
    path = Path(path)
    beside = beside_path(path)
    beside.unlink(missing_ok=True)  # do not write through an existing link
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old file or the new one, never a part."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write a JSON file in one step.

    Args:
        path: The file.
        content: Its content.
        default: Called for objects that JSON cannot represent, as in ``json.dump``.
    """
    write_text(path, json.dumps(content, indent=1, default=default))


def staging_path(target: Path) -> Path:
    """Return the path that `staging` returns for a target, for ranks that do not call it."""
    target = _resolved(target)
    return target.with_name(f".{target.name}.partial") / target.name


@contextlib.contextmanager
def written(target: Path, kind: str, writes: bool = True) -> Iterator[Path]:
    """Yield a path to write a folder to; it replaces the target if the context ends without an error.

    All ranks that write the folder call this and synchronise by other means; only one of them moves the folder.

    Args:
        target: The folder.
        kind: Its kind of content.
        writes: Whether this process locks the target, creates the folder around the path and moves it into place.

    Raises:
        ModelOptConfigError: If the target or the temporary folder next to it contains files that are not ours.
        InUseError: If another process is writing there.
    """
    if not writes:
        yield staging_path(target)
        return
    with locks.lock(target):
        new = staging(target, kind)
        try:
            yield new
            publish(new, target, kind)
        except BaseException:
            discard(new, kind)
            raise


def staging(target: Path, kind: str) -> Path:
    """Return a new path to write the content of a folder to; `publish` moves it into place.

    The path is in a marked folder next to the target. Content that a killed run left there is removed, and a target
    that it left between the two renames of `publish` is restored.

    Raises:
        ModelOptConfigError: If the target or the temporary folder next to it contains files that are not ours.
    """
    target = _resolved(target)
    check(target, kind, "cannot write")
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target, kind)
    new = staging_path(target)
    discard(new, kind)
    new.parent.mkdir()
    mark(new.parent, _UNFINISHED + kind)
    return new


def discard(new: Path, kind: str) -> None:
    """Remove a path from `staging` and the folder around it.

    Raises:
        ModelOptConfigError: If `staging` did not create that folder.
    """
    around = new.parent
    if os.path.lexists(around):
        check(around, _UNFINISHED + kind, "cannot remove")
        for name in _names(around):
            _delete(around / name)
        # The marker goes last: a kill in between must leave a folder that is ours.
        _remove_marker(around)


def publish(new: Path, target: Path, kind: str) -> None:
    """Move finished content from `staging` into place; if nothing was written, do not change the target.

    The earlier content of the target is replaced as a whole; files that the user added to it are kept.

    Raises:
        ModelOptConfigError: If a file of the user in the target has the name of a new entry.
    """
    target = _resolved(target)
    check(target, kind, "cannot write")
    if new.exists():
        in_the_way = sorted({*_foreign(target)} & {*_names(new)})
        if in_the_way:
            raise ModelOptConfigError(
                f"cannot write {target}: {_listed(in_the_way)} in it was not written by this package; move it away."
            )
        mark(new, kind)
        if target.exists():
            shutil.copymode(target, new)
            target.rename(_old(target))
        new.rename(target)
        _recover(target, kind)
    discard(new, kind)


def _resolved(target: Path) -> Path:
    """Return a path without links, so that renames affect the folder and not a link to it."""
    return Path(os.path.realpath(target))


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _foreign(folder: Path) -> list[str]:
    """Return the entries of a folder that are not ours."""
    if not folder.is_dir():
        return []
    own = (_marker(folder) or {"entries": ()})["entries"]
    return [name for name in _names(folder) if name not in own]


def _recover(target: Path, kind: str) -> None:
    """Finish the replacement of a folder: keep the user's files and remove the old content, or restore it."""
    old = _old(target)
    if not old.exists():
        return
    check(old, kind, "cannot remove")
    if not target.exists():
        old.rename(target)
        return
    for name in _foreign(old):
        if not os.path.lexists(target / name):
            (old / name).rename(target / name)
    remove(old, kind)

"""Checks that compare two inputs (texts, models, names) before anything heavy is imported."""

from __future__ import annotations

import filecmp
import os
from pathlib import Path

from nemo_modelopt_dropin.preflight import model_sizes
from nemo_modelopt_dropin.report.page import millions


def same_text(train: tuple[str, str | None], heldout: tuple[str, str | None]) -> list[str]:
    """Return why a held-out text cannot be used for measurements: it is the training text.

    Args:
        train: Flag and path of the training text.
        heldout: Flag and path of the held-out text.
    """
    (flag, path), (heldout_flag, heldout_path) = train, heldout
    if not path or not heldout_path or not Path(path).is_file() or not Path(heldout_path).is_file():
        return []
    if os.path.samefile(path, heldout_path):
        found = f"is the same file as {flag}"
    elif filecmp.cmp(path, heldout_path, shallow=False):
        found = f"has the same content as {flag} {path}"
    else:
        return []
    return [f"{heldout_flag} {heldout_path} {found}; held-out text must not be trained on: use another file"]


def name_problems(flag: str, name: str | None, folder: str | None) -> list[str]:
    """Return why a run's name cannot be used as the name of a folder.

    Args:
        flag: Flag that sets the name.
        name: Name of the run.
        folder: Folder in which the run creates its own.
    """
    if not name or not folder:
        return []
    # Links are not resolved: a link inside the folder may lead to another disk.
    base, place = os.path.abspath(folder), os.path.abspath(os.path.join(folder, name))
    if place.startswith(base.rstrip(os.sep) + os.sep) and ".." not in Path(name).parts:
        return []
    return [f"{flag} {name} is not a folder below {folder}; use a name without '..' or a leading '/'"]


def larger_student(student: str | None, teacher: str | None) -> str | None:
    """Return a warning if a student has more parameters than its teacher, else None."""
    shapes = [model_sizes.known(path) if path else None for path in (student, teacher)]
    if shapes[0] is None or shapes[1] is None or shapes[0].parameters <= shapes[1].parameters:
        return None
    sizes = [millions(shape.parameters) for shape in shapes if shape is not None]
    return f"The student has more parameters ({sizes[0]}) than its teacher ({sizes[1]}): are the two swapped?"

"""Names of tasks, and YAML files that define tasks: what they contain and use, read without lm-eval."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ENDINGS = (".yaml", ".yml")
_FUNCTION = "!function"


@dataclass(frozen=True)
class TaskFile:
    """A YAML file that defines a task or a group of tasks.

    Args:
        path: the file.
        name: of the task or group.
        members: names of a group's tasks; None for a task.
    """

    path: Path
    name: str
    members: tuple[str, ...] | None = None


def names(tasks: Iterable[str]) -> tuple[str, ...]:
    """Return the tasks of a setting one by one: each of its texts may hold several, separated by commas."""
    return tuple(dict.fromkeys(name.strip() for text in tasks for name in text.split(",") if name.strip()))


def is_path(name: str) -> bool:
    """Return whether a task is meant as a file or folder, and not as a name of lm-eval."""
    if name.endswith(_ENDINGS) or os.sep in name or name in (".", ".."):
        return True
    folder = Path(name)
    return folder.is_dir() and any(file.suffix in _ENDINGS for file in folder.iterdir())


def absolute(tasks: Iterable[str]) -> tuple[str, ...]:
    """Return the tasks one by one, with absolute paths, so that the setting means the same from everywhere."""
    return tuple(str(Path(name).expanduser().resolve()) if is_path(name) else name for name in names(tasks))


def problems(name: str) -> list[str]:
    """Return what is wrong with a path to tasks; names are checked by lm-eval itself."""
    if not is_path(name):
        return []
    path = Path(name).expanduser()
    if not path.exists():
        return [f"tasks {name}: there is no such file or folder"]
    try:
        found = chosen(name)
    except ValueError as error:
        return [f"tasks {name}: {error}"]
    return [] if found else [f"tasks {name}: no file there defines a task (task: NAME) or a group (group: NAME)"]


def chosen(name: str) -> list[TaskFile]:
    """Return the files whose tasks a path means: of a folder, its groups and the tasks that belong to none.

    Raises:
        ValueError: if a file that is named cannot be read as a task.
    """
    path = Path(name).expanduser().resolve()
    if path.is_file():
        return [one] if (one := _defined(path)) else []
    found = []
    for file in sorted(file for ending in _ENDINGS for file in path.rglob(f"*{ending}")):
        try:
            one = _defined(file)
        except ValueError:
            continue  # other YAML files may lie there
        found += [one] if one else []
    grouped = {member for one in found for member in one.members or ()}
    return [one for one in found if one.name not in grouped]


def searched(name: str) -> list[Path]:
    """Return the folders in which lm-eval looks for the tasks that a group of a path names."""
    path = Path(name).expanduser().resolve()
    if path.is_dir():
        return [path]
    return [path.parent] if any(one.members is not None for one in chosen(name)) else []


def inputs(name: str) -> list[Path]:
    """Return the files on whose content the tasks of a path depend: definitions, functions and local data."""
    folders = searched(name)
    files = [one.path for one in chosen(name)]
    files += [file for folder in folders for ending in _ENDINGS for file in folder.rglob(f"*{ending}")]
    found: dict[Path, None] = {}
    for file in sorted({*files}):
        for used in _used(file, set()):
            found[used] = None
    return list(found)


def _defined(path: Path) -> TaskFile | None:
    content = _merged(path, set())
    task, group = content.get("task"), content.get("group")
    if isinstance(group, str):
        listed = task if isinstance(task, list) else []
        members = [one.get("task") if isinstance(one, dict) else one for one in listed]
        return TaskFile(path, group, tuple(one for one in members if isinstance(one, str)))
    return TaskFile(path, task) if isinstance(task, str) else None


def _merged(path: Path, seen: set[Path]) -> dict[str, Any]:
    """Return the content of a file, on top of that of the files that it includes."""
    content = _read(path)
    found: dict[str, Any] = {}
    for other in _included(path, content):
        if other not in seen and other.is_file():
            found |= _merged(other, seen | {path})
    return found | content


def _included(path: Path, content: dict[str, Any]) -> list[Path]:
    include = content.get("include") or []
    return [(path.parent / one).resolve() for one in (include if isinstance(include, list) else [include])]


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file; functions stay text.

    Raises:
        ValueError: if it cannot be read, with the reason.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads the names of functions as text."""

    Loader.add_constructor(_FUNCTION, lambda loader, node: f"{_FUNCTION} {loader.construct_scalar(node)}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError("does not hold settings by name")
    return content


def _used(path: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield a file, the files that it includes, the modules of its functions and its local data."""
    if path in seen or not path.is_file():
        return
    seen.add(path)
    yield path
    try:
        content = _read(path)
    except ValueError:
        return
    for other in _included(path, content):
        yield from _used(other, seen)
    for text in _texts(content):
        if text.startswith(_FUNCTION):
            module = text.removeprefix(_FUNCTION).strip().rpartition(".")[0]
            candidate = path.parent / f"{module.replace('.', '/')}.py"
        else:
            candidate = Path(text)
        # Data that is addressed by a pattern or a URL is not followed.
        if len(text) < 4096 and "\n" not in text and candidate.is_file():
            yield candidate.resolve()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(one)

"""Run files: YAML in which every value is text, as it is on a command line, and gets its type from the setting.

YAML 1.1 alone would read ``1e-4`` as text, ``010`` as 8, ``no`` as false and ``1:30`` as 90. Here all are text.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_modelopt_dropin import files

NAME = files.RUN_FILE
_NULLS = ("", "~", "null", "Null", "NULL")


class RunFileError(ValueError):
    """A file that cannot be read as settings by name."""


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return settings by name: texts, None, lists and mappings of these.

    Raises:
        RunFileError: if the file is missing, is not YAML, sets a name twice or does not hold a mapping.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            node = yaml.compose(file, Loader=yaml.SafeLoader)
    except OSError as error:
        raise RunFileError(f"cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunFileError(f"is not YAML: {' '.join(str(error).split())}") from None
    content = {} if node is None else _plain(node)
    if not isinstance(content, dict):
        raise RunFileError("must hold settings by name")
    return content


def _plain(node: Any) -> Any:
    """Return a node of the parsed file as text, None, a list or a mapping."""
    if node.id == "sequence":
        return [_plain(one) for one in node.value]
    if node.id == "mapping":
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key.value, str):
                raise RunFileError(f"line {key.start_mark.line + 1}: a name must be one word")
            if key.value in found:
                raise RunFileError(f"line {key.start_mark.line + 1}: {key.value} is set twice")
            found[key.value] = _plain(value)
        return found
    return None if node.style is None and node.value in _NULLS else node.value


def as_read(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as `read` returns them from a file that `write` wrote."""
    import yaml

    return _plain(yaml.compose(yaml.safe_dump(_dumpable(settings)), Loader=yaml.SafeLoader))


def write(path: str | os.PathLike[str], settings: Mapping[str, Any], heading: str = "") -> Path:
    """Write a run file under a temporary name and rename it; `read` returns the same settings, as texts.

    Args:
        path: the file.
        settings: names and values: texts, numbers, switches, None, lists and mappings of these.
        heading: comment on top.
    """
    import yaml

    target = Path(path)
    text = yaml.safe_dump(_dumpable(settings), sort_keys=False, allow_unicode=True, width=1000)
    comment = "".join(f"# {line}\n" for line in heading.splitlines())
    files.write_text(target, comment + text)
    files.claim(target.parent, target.name)
    return target


def _dumpable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _dumpable(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_dumpable(one) for one in value]
    return str(value) if isinstance(value, os.PathLike) else value

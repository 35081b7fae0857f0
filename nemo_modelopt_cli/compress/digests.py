"""Digests of a job's inputs, each computed once per run: local ranks take those of the process that started them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from nemo_modelopt_dropin import ranks

# Digests by path as JSON, in the environment of the ranks that a run starts.
_VARIABLE = "NEMO_MODELOPT_DIGESTS"


class Digests:
    """Digests of files and folders by path; each is computed when it is first needed.

    Args:
        known: digests that are known already, by path.
    """

    def __init__(self, known: Mapping[str, str] | None = None):
        self._known = dict(known or {})

    @classmethod
    def of_this_process(cls) -> Digests:
        """Return the digests that the parent of this rank has computed, and none in any other process."""
        passed = os.environ.get(_VARIABLE) if ranks.is_started_by_us() else None
        return cls(json.loads(passed) if passed else None)

    def file(self, path: str | Path) -> str:
        """Return the SHA-256 of a file's content."""
        return self._once(path, file_digest)

    def folder(self, path: str | Path) -> str:
        """Return the digest of a folder, see `folder_digest`."""
        return self._once(path, folder_digest)

    def for_ranks(self) -> dict[str, str]:
        """Return the environment variable that passes these digests on to ranks that this process starts."""
        return {_VARIABLE: json.dumps(self._known)}

    def _once(self, path: str | Path, digest: Callable[[str | Path], str]) -> str:
        if str(path) not in self._known:
            self._known[str(path)] = digest(path)
        return self._known[str(path)]


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def folder_digest(path: str | Path) -> str:
    """Return a SHA-256 of names, sizes and times below a folder, which changes if a checkpoint is replaced."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).rglob("*")):
        if file.is_file():
            stat = file.stat()
            digest.update(f"{file.relative_to(path)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()

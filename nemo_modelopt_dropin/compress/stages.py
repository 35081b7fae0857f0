"""Resumable stages: a finished one is not run again, an interrupted one is, changed settings undo what follows.

A stage owns the folder ``<root>/<name>``. It is finished exactly when that folder holds a ``stage.json``, written in
one step after everything else. Its fingerprint covers its settings and the identity of the stages it builds on, so a
stage that runs again invalidates those after it, whatever their settings. Standard library only: reading the state of
a run costs nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

DONE = "stage.json"
WORKING = "working.json"
_FORMAT = 1  # raise it when the meaning of a stage's folder changes: old folders are then not taken for finished


class StageError(RuntimeError):
    """A run folder cannot be used: another run holds it, or a stage needs one that is not there."""


@dataclass(frozen=True)
class Record:
    """What ``stage.json`` holds: the identity of one finished run of a stage, and what it found out."""

    name: str
    fingerprint: str
    run_id: str
    settings: dict[str, Any]
    result: dict[str, Any]
    seconds: float
    attempts: int = 1


@dataclass(frozen=True)
class Stage:
    """One step of the job.

    Args:
        name: the stage's folder below the root.
        run: called as ``run(folder, records)`` on every rank; returns what goes into ``Record.result``.
        settings: everything the outcome depends on, JSON-serialisable.
        after: names of the stages whose outcome this one uses.
        keeps_progress: True where ``run`` can continue from what an interrupted attempt left in the folder.
    """

    name: str
    run: Callable[[Path, Mapping[str, Record]], dict[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    keeps_progress: bool = False


class Ranks(Protocol):
    """What the state machine needs of a distributed job; `Alone` for one process."""

    rank: int

    def broadcast(self, value: Any) -> Any:
        """Return rank zero's value on every rank; also a barrier."""


class Alone:
    """One process: broadcasting returns the value itself."""

    rank = 0

    def broadcast(self, value):
        """Return the value."""
        return value


def fingerprint(stage: Stage, records: Mapping[str, Record]) -> str:
    """Return the SHA-256 of a stage's settings and of the runs it builds on."""
    content = {
        "format": _FORMAT,
        "name": stage.name,
        "settings": stage.settings,
        "after": {name: records[name].run_id for name in stage.after},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside the file, flush it to the disk and rename it: readers see the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, default=str)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def read_record(folder: Path) -> Record | None:
    """Return the record of a finished stage, or None where it is unfinished or unreadable."""
    try:
        return Record(**json.loads((folder / DONE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def prepare(stage: Stage, root: Path, records: Mapping[str, Record]) -> tuple[Record | None, int]:
    """Find a finished run of the stage, or clear the way for a new attempt.

    Returns:
        The record where the stage is finished with these settings, else None; and the number of this attempt.
    """
    folder, wanted = root / stage.name, fingerprint(stage, records)
    done = read_record(folder)
    if done is not None and done.fingerprint == wanted:
        return done, done.attempts
    try:
        left = json.loads((folder / WORKING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        left = {}
    continues = done is None and left.get("fingerprint") == wanted
    if not (continues and stage.keeps_progress) and folder.exists():
        # The mark first: a kill in the middle of the removal must not leave a folder that looks finished.
        (folder / DONE).unlink(missing_ok=True)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    attempt = int(left.get("attempts", 0)) + 1 if continues else 1
    write_json(folder / WORKING, {"fingerprint": wanted, "attempts": attempt, "settings": stage.settings})
    return None, attempt


def run_stages(
    stages: Iterable[Stage],
    root: Path,
    ranks: Ranks | None = None,
    tell: Callable[[str, Stage, Record | None], None] = lambda event, stage, record: None,
) -> dict[str, Record]:
    """Run what is not finished, in order, and return every stage's record.

    Args:
        stages: in an order in which each comes after those it names in ``after``.
        root: the run's folder.
        ranks: the distributed job; every rank calls this function, rank zero decides and writes.
        tell: called on every rank with "kept", "start", "again" or "done", the stage, and its record if it has one.

    Raises:
        StageError: where a stage names one that did not come before it.
    """
    ranks = ranks or Alone()
    records: dict[str, Record] = {}
    for stage in stages:
        missing = [name for name in stage.after if name not in records]
        if missing:
            raise StageError(f"stage {stage.name!r} builds on {missing}, which did not run before it")
        plan = prepare(stage, root, records) if ranks.rank == 0 else None
        done, attempt = ranks.broadcast(plan)
        if done is None:
            tell("again" if attempt > 1 else "start", stage, None)
            done = _run(stage, root, records, attempt, ranks)
            tell("done", stage, done)
        else:
            tell("kept", stage, done)
        records[stage.name] = done
    return records


def _run(stage: Stage, root: Path, records: Mapping[str, Record], attempt: int, ranks: Ranks) -> Record:
    started = time.perf_counter()
    result = stage.run(root / stage.name, records)
    record = None
    if ranks.rank == 0:
        record = Record(
            name=stage.name,
            fingerprint=fingerprint(stage, records),
            run_id=uuid.uuid4().hex,
            settings=json.loads(json.dumps(dict(stage.settings), default=str)),
            result=json.loads(json.dumps(result, default=str)),
            seconds=round(time.perf_counter() - started, 3),
            attempts=attempt,
        )
        write_json(root / stage.name / DONE, asdict(record))
        (root / stage.name / WORKING).unlink(missing_ok=True)
    return ranks.broadcast(record)


def pending(stages: Sequence[Stage], root: Path) -> list[str]:
    """Return the names of the stages that would run, without changing anything."""
    records: dict[str, Record] = {}
    names = []
    for stage in stages:
        done = read_record(root / stage.name)
        known = all(name in records for name in stage.after)
        if known and done is not None and done.fingerprint == fingerprint(stage, records):
            records[stage.name] = done
        else:
            names.append(stage.name)
    return names


@contextlib.contextmanager
def lock(root: Path, patience_s: float = 15.0) -> Iterator[None]:
    """Hold a run folder for this process; the system releases it when the process dies, however it dies.

    Raises:
        StageError: where another process holds the folder for longer than ``patience_s`` (helpers of a killed run take
            a moment to notice).
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "w", encoding="utf-8") as file:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise StageError(
                        f"{root} is in use by another run; wait for it, stop it, or choose another folder"
                    ) from None
                time.sleep(0.2)
        yield

"""Resumable steps of a job: a finished one is kept, an interrupted one runs again, changed settings need permission.

Each step is a stage with a folder ``<root>/<name>``. It is finished exactly when that folder holds a ``stage.json``,
which is written last and atomically. Its fingerprint covers its settings and the identity of the stages it builds on,
so a stage that runs again invalidates those that follow, whatever their settings. A finished result whose settings
changed is replaced only if the caller allows it, and only once the new one is complete. Reading the state of a run
imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from nemo_modelopt_cli.compress import stage_folders
from nemo_modelopt_cli.compress.stage_folders import DONE, WORKING, StageError, read_json, write_json
from nemo_modelopt_dropin.errors import did_you_mean

__all__ = ["DONE", "WORKING", "Record", "Stage", "StageError", "run_stages", "write_json"]

# Entry of the result of a stage that had nothing to do.
SKIPPED = "skipped"
_FORMAT = 1  # raise it if the meaning of a stage's folder changes: old folders then count as unfinished
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Record:
    """The content of ``stage.json``: the identity of one finished run of a stage, and its result."""

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
        run: called as ``run(folder, records, out)`` on every rank, with the stream for progress bars; returns what
            goes into ``Record.result``.
        settings: everything on which the outcome depends, JSON-serialisable.
        after: names of the stages whose outcome this one uses.
        keeps_progress: True if ``run`` can resume from what an interrupted attempt left in the folder.
        ready: raises an error if something outside of the job that ``run`` needs is missing; None: it needs nothing.
    """

    name: str
    run: Callable[[Path, Mapping[str, Record], TextIO | None], dict[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    keeps_progress: bool = False
    ready: Callable[[], None] | None = None


class Ranks(Protocol):
    """The interface of a distributed job that the state machine uses; `Alone` for one process."""

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


def read_record(folder: Path) -> Record | None:
    """Return the record of a finished stage, or None if it is unfinished or unreadable."""
    try:
        return Record(**json.loads((folder / DONE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as reading a record returns them."""
    return json.loads(json.dumps(dict(settings), default=str))


@dataclass(frozen=True)
class Change:
    """A stage whose settings differ from those of its result.

    Args:
        name: the stage.
        settings: one sentence for each setting that changed.
        finished: False if the stage was interrupted.
        also: names of the finished stages that build on it.
    """

    name: str
    settings: tuple[str, ...]
    finished: bool
    also: tuple[str, ...]


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a sentence for each setting that differs."""
    old, new = _plain(before), _plain(after)
    found = []
    for name in sorted({*old, *new}):
        one, other = old.get(name), new.get(name)
        if one == other:
            continue
        if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (one, other)):
            found.append(f"the content of {name} changed")
        else:
            found.append(f"{name} was {_shown(one)} and is now {_shown(other)}")
    return tuple(found)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return "another file" if _DIGEST.fullmatch(value) else value
    return json.dumps(value)


def changed(stages: Sequence[Stage], root: Path) -> list[Change]:
    """Return the stages whose result a run would replace because their own settings changed, without changing files."""
    found = []
    for stage in stages:
        wanted, done = _plain(stage.settings), read_record(root / stage.name)
        if done is not None:
            before, finished = done.settings, True
        else:
            left = read_json(root / stage.name / WORKING)
            if not stage.keeps_progress or "settings" not in left or not stage_folders.has_progress(root / stage.name):
                continue
            before, finished = left["settings"], False
        if differing := differences(before, wanted):
            finished_after = [name for name in _followers(stages, stage.name) if read_record(root / name) is not None]
            found.append(Change(stage.name, differing, finished, tuple(finished_after)))
    return found


def _followers(stages: Sequence[Stage], name: str) -> list[str]:
    """Return the names of the stages that build on one, directly or not, in order."""
    found = {name}
    for stage in stages:
        if found & {*stage.after}:
            found.add(stage.name)
    return [stage.name for stage in stages if stage.name in found and stage.name != name]


def not_allowed(stages: Sequence[Stage], root: Path, redo: Collection[str]) -> list[Change]:
    """Return the changes that ``redo``, names of stages, does not allow; a stage allows those that build on it."""
    allowed = {*redo}.union(*(_followers(stages, name) for name in redo))
    return [change for change in changed(stages, root) if change.name not in allowed]


def unknown(names: Sequence[str], redo: Collection[str]) -> list[str]:
    """Return a sentence for each name in ``redo`` that is not the name of a stage."""
    return [
        f"--redo {name}: there is no such stage; the stages are {', '.join(names)}{did_you_mean(name, names)}"
        for name in dict.fromkeys(redo)
        if name not in names
    ]


def without_effect(stages: Sequence[Stage], root: Path, redo: Collection[str]) -> list[str]:
    """Return the names in ``redo`` that replace no result: neither the stage nor one that builds on it changed."""
    waiting = pending(stages, root)
    # A stage with a result runs again if it changed or a stage that it builds on runs; one without runs anyway.
    replaced = {name for name in waiting if read_record(root / name) is not None}
    return [name for name in dict.fromkeys(redo) if name not in waiting and not replaced & {*_followers(stages, name)}]


def check_redo(stages: Sequence[Stage], root: Path, redo: Collection[str]) -> None:
    """Raise an error if a run would replace a result without permission.

    Raises:
        StageError: naming each setting that changed, what would be run again, and what to do.
    """
    wrong = unknown([stage.name for stage in stages], redo)
    if wrong:
        raise StageError("\n".join(wrong))
    found = not_allowed(stages, root, redo)
    if not found:
        return
    lines = [f"settings changed since {root} was written:"]
    listed, follow = {change.name for change in found}, set[str]()
    first = []
    for change in found:
        kind = "finished" if change.finished else "interrupted"
        lines.append(f"  {change.name} ({kind}): {'; '.join(change.settings)}")
        also = [name for name in change.also if name not in listed]
        if also:
            lines.append(f"    would be run again too: {', '.join(also)}")
        listed.update(also)
        if change.name not in follow:
            first.append(change.name)
        follow.update(_followers(stages, change.name))
    lines.append(
        f"Use --redo {' '.join(first)} (redo=[...] in Python) to run them again; a finished "
        "result is kept until the new one is complete. Or use the old settings, or another --output."
    )
    raise StageError("\n".join(lines))


@dataclass(frozen=True)
class Plan:
    """Rank zero's decision about a stage: its record if it is finished, else the attempt and the output folder."""

    done: Record | None
    attempt: int
    folder: str
    replaces: bool = False


def prepare(stage: Stage, root: Path, records: Mapping[str, Record]) -> Plan:
    """Find a finished run of the stage, or prepare its folder for a new attempt; an old result is kept.

    Raises:
        StageError: if the folder holds files that do not belong to a stage.
    """
    stage_folders.recover(root, stage.name)
    place, wanted = stage_folders.final(root, stage.name), fingerprint(stage, records)
    done = read_record(place)
    if done is not None and done.fingerprint == wanted:
        return Plan(done, done.attempts, str(place))
    folder = stage_folders.beside(root, stage.name) if done is not None else place
    left = read_json(folder / WORKING)
    continues = not (folder / DONE).exists() and left.get("fingerprint") == wanted
    if not (continues and stage.keeps_progress):
        stage_folders.discard(folder)
    folder.mkdir(parents=True, exist_ok=True)
    attempt = int(left.get("attempts", 0)) + 1 if continues else 1
    write_json(folder / WORKING, {"fingerprint": wanted, "attempts": attempt, "settings": stage.settings})
    return Plan(None, attempt, str(folder), replaces=done is not None)


def run_stages(
    stages: Iterable[Stage],
    root: Path,
    ranks: Ranks | None = None,
    on_event: Callable[[str, Stage, Record | None], None] = lambda event, stage, record: None,
    redo: Collection[str] = (),
    out: TextIO | None = None,
) -> dict[str, Record]:
    """Run the stages that are not finished, in order, and return the records of all stages.

    Args:
        stages: ordered so that each comes after those that it names in ``after``.
        root: the run's folder.
        ranks: the distributed job; every rank calls this function, rank zero decides and writes.
        on_event: called on every rank with "kept", "start", "again", "redo" or "done", the stage, and its record if it
            has one.
        redo: names of stages whose results may be replaced if their settings changed, with those that build on them.
        out: stream for progress bars; None is standard error.

    Raises:
        StageError: if a stage names one that did not come before it, or a result may not be replaced.
    """
    ranks = ranks or Alone()
    stages = list(stages)
    if ranks.rank == 0:
        for stage in stages:
            stage_folders.recover(root, stage.name)
        check_redo(stages, root, redo)
    records: dict[str, Record] = {}
    for stage in stages:
        missing = [name for name in stage.after if name not in records]
        if missing:
            raise StageError(f"stage {stage.name!r} builds on {missing}, which did not run before it")
        plan = _agreed(prepare(stage, root, records) if ranks.rank == 0 else None, ranks)
        done = plan.done
        if done is None:
            on_event("again" if plan.attempt > 1 else "redo" if plan.replaces else "start", stage, None)
            done = _run(stage, root, records, plan, ranks, out)
            on_event("done", stage, done)
        else:
            on_event("kept", stage, done)
        records[stage.name] = done
    return records


def _agreed(plan: Plan | None, ranks: Ranks) -> Plan:
    """Return rank zero's plan on every rank; only plain data is exchanged."""
    found = ranks.broadcast(asdict(plan) if plan is not None else None)
    return Plan(**{**found, "done": Record(**found["done"]) if found["done"] else None})


def _run(
    stage: Stage, root: Path, records: Mapping[str, Record], plan: Plan, ranks: Ranks, out: TextIO | None
) -> Record:
    started, folder = time.perf_counter(), Path(plan.folder)
    result = stage.run(folder, records, out)
    record = None
    if ranks.rank == 0:
        place = stage_folders.final(root, stage.name)
        record = Record(
            name=stage.name,
            fingerprint=fingerprint(stage, records),
            run_id=uuid.uuid4().hex,
            settings=_plain(stage.settings),
            result=stage_folders.relocated(json.loads(json.dumps(result, default=str)), folder, place),
            seconds=round(time.perf_counter() - started, 3),
            attempts=plan.attempt,
        )
        write_json(folder / DONE, asdict(record))
        (folder / WORKING).unlink(missing_ok=True)
        if folder != place:
            stage_folders.swap(root, stage.name)
    return Record(**ranks.broadcast(asdict(record) if record is not None else None))


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


def check_ready(stages: Sequence[Stage], root: Path) -> None:
    """Raise an error now if a stage that would run, maybe hours later, lacks something that the job does not make.

    Raises:
        ModelOptConfigError: from the stage.
    """
    waiting = pending(stages, root)
    for stage in stages:
        if stage.ready is not None and stage.name in waiting:
            stage.ready()

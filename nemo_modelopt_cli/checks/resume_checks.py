"""Find what a training resumes from and which settings changed since it started. Uses the standard library and YAML."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nemo_modelopt_cli import run_file
from nemo_modelopt_cli.parser import saved_settings
from nemo_modelopt_dropin import ranks

# The file by which a recording of a teacher is known.
RECORDING = "teacher_topk.json"
# Settings that may change: the output folder, the display, the length of the training, the machines.
_FREE = {
    "name",
    "log_dir",
    "max_steps",
    "devices",
    "num_nodes",
    "save_minutes",
    "log_interval",
    "index_mapping_dir",
    "dump_teacher_topk",
}


def newest(checkpoints: Path, interim: Path) -> Path | None:
    """Return the newest whole checkpoint among NeMo's last ones and the intermediate ones.

    Args:
        checkpoints: folder of NeMo's checkpoints; the marker of an unfinished one has its name and an ending.
        interim: folder of the intermediate checkpoints, which are renamed once they are whole.
    """
    found = [one for one in checkpoints.glob("*-last") if not one.with_name(f"{one.name}-unfinished").exists()]
    latest = max(interim.glob("step-*"), default=None)
    return max([*found, *([latest] if latest else [])], key=lambda path: path.stat().st_mtime, default=None)


def checkpoint(given: argparse.Namespace) -> Path | None:
    """Return the checkpoint from which a training would resume, or None if it starts or only records the teacher."""
    if given.dump_teacher_topk or not given.log_dir or not given.name:
        return None
    return newest(_output(given) / "checkpoints", _output(given) / "interim")


def problems(given: argparse.Namespace) -> list[str]:
    """Return which models differ from those that the training under this name was started with."""
    if checkpoint(given) is None:
        return []
    file, old = _before(given)
    pairs = [("model_path", old.get("model_path"), given.model_path)]
    teachers = (old.get("teacher_path"), old.get("teacher_topk")), (given.teacher_path, given.teacher_topk)
    if "teacher_path" in old and any(teachers[0]) != any(teachers[1]):
        name = "teacher_path" if teachers[0][0] or teachers[1][0] else "teacher_topk"
        pairs.append((name, old.get(name), getattr(given, name)))
    elif old.get("teacher_path") and given.teacher_path:
        pairs.append(("teacher_path", old["teacher_path"], given.teacher_path))
    elif _other_recording(old.get("teacher_topk"), given.teacher_topk):
        pairs.append(("teacher_topk", old["teacher_topk"], given.teacher_topk))
    found = []
    for name, before, now in pairs:
        if (not before and name == "model_path") or not now and not before or _same_path(before, now):
            continue
        start = f"started with --{name} {before}" if before else f"started without --{name}"
        moved = before and not os.path.exists(str(before))
        hint = f" (if it was only moved, correct its path in {file})" if moved else ""
        found.append(
            f"--{name} {now or '(not set)'}: the training in {_output(given)} was {start}, and would be resumed; "
            f"choose another --name{hint}"
        )
    return found


def describe(given: argparse.Namespace, paths: Collection[str]) -> tuple[str, str | None] | None:
    """Return where a training resumes and a warning about settings that changed, or None if it starts.

    Args:
        given: checked arguments.
        paths: names of the settings that are paths, or may be.
    """
    last = checkpoint(given)
    if last is None:
        return None
    file, old = _before(given)
    changed = changes(old, given, paths)
    warning = f"settings changed since {file}: {'; '.join(changed)}" if changed else None
    return f"{_place(last, given)}from {last}", warning


def rows(given: argparse.Namespace, paths: Collection[str], done: Path | None = None) -> list[tuple[str, str]]:
    """Return the rows of a plan about the training that would be resumed; none if it starts.

    Args:
        given: checked arguments.
        paths: names of the settings that are paths, or may be.
        done: the last checkpoint of a training that is complete.
    """
    found = describe(given, paths)
    if found is None:
        return []
    return [
        ("resumes", f"not at all, the training is complete: {done}" if done else found[0]),
        *([("", f"warning: {found[1]}")] if found[1] else []),
    ]


def report(given: argparse.Namespace, paths: Collection[str]) -> None:
    """Print where a training resumes and what changed, once for all ranks and before rank zero saves the settings."""
    first = all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "LOCAL_RANK"))
    found = describe(given, paths) if first and not ranks.is_started_by_us() else None
    if found is not None:
        warning = f"warning: {found[1]}\n" if found[1] else ""
        sys.stderr.write(f"distill: resumes {found[0]}\n{warning}")


def changes(old: Mapping[str, Any], given: argparse.Namespace, paths: Collection[str]) -> list[str]:
    """Return ``name: old -> new`` for each setting of a run file that differs and bears on what is trained."""
    found = []
    for name, now in run_file.as_read(saved_settings(given, paths)).items():
        before = old.get(name, now)
        if name in _FREE or before == now or (name in paths and _same_path(before, now)):
            continue
        if _number(before) is not None and _number(before) == _number(now):
            continue
        found.append(f"{name}: {_shown(before)} -> {_shown(now)}")
    return found


def _output(given: argparse.Namespace) -> Path:
    return Path(given.log_dir) / given.name


def _run_files(given: argparse.Namespace) -> list[Path]:
    """Return the run files of a training, the latest first: when it resumes, NeMo moves the last one to ``run_N``."""
    moved = [path for path in _output(given).glob(f"run_*/{run_file.NAME}") if path.parent.name[4:].isdecimal()]
    moved.sort(key=lambda path: int(path.parent.name[4:]), reverse=True)
    return [path for path in (_output(given) / run_file.NAME, *moved) if path.is_file()]


def _before(given: argparse.Namespace) -> tuple[Path | None, dict[str, Any]]:
    """Return the latest run file and its settings; none if it is missing or cannot be read."""
    for path in _run_files(given)[:1]:
        try:
            return path, run_file.read(path)
        except run_file.RunFileError:
            return None, {}
    return None, {}


def _place(last: Path, given: argparse.Namespace) -> str:
    """Return the step of a checkpoint as its name contains it; NeMo's names count samples."""
    step = re.fullmatch(r"step-(\d+)", last.name)
    if step:
        return f"at step {int(step[1])}, "
    samples = re.search(r"consumed_samples=(\d+)", last.name)
    if not samples:
        return ""
    sizes = set()
    for path in _run_files(given):
        try:
            sizes.add(run_file.read(path).get("gbs"))
        except run_file.RunFileError:
            sizes.add(None)
    size = sizes.pop() if len(sizes) == 1 else None
    if isinstance(size, str) and size.isdecimal() and int(size) and int(samples[1]) % int(size) == 0:
        return f"at step {int(samples[1]) // int(size)}, "
    return f"after {samples[1]} samples, "


def _other_recording(before: Any, now: str | None) -> bool:
    """Return whether two recordings are of different teachers, as their files show."""
    digests = []
    for folder in (before, now):
        try:
            content = json.loads(Path(str(folder), RECORDING).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        digests.append(content.get("teacher") if isinstance(content, dict) else None)
    return None not in digests and digests[0] != digests[1]


def _same_path(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same_path, one, other))
    return isinstance(one, str) and isinstance(other, str) and os.path.realpath(one) == os.path.realpath(other)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, list):
        return " ".join(map(str, value))
    number = _number(value)
    return str(value) if number is None or str(value).isdecimal() else f"{number:g}"

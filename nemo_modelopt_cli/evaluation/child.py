"""Start lm-eval with the interpreter that has it, show its progress, and return its answer. Standard library only."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from nemo_modelopt_cli.process import launch, processes
from nemo_modelopt_dropin import ranks

SCRIPT = Path(__file__).with_name("harness.py")
# A bar of tqdm: its title, then percent, bar, done/all.
_BAR = re.compile(rb"(?:^|\r)([^\r\n:]*): *\d+%\|[^|]*\| *(\d+)/(\d+)")
_LAST_LINES = 20
_GRACE_S = 10.0

OnProgress = Callable[[str, int, int], None]


def ask(python: str, request: Mapping[str, Any], on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Run the harness on a request and return its answer, with the key ``error`` if it failed.

    What it prints goes to standard error, which commands redirect to their log; a check prints nothing.

    Args:
        python: the interpreter.
        request: what to do, see `harness`.
        on_progress: called with title, number done and number of all requests of a bar; None discards the output.
    """
    with tempfile.TemporaryDirectory(prefix="nemo-modelopt-evaluate-") as folder:
        question, answer = Path(folder) / "request.json", Path(folder) / "response.json"
        question.write_text(json.dumps(request), encoding="utf-8")
        last: deque[bytes] = deque(maxlen=_LAST_LINES)
        with _started([python, str(SCRIPT), str(question), str(answer)]) as child:
            for line in _lines(cast("IO[bytes]", child.stdout)):
                last.append(line)
                if on_progress is not None:
                    _forward(line, on_progress)
            code = child.wait()
        try:
            return json.loads(answer.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            text = b"\n".join(line.strip() for line in last).decode(errors="replace").strip()
            return {"error": f"it ended with code {code}", "output": text}


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that ends with this one, and end it on leaving."""
    child = subprocess.Popen(
        command,
        env=environment(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=functools.partial(processes.end_with, os.getpid()),
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if child.stdout is not None:
            child.stdout.close()


def environment(current: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for lm-eval: those of this process without what makes it a rank, and by default offline.

    Args:
        current: variables of this process.
    """
    # With them, lm-eval would take itself for a rank.
    found = {
        name: value
        for name, value in current.items()
        if not ranks.is_launchers(name) and not name.startswith(ranks.STARTED_BY_US)
    }
    count = current.get(ranks.STARTED_BY_US)
    if count and current.get("OMP_NUM_THREADS") == launch.threads(int(count)):
        del found["OMP_NUM_THREADS"]  # a share of the cores; the other ranks wait
    if not {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"} & found.keys():
        found["HF_HUB_OFFLINE"] = "1"
    found.setdefault("TOKENIZERS_PARALLELISM", "false")
    found["PYTHONUNBUFFERED"] = "1"
    return found


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield what is written, split at ends of lines and at the returns with which bars are drawn again."""
    rest = b""
    while block := os.read(stream.fileno(), 1 << 16):
        *whole, rest = re.split(rb"(?<=[\r\n])", rest + block)
        yield from (line for line in whole if line)
    if rest:
        yield rest


def _forward(line: bytes, on_progress: OnProgress) -> None:
    bar = _BAR.search(line)
    if bar is None:
        sys.stderr.write(line.decode(errors="replace"))
        return
    title, done, whole = bar.groups()
    on_progress(title.decode(errors="replace").strip(), int(done), int(whole))

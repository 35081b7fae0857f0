"""One run builds its plan once in each process, and reads each corpus once for its digest, on however many ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from nemo_modelopt_cli.compress import plan, stages
from nemo_modelopt_cli.compress.digests import Digests
from nemo_modelopt_cli.compress.stages import Stage
from nemo_modelopt_dropin import files, ranks
from test_code.support import command_lines, installed

ROOT = Path(__file__).resolve().parents[2]

# Every rank runs this file too, because local ranks are started with the command line of their parent.
_COUNTED = """
    import os, sys
    from nemo_modelopt_cli.compress import command, digests, plan

    def counted(module, name):
        function = getattr(module, name)
        def call(*args, **kwargs):
            with open(sys.argv[1], "a") as file:
                file.write(f"{os.environ.get('RANK', 'parent')} {name}\\n")
            return function(*args, **kwargs)
        setattr(module, name, call)

    counted(digests, "file_digest")
    counted(plan, "compression_stages")
    sys.exit(command.main(sys.argv[2:]))
"""
_MODEL = {
    "heldout_loss": 1.0,
    "heldout_tokens_per_second": 1.0,
    "parameters": 10,
    "body_parameters": 5,
    "bytes": 20,
    "shape": {"num_layers": 2},
    "curve": [{"step": 1, "loss": 1.0}],
}


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Finish a job on two ranks whose steps do nothing, and return its command line."""
    installed.need_pruning()
    command_lines.checkpoint(tmp_path / "model")
    for name in ("text", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", ranks.STARTED_BY_US):
        monkeypatch.delenv(name, raising=False)
    command = [*command_lines.COMPRESS.split(), "--output", "out", "--cpu", "--devices", "2"]
    job, output, _ = command_lines.script_of("compress").resolve(command)
    steps = plan.compression_stages(job, output)
    idle = [Stage(one.name, lambda folder, records, out: _MODEL, one.settings, one.after) for one in steps]
    idle[-1] = Stage("export", lambda folder, records, out: {}, idle[-1].settings, idle[-1].after)
    files.own(output, files.COMPRESSION_RUN, *(one.name for one in idle))
    stages.run_stages(idle, output)
    return command


def _run(command: list[str], folder: Path) -> tuple[Counter, subprocess.CompletedProcess]:
    """Run the command and return how often each process did what, and what it printed."""
    (folder / "counted.py").write_text(textwrap.dedent(_COUNTED))
    (folder / "counts").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, str(folder / "counted.py"), str(folder / "counts"), *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    return Counter((folder / "counts").read_text().splitlines()), done


def test_a_finished_run(finished, tmp_path):
    counts, done = _run(finished, tmp_path)
    assert done.returncode == 0 and "loading NeMo" not in done.stderr, done.stderr
    assert done.stderr.count("finished before, kept") == 6
    assert counts == {"parent compression_stages": 1, "parent file_digest": 2}


@pytest.mark.parametrize("more", [["--dry-run"], ["--dry-run", "--redo", "export"], ["--redo", "export"]])
def test_a_plan_and_an_unused_redo(finished, tmp_path, more):
    counts, done = _run([*finished, *more], tmp_path)
    assert done.returncode == 0, done.stderr
    assert counts == {"parent compression_stages": 1, "parent file_digest": 2}


def test_two_ranks_take_the_digests_of_their_parent(finished, tmp_path):
    (tmp_path / "out" / "export" / "stage.json").rename(tmp_path / "out" / "export" / "working.json")
    (tmp_path / "out" / "quantize" / "checkpoint" / "weights").mkdir(parents=True)
    (tmp_path / "out" / "quantize" / "checkpoint" / "context").mkdir()
    counts, done = _run(finished, tmp_path)
    assert done.returncode == 0, done.stderr + (tmp_path / "out" / "log" / "rank0.txt").read_text()[-3000:]
    assert done.stderr.count("finished before, kept") == 5 and "[6/6] export    done" in done.stderr
    assert counts == {
        "parent compression_stages": 1,
        "parent file_digest": 2,
        "0 compression_stages": 1,
        "1 compression_stages": 1,
    }


def test_only_ranks_of_this_command_take_digests_over(tmp_path, monkeypatch):
    text = tmp_path / "text"
    text.write_text("a")
    one = Digests()
    before = one.file(text)
    for name, value in one.for_ranks().items():
        monkeypatch.setenv(name, value)
    text.write_text("b")
    monkeypatch.delenv(ranks.STARTED_BY_US, raising=False)
    assert Digests.of_this_process().file(text) != before
    monkeypatch.setenv(ranks.STARTED_BY_US, "2")
    assert Digests.of_this_process().file(text) == before
    assert one.file(text) == before, "the digests of one process do not change while it runs"


def test_the_stream_for_bars_is_passed_when_a_step_runs(tmp_path, capsys):
    streams = []

    def work(folder, records, out):
        streams.append(out)
        return {}

    files.own(tmp_path, files.COMPRESSION_RUN, "a")
    steps = [Stage("a", work)]
    stages.run_stages(steps, tmp_path, out=sys.stderr)
    stages.run_stages(steps, tmp_path)
    assert streams == [sys.stderr]

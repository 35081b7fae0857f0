"""Kills and signals: nothing is left running, and the same command resumes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nemo_modelopt_cli import run_file
from nemo_modelopt_cli.compress import stages
from nemo_modelopt_cli.process import signals
from test_code.support import started

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def _wait_for(condition, seconds: float, what: str = "it") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in time"
        time.sleep(0.005)


# --- children end with their parent -----------------------------------------------------------------------------------

_PARENT = """
    import multiprocessing, sys, time
    from pathlib import Path
    from nemo_modelopt_cli.process import processes

    def stay(folder):
        import os
        Path(folder, str(os.getpid())).touch()
        time.sleep(100)

    if __name__ == "__main__":
        processes.children_end_with_this_process()
        for method in ("fork", "spawn"):
            multiprocessing.get_context(method).Process(target=stay, args=(sys.argv[1],)).start()
        time.sleep(100)
    elif __name__ == "__mp_main__":
        processes.spawned_child()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux signals a child when its parent ends")
def test_forked_and_spawned_children_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(_PARENT))
    (tmp_path / "pids").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(script), str(tmp_path / "pids")], env=environment) as process:
        _wait_for(lambda: len(list((tmp_path / "pids").iterdir())) == 2, 60)
        process.kill()
    pids = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    _wait_for(lambda: not any(_runs(pid) for pid in pids), 10, "the end of the children")


_RANK = """
    import os, sys, time
    from pathlib import Path
    from nemo_modelopt_cli.process import entry

    def main():
        Path(sys.argv[1], str(os.getpid())).touch()
        time.sleep(100)

    sys.exit(entry.run(main))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux signals a child when its parent ends")
def test_ranks_end_with_a_killed_torchrun(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(_RANK))
    (tmp_path / "pids").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*command, str(tmp_path / "pids")], env=environment, stderr=subprocess.DEVNULL) as process:
        _wait_for(lambda: len(list((tmp_path / "pids").iterdir())) == 2, 120)
        process.kill()
    pids = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    _wait_for(lambda: not any(_runs(pid) for pid in pids), 10, "the end of the ranks")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- kill -9 in the middle of compress.py -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(ranks_factory, tmp_path_factory) -> Path:
    """Make a tiny teacher checkpoint and its texts."""
    from test_code.support import jobs_compress

    folder = tmp_path_factory.mktemp("teacher")
    ranks_factory(1).run(jobs_compress.make_teacher, str(folder), llama=True, timeout=400)
    return folder


def _compress(teacher: Path, output: Path, *more: str) -> list[str]:
    flags = f"""--teacher {teacher}/checkpoint --train-text {teacher}/train.jsonl --heldout-text {teacher}/heldout.jsonl
        --output {output} --seq-length 32 --target-ffn-hidden-size 64 --prune-samples 8 --distill-steps 8
        --distill-global-batch-size 4 --distill-micro-batch-size 2 --distill-warmup-steps 2 --distill-save-every 2
        --distill-evaluate-every 4
        --calibration-size 4 --calibration-batch-size 2 --calibration-seq-len 32 --formats nemo hf --cpu"""
    return [sys.executable, str(ROOT / "scripts" / "compress.py"), *flags.split(), *more]


def _finish(commands, command: list[str], output: Path) -> dict:
    """Run the command to its end and return its figures."""
    done = commands.run(command, ENVIRONMENT, timeout=900)
    log = output / "log" / "rank0.txt"
    assert done.returncode == 0, done.stderr + (log.read_text()[-3000:] if log.exists() else "")
    return _figures(output)


def _figures(output: Path) -> dict:
    """Return what the report says of the models."""
    report = json.loads((output / "report.json").read_text())
    names = ("heldout_loss", "parameters", "bytes", "shape")
    found = {model["name"]: {name: model[name] for name in names} for model in report["models"]}
    found["hf"] = report["exports"]["hf"]["heldout_loss"]
    found["curve"] = [point for curve in report["curves"] for point in curve["points"]]
    return found


def _assert_same_figures(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert [point["step"] for point in found["curve"]] == [point["step"] for point in expected["curve"]]
    for name in found:
        if isinstance(found[name], dict):
            # A file of a checkpoint holds times and paths: some bytes more or less.
            assert found[name].pop("bytes") == pytest.approx(expected[name]["bytes"], rel=0.02)
            loss = expected[name]["heldout_loss"]
            assert found[name].pop("heldout_loss") == pytest.approx(loss, abs=1e-6), name
            assert found[name].items() <= expected[name].items()
    assert found["hf"] == pytest.approx(expected["hf"], abs=1e-6)


@pytest.fixture(scope="module")
def whole(commands, teacher, tmp_path_factory) -> Path:
    """Make a run that nothing interrupts, and return its folder."""
    output = tmp_path_factory.mktemp("whole") / "run"
    _finish(commands, _compress(teacher, output), output)
    return output


@pytest.fixture(scope="module")
def uninterrupted(whole) -> dict:
    """Return the figures of that run."""
    return _figures(whole)


# While what is written: the pruned checkpoint, one of the training, the quantized checkpoint, the exported files.
MOMENTS = [
    ("prune", "**/*.distcp"),
    ("distill", "steps/.step-0000000[4-9].partial/**/*.distcp"),
    ("quantize", "**/*.distcp"),
    ("export", "**/*.safetensors"),
]


@pytest.mark.timeout(3000)
def test_kill_9_while_each_kind_of_file_is_written(commands, teacher, uninterrupted, tmp_path):
    output = tmp_path / "run"
    command = _compress(teacher, output)
    for stage, pattern in MOMENTS:
        with commands.start(command, ENVIRONMENT, stderr=subprocess.PIPE) as process:
            _wait_for_file(process, output / stage, pattern)
            process.kill()
            assert process.wait() == -signal.SIGKILL, process.stderr.read()
        assert stages.read_record(output / stage) is None
        started.wait_for_end(process.pid)
    _assert_same_figures(_finish(commands, command, output), uninterrupted)
    attempts = {stage: stages.read_record(output / stage).attempts for stage, _ in MOMENTS}
    assert attempts == dict.fromkeys(attempts, 2)
    assert not [path for path in output.rglob("*") if path.name.endswith((".part", ".partial", ".new", ".old"))]


@pytest.mark.timeout(3000)
def test_a_disk_that_fills_up_in_the_middle(commands, teacher, uninterrupted, small_disk):
    output = small_disk / "run"
    command = _compress(teacher, output)
    found = commands.start(command, ENVIRONMENT, stderr=subprocess.PIPE)
    with found:
        seen = found.stderr.read()
    assert found.returncode == 1, seen
    assert f"error: the disk is full: {small_disk}" in seen
    assert "Traceback" not in seen
    started.wait_for_end(found.pid)
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    _assert_same_figures(_finish(commands, command, output), uninterrupted)


def _wait_for_file(process: started.Started, folder: Path, files: str) -> None:
    _wait_for(lambda: started.has_file(folder, files) or process.poll() is not None, 600, f"{folder}/{files}")


def test_a_folder_is_renamed_between_its_listing_and_the_look_into_it(tmp_path, monkeypatch):
    scandir = os.scandir

    def rename_first(folder):
        if str(folder).endswith(".part"):
            os.rename(folder, tmp_path / "checkpoint")
        return scandir(folder)

    (tmp_path / ".part").mkdir()
    (tmp_path / ".part" / "0.distcp").touch()
    monkeypatch.setattr(os, "scandir", rename_first)
    assert not started.has_file(tmp_path, "**/*.distcp")
    assert started.has_file(tmp_path, "**/*.distcp")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kill_9_at_random_moments(commands, teacher, uninterrupted, tmp_path):
    seed = random.SystemRandom().randrange(1 << 30)
    moments, kills, runs = random.Random(seed), 0, 0
    while kills < 20:
        output = tmp_path / f"run{runs:02d}"
        command = _compress(teacher, output)
        with commands.start(command, ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                # Most of the time goes into importing NeMo: half of the kills come once a stage has started.
                _wait_for_start(process, output) if moments.random() < 0.5 else None
                process.wait(moments.uniform(0, 25))
            process.kill()
        started.wait_for_end(process.pid)
        if process.returncode == -signal.SIGKILL:
            kills += 1
        else:  # the run has come to its end between two kills
            assert process.returncode == 0, f"seed {seed}"
            _assert_same_figures(_finish(commands, command, output), uninterrupted)
            runs += 1
    _assert_same_figures(_finish(commands, command, output), uninterrupted)


def _wait_for_start(process: started.Started, output: Path) -> None:
    working = {path: path.stat().st_mtime for path in output.glob("*/working.json")}

    def has_started() -> bool:
        now = {path: path.stat().st_mtime for path in output.glob("*/working.json")}
        return now != working or process.poll() is not None

    with contextlib.suppress(OSError):
        _wait_for(has_started, 300, "the start of a stage")


# --- distill.py -------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1800)
def test_a_distillation_resumes_between_validations(commands, teacher, whole, tmp_path):
    model, text = f"{teacher}/checkpoint", f"{teacher}/train.jsonl"
    flags = f"--cpu --model_path {whole}/prune/checkpoint --teacher_path {model} --text {text} --log_dir {tmp_path} "
    flags += "--seq_length 32 --max_steps 100 --gbs 4 --mbs 2 --lr 1e-3 --warmup_steps 5 --limit_val_batches 2"
    command = [sys.executable, str(ROOT / "scripts" / "distill.py"), *flags.split(), "--name"]
    output = tmp_path / "killed"
    resumed = [*command, "killed", "--save_minutes", "0.002"]
    # While the first one is written, and once it is whole.
    for pattern in (".step-*.partial/**/*.distcp", "step-????????/weights"):
        with commands.start(resumed, ENVIRONMENT, stderr=subprocess.PIPE) as process:
            _wait_for_file(process, output / "interim", pattern)
            process.kill()
            assert process.wait() == -signal.SIGKILL, process.stderr.read()
        started.wait_for_end(process.pid)
    assert not list(output.glob("checkpoints/*")), "nothing was validated yet"
    done = {
        name: commands.run([*command, name, *more], ENVIRONMENT)
        for name, more in (("killed", resumed[-2:]), ("whole", ["--save_minutes", "0"]))
    }
    losses = {}
    for name, found in done.items():
        assert found.returncode == 0, found.stderr
        losses[name] = re.search(r"training loss +(\d\.\d{4}).*began at (\d\.\d{4})", found.stderr)
        assert losses[name], found.stderr
        assert not (tmp_path / name / "interim").exists()
        assert list((tmp_path / name / "checkpoints").glob("*-last"))
    assert losses["killed"][1] == losses["whole"][1]
    assert losses["killed"][2] != losses["whole"][2], "the second run began in the middle"


# --- Ctrl-C and SIGTERM in the middle of each script ------------------------------------------------------------------


def _scripts(teacher: Path, output: Path) -> dict[str, tuple[list[str], str]]:
    """Return each script's arguments, and what is on the screen once it works."""
    text = f"{teacher}/train.jsonl"
    model = f"{teacher}/checkpoint"
    return {
        "compress": (_compress(teacher, output, "--distill-steps", "400")[2:], "step/s"),
        "distill": (
            f"--cpu --name run --log_dir {output} --model_path {model} --teacher_path {model} --text {text} "
            "--seq_length 32 --max_steps 400 --gbs 4 --mbs 2 --limit_val_batches 0 --save_minutes 0.01".split(),
            "step/s",
        ),
        "prune": (
            f"--cpu --restore_path {model} --save_path {output} --text {text} --seq_length 32 --mbs 2 "
            "--target_ffn_hidden_size 64 --num_train_samples 2000".split(),
            "importance:",
        ),
        "ptq": (
            f"--cpu -nc {model} -out {output} --export_format nemo -calib_ds {text} -algo int8 -bs 1 -sl 8 "
            "-calib_size 100".split(),
            "ibration",
        ),
    }


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("script", "ranks_of_run"),
    [
        ("compress", 1),
        ("distill", 1),
        ("prune", 1),
        ("ptq", 1),
        ("compress", 2),
        ("ptq", 2),
        # What starts and ends the ranks of distill and prune is what does for ptq.
        pytest.param("distill", 2, marks=pytest.mark.slow),
        pytest.param("prune", 2, marks=pytest.mark.slow),
    ],
)
def test_sigterm_ends_like_ctrl_c(commands, teacher, tmp_path, script, ranks_of_run):
    output = tmp_path / "run"
    arguments, working = _scripts(teacher, output)[script]
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments, "--devices", str(ranks_of_run)]
    if script in ("prune", "ptq"):
        command += ["--pp", str(ranks_of_run)]
    with commands.start(command, ENVIRONMENT, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        seen = ""
        while working not in seen:
            character = process.stderr.read(1)
            assert character, seen
            seen += character
        process.send_signal(signal.SIGTERM)
        seen += process.stderr.read()
    assert process.returncode == 143, seen
    resumes = script in ("compress", "distill")
    message = signals.RESUMABLE if resumes else signals.NOTHING_WRITTEN
    assert any(line.endswith(message) for line in seen.splitlines()[-2:]), seen
    assert "Traceback" not in seen and "error" not in seen
    assert not started.processes_of(process.pid)
    if not resumes:
        assert not [path for path in (output / "weights", output / run_file.NAME) if path.exists()]

"""Scripts in folders that hold users' files: none of those is replaced, and no two runs write to one output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_modelopt_dropin import files, locks
from test_code.support import command_lines

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "ptq": "-nc model -calib_ds text.jsonl -algo int8 --export_format hf --cpu -out {out}",
    "prune": "--restore_path model --text text.jsonl --seq_length 8 --target_num_layers 1 --cpu --save_path {out}",
    "distill": "--model_path model --teacher_path teacher --text text.jsonl --seq_length 8 --max_steps 2 --gbs 2 "
    "--mbs 1 --cpu --log_dir . --name {out}",
    "compress": command_lines.COMPRESS + " --cpu --output {out}",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the working folder, with what the command lines name in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "teacher"):
        command_lines.checkpoint(tmp_path / name)
        (tmp_path / name / "weights").mkdir(exist_ok=True)
    for name in ("text", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n' * 4)
    return tmp_path


def run(script: str, out: str, *more: str) -> subprocess.CompletedProcess:
    command = [*COMMANDS[script].format(out=out).split(), *more]
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *command], capture_output=True, text=True, timeout=120
    )


def everything(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry run"])
@pytest.mark.parametrize("script", COMMANDS)
def test_a_folder_of_the_users_is_refused_before_nemo_is_loaded(folder, script, more):
    for name in ("figures", "distill", "notes"):
        (folder / "mine" / name).mkdir(parents=True)
        (folder / "mine" / name / "thesis.tex").write_text("years")
    before = everything(folder)
    found = run(script, "mine", *more)
    assert found.returncode == 2, found.stderr
    assert "holds distill, figures, notes, which this package did not write and will not replace" in found.stderr
    assert "loading NeMo" not in found.stdout + found.stderr
    assert everything(folder) == before


@pytest.mark.parametrize("through_link", [False, True])
@pytest.mark.parametrize(
    ("script", "flag", "name"),
    [
        ("ptq", "--nemo_checkpoint", "model"),
        ("ptq", "--calibration_dataset", "text.jsonl"),
        ("prune", "--restore_path", "model"),
        ("prune", "--text", "text.jsonl"),
        ("distill", "--teacher_path", "teacher"),
        ("distill", "--text", "text.jsonl"),
        ("compress", "--teacher", "model"),
        ("compress", "--train-text", "text.jsonl"),
    ],
)
def test_no_input_may_lie_in_what_is_written(folder, script, flag, name, through_link):
    (folder / "run").mkdir()
    (folder / name).rename(folder / "run" / name)
    (folder / name).symlink_to(folder / "run" / name)
    given = name if through_link else f"run/{name}"
    before = everything(folder)
    for more in ((), ("--dry-run",)):
        found = run(script, "run", flag, given, *more)
        assert found.returncode == 2, found.stderr
        assert "which this command writes; use another folder" in found.stderr and flag in found.stderr
        assert everything(folder) == before


@pytest.mark.parametrize(
    ("script", "flag", "where"),
    [("ptq", "--calibration_state", ""), ("prune", "--scores_path", ""), ("ptq", "--report_path", "figures/")],
)
def test_folders_beside_the_output_are_the_users_too(folder, script, flag, where):
    (folder / "work" / where).mkdir(parents=True)
    (folder / "work" / where / "thesis.tex").write_text("years")
    found = run(script, "out", flag, "work")
    assert found.returncode == 2, found.stderr
    assert f"{flag}: " in found.stderr and "which this package did not write" in found.stderr
    assert (folder / "work" / where / "thesis.tex").read_text() == "years"


def test_a_folder_of_the_users_in_a_run_of_ours_is_refused(folder):
    files.own(folder / "run", files.COMPRESSION_RUN, "run.yaml")
    (folder / "run" / "distill").mkdir()
    (folder / "run" / "distill" / "thesis.tex").write_text("years")
    for more in ((), ("--dry-run",)):
        found = run("compress", "run", *more)
        assert found.returncode == 2, found.stderr
        assert "holds distill, which this package did not write" in found.stderr
    assert (folder / "run" / "distill" / "thesis.tex").read_text() == "years"


def test_a_training_may_have_the_name_under_which_its_teacher_was_recorded(folder):
    (folder / "mine" / "tensorboard").mkdir(parents=True)
    found = run("distill", "mine", "--dry-run")
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize("script", COMMANDS)
def test_a_second_run_at_one_output_is_refused_at_once(folder, script, ranks):
    before = everything(folder)
    with locks.lock(folder / "out"):
        found = run(script, "out", "--devices", ranks)
    assert found.returncode == 1, found.stderr
    assert f"out is in use by another run (process {os.getpid()} on host " in found.stderr
    assert "wait for it, stop it, or choose another folder" in found.stderr
    assert "loading NeMo" not in found.stdout + found.stderr and "wrote" not in found.stdout
    assert everything(folder) == before


@pytest.mark.parametrize(("script", "flag"), [("ptq", "--calibration_state"), ("prune", "--scores_path")])
def test_a_second_run_at_one_state_is_refused_at_once(folder, script, flag):
    with locks.lock(folder / "shared"):
        found = run(script, "out", flag, "shared")
    assert found.returncode == 1, found.stderr
    assert "shared is in use by another run" in found.stderr

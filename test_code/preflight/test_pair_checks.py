"""Inputs that must not be each other, names that must stay in their folder, students larger than their teacher."""

from __future__ import annotations

import os
import shutil

import pytest

from nemo_modelopt_dropin.preflight import pair_checks
from test_code.support import command_lines

COMPRESS = "--teacher model --train-text text.jsonl --heldout-text {} --target-num-layers 1 --cpu"
DISTILL = "--name {} --log_dir logs --model_path model --teacher_path teacher --text text.jsonl --seq_length 8 "
DISTILL += "--max_steps 2 --gbs 4 --mbs 2 --cpu"


def _other_names(folder) -> dict[str, str]:
    """Make the same text under other names and return what is wrong with each."""
    os.symlink("text.jsonl", folder / "link.jsonl")
    os.link(folder / "text.jsonl", folder / "hard.jsonl")
    shutil.copy(folder / "text.jsonl", folder / "copy.jsonl")
    (folder / "sub").mkdir()
    same = "is the same file as"
    return {"text.jsonl": same, "sub/../text.jsonl": same, "link.jsonl": same, "hard.jsonl": same} | {
        "copy.jsonl": "has the same content as"
    }


def _refused(script: str, line: str, capsys) -> str:
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of(script).main([*line.split(), "--dry-run"])
    return capsys.readouterr().err


@pytest.mark.parametrize("script", ["compress", "distill", "prune"])
def test_the_training_text_is_no_held_out_text(script, tmp_path, monkeypatch, capsys):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    line = COMPRESS if script == "compress" else DISTILL.format("n") + " --heldout_text {}"
    if script == "prune":
        line = f"{command_lines.IMPORTANCE} --heldout_text {{}}"
    for name, problem in _other_names(tmp_path).items():
        assert f"{problem} " in _refused(script, line.format(name), capsys), name
    assert pair_checks.same_text(("--a", "text.jsonl"), ("--b", "heldout.jsonl")) == []


@pytest.mark.parametrize("name", ["../other", "/tmp/other", "..", ".", "a/../../other", "a/.."])
def test_a_run_stays_in_its_folder(name, tmp_path, monkeypatch, capsys):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = _refused("distill", DISTILL.format(name), capsys)
    assert f"--name {name} is not a folder below logs; use a name without '..' or a leading '/'" in found


@pytest.mark.parametrize("name", ["run", "a/b", "..run", "run.1"])
def test_names_below_the_folder_are_fine(name):
    assert pair_checks.name_problems("--name", name, "logs") == []


def test_a_student_larger_than_its_teacher_gets_a_warning(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    command_lines.checkpoint(tmp_path / "model", ffn_hidden_size=128)
    command_lines.checkpoint(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    assert command_lines.script_of("distill").main([*DISTILL.format("n").split(), "--dry-run"]) == 0
    assert "warning: The student has more parameters" in capsys.readouterr().out
    assert pair_checks.larger_student("teacher", "model") is None
    assert pair_checks.larger_student("model", "model") is None
    assert pair_checks.larger_student("model", None) is None

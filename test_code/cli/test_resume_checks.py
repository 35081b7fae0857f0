"""What distill.py reports before it resumes a training, without NeMo's trainer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_modelopt_cli import intermediate, parser, run_file
from nemo_modelopt_cli.checks import resume_checks
from nemo_modelopt_dropin import files
from test_code.support import command_lines

ROOT = Path(__file__).resolve().parents[2]
COMMAND = command_lines.RUNS["distill"]


@pytest.fixture
def begun(tmp_path, monkeypatch) -> Path:
    """Make a training that was interrupted after one step, and return its folder."""
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("other", "far"):
        command_lines.shell(tmp_path / name)
    distill = command_lines.script_of("distill")
    saved = parser.saved_settings(distill.resolve(COMMAND.split()), distill.PATHS)
    output = tmp_path / "logs" / "n"
    (output / "interim" / "step-00000001").mkdir(parents=True)
    files.own(output, files.TRAINING_RUN, run_file.NAME)
    run_file.write(output / run_file.NAME, saved)
    return output


def _lines(flags: str, capsys) -> list[str]:
    """Return the lines of a refused command line, after checking that the run file stayed as it was."""
    kept = Path("logs/n", run_file.NAME)
    before = kept.read_bytes() if kept.exists() else None
    for more in ("", " --dry-run"):
        with pytest.raises(SystemExit, match="2"):
            command_lines.script_of("distill").main([*COMMAND.split(), *flags.split(), *more.split()])
        assert (kept.read_bytes() if kept.exists() else None) == before
    found = capsys.readouterr().err.splitlines()
    assert found[: len(found) // 2] == found[len(found) // 2 :]
    return found[: len(found) // 2]


@pytest.mark.parametrize(("flag", "old"), [("--model_path", "model"), ("--teacher_path", "teacher")])
def test_another_model_under_the_same_name_is_an_error(begun, capsys, flag, old):
    (found, _) = _lines(f"{flag} other", capsys)
    assert f"{flag} other: the training in logs/n was started with {flag} {begun.parents[1] / old}, " in found
    assert found.endswith("and would be resumed; choose another --name")


def test_a_dropped_or_added_teacher_is_an_error(begun, capsys):
    flags = COMMAND.replace("--teacher_path teacher", "").split()
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of("distill").resolve(flags)
    assert "--teacher_path (not set): the training in logs/n was started with --teacher_path" in capsys.readouterr().err
    text = (begun / run_file.NAME).read_text()
    (begun / run_file.NAME).write_text(re.sub("(?m)^teacher_path:.*$", "teacher_path: null", text))
    (found, _) = _lines("", capsys)
    assert "--teacher_path teacher: the training in logs/n was started without --teacher_path" in found
    assert command_lines.script_of("distill").resolve(flags).teacher_path is None


def test_the_run_file_that_nemo_moved_counts(begun, capsys):
    (begun / "run_10").mkdir()
    (begun / "run_9").mkdir()
    (begun / "run_9" / run_file.NAME).write_text("model_path: /nowhere\n")
    (begun / run_file.NAME).rename(begun / "run_10" / run_file.NAME)
    (found, _) = _lines("--model_path other", capsys)
    assert str(begun.parents[1] / "model") in found


def test_a_model_that_was_moved_is_named_as_such(begun, capsys):
    (begun.parents[1] / "model").rename(begun.parents[1] / "moved")
    (found, _) = _lines("--model_path moved", capsys)
    assert "(if it was only moved, correct its path in logs/n/run.yaml)" in found


@pytest.mark.parametrize("case", ["link", "no checkpoint", "unfinished", "no run file", "unreadable", "another name"])
def test_what_can_be_resumed_or_starts_is_no_error(begun, case):
    folder, kept, step = begun.parents[1], begun / run_file.NAME, begun / "interim" / "step-00000001"
    flags = ["--model_path", "other"]
    if case == "link":
        (folder / "link").symlink_to("model")
        flags = ["--model_path", "link"]
    elif case == "no checkpoint":
        step.rmdir()
    elif case == "unfinished":
        step.rmdir()
        (begun / "checkpoints" / "n-last").mkdir(parents=True)
        (begun / "checkpoints" / "n-last-unfinished").touch()
    elif case == "no run file":
        kept.unlink()
    elif case == "unreadable":
        kept.write_text("a: [")
    else:
        flags += ["--name", "m"]
    assert command_lines.script_of("distill").resolve([*COMMAND.split(), *flags]).model_path == flags[1]


def test_recordings_of_one_teacher_may_replace_each_other(begun, capsys):
    for name, digest in (("first", "a"), ("second", "a"), ("third", "b")):
        command_lines.shell(begun.parents[1] / name)
        (begun.parents[1] / name / resume_checks.RECORDING).write_text(json.dumps({"teacher": {"file": digest}}))
    text = (begun / run_file.NAME).read_text()
    kept = [row for row in text.splitlines() if "teacher" not in row]
    (begun / run_file.NAME).write_text("\n".join([*kept, f"teacher_topk: {begun.parents[1] / 'first'}", ""]))
    flags = COMMAND.replace("--teacher_path teacher", "")
    given = command_lines.script_of("distill").resolve([*flags.split(), "--teacher-topk", "second"])
    assert resume_checks.describe(given, command_lines.script_of("distill").PATHS)[1].count("->") == 1
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of("distill").resolve([*flags.split(), "--teacher-topk", "third"])
    assert "was started with --teacher_topk" in capsys.readouterr().err


def test_changed_settings_are_listed_with_the_step(begun, monkeypatch, capsys):
    """In the run before it saves the settings, and in its plan."""
    (begun.parents[1] / "other.jsonl").write_text('{"text": "b"}\n')
    distill = command_lines.script_of("distill")
    flags = f"{COMMAND} --lr 2e-5 --gbs 8 --text other.jsonl --max_steps 9 --devices 4 --log_interval 3 --cpu"
    monkeypatch.setattr("nemo_modelopt_cli.run_script.execute", lambda *arguments: 0)
    assert distill.main([*flags.split(), "--dry-run"]) == 0
    plan = capsys.readouterr().out.splitlines()
    assert distill.main(flags.split()) == 0
    run = capsys.readouterr().err.splitlines()
    folder = begun.parents[1]
    changed = f"gbs: 4 -> 8; lr: 1e-05 -> 2e-05; text: {folder / 'text.jsonl'} -> {folder / 'other.jsonl'}"
    warning = f"warning: settings changed since logs/n/run.yaml: {changed}"
    place = "at step 1, from logs/n/interim/step-00000001"
    assert run == [f"distill: resumes {place}", warning]
    assert [row.split(maxsplit=1)[1] for row in plan if row.startswith("resumes")] == [place]
    assert [row.strip() for row in plan if "warning" in row] == [warning]
    assert distill.main(COMMAND.split()) == 0
    assert capsys.readouterr().err.splitlines() == [f"distill: resumes {place}"]
    monkeypatch.setenv("NEMO_MODELOPT_LOCAL_RANKS", "2")  # a rank that this command started
    assert distill.main(flags.split()) == 0
    assert capsys.readouterr().err == ""


def test_one_value_written_in_two_ways_did_not_change(begun):
    text = (begun / run_file.NAME).read_text()
    (begun / run_file.NAME).write_text(text.replace("lr: 1.0e-05", "lr: 0.00001"))
    distill = command_lines.script_of("distill")
    assert resume_checks.describe(distill.resolve(COMMAND.split()), distill.PATHS)[1] is None


@pytest.mark.parametrize(
    ("name", "sizes", "place"),
    [
        ("n--val_loss=1.5-epoch=0-consumed_samples=8.0-last", [4], "at step 2, "),
        ("n--val_loss=1.5-epoch=0-consumed_samples=8.0-last", [4, 4], "at step 2, "),
        ("n--val_loss=1.5-epoch=0-consumed_samples=8.0-last", [4, 2], "after 8 samples, "),
        ("n--val_loss=1.5-epoch=0-consumed_samples=8.0-last", [], "after 8 samples, "),
        ("n-last", [4], ""),
    ],
)
def test_the_step_of_nemos_checkpoints_follows_from_their_samples(begun, name, sizes, place):
    (begun / "interim" / "step-00000001").rmdir()
    (begun / "checkpoints" / name).mkdir(parents=True)
    (begun / run_file.NAME).unlink()
    for i, size in enumerate(sizes):
        (begun / f"run_{i}").mkdir()
        run_file.write(begun / f"run_{i}" / run_file.NAME, {"gbs": size})
    distill = command_lines.script_of("distill")
    given = distill.resolve([*COMMAND.split(), "--max_steps", "9"])
    found = resume_checks.describe(given, distill.PATHS)
    assert found is not None
    assert found[0] == f"{place}from logs/n/checkpoints/{name}"


def test_recording_a_teacher_resumes_nothing(begun):
    distill = command_lines.script_of("distill")
    given = distill.resolve([*COMMAND.split(), "--model_path", "other", "--dump-teacher-topk", "topk"])
    assert resume_checks.describe(given, distill.PATHS) is None


def test_the_checkpoint_is_the_one_that_the_trainer_resumes_from(begun):
    os.utime(begun / "interim" / "step-00000001", (1, 1))
    (begun / "checkpoints" / "a-last").mkdir(parents=True)
    resume = intermediate.Resume(str(begun / "interim"), str(begun))
    given = command_lines.script_of("distill").resolve(COMMAND.split())
    assert resume._find_trainer_ckpt_path().resolve() == resume_checks.checkpoint(given).resolve()
    assert resume_checks.checkpoint(given).name == "a-last"


def test_a_refusal_loads_nothing_heavy(begun):
    code = (
        "import runpy, sys\nsys.argv = sys.argv[1:]\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stopped:\n    print(stopped.code, {'torch', 'nemo', 'megatron'} & {*sys.modules})\n"
    )
    command = [sys.executable, "-c", code, str(ROOT / "scripts" / "distill.py"), *COMMAND.split()]
    found = subprocess.run([*command, "--teacher_path", "other"], capture_output=True, text=True, timeout=120)
    assert found.stdout == "2 set()\n", found.stderr
    assert "choose another --name" in found.stderr


def test_a_plan_says_that_a_training_is_complete(begun, capsys):
    last = begun / "checkpoints" / "n--val_loss=1.5-epoch=0-consumed_samples=8.0-last"
    last.mkdir(parents=True)
    assert command_lines.script_of("distill").main([*COMMAND.split(), "--dry-run"]) == 0
    (found,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith("resumes")]
    assert found.endswith(f"not at all, the training is complete: logs/n/checkpoints/{last.name}")

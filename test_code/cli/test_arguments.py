"""Every script reports missing arguments and values that are not numbers, in whole sentences and all at once."""

from __future__ import annotations

import argparse

import pytest

from nemo_modelopt_cli.compress import settings as job_settings
from test_code.support import command_lines

COMMANDS = {**command_lines.RUNS, "compress": command_lines.COMPRESS}


def _refused(script: str, words: list[str], capsys) -> list[str]:
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of(script).resolve(words)
    return capsys.readouterr().err.splitlines()


def _flags(script: str) -> list[argparse.Action]:
    return [action for action in command_lines.script_of(script).parser()._actions if action.option_strings]


@pytest.mark.parametrize("script", COMMANDS)
def test_without_arguments(script, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = _refused(script, [], capsys)
    assert any(": missing: --" in line for line in found) and found[-1].endswith("see --help")


@pytest.mark.parametrize("script", COMMANDS)
def test_each_argument_may_be_missing_alone(script, capsys, tmp_path, monkeypatch):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = COMMANDS[script].split()
    required = [action for action in _flags(script) if action.required]
    for action in required:
        place = next(i for i, word in enumerate(words) if word in action.option_strings)
        found = _refused(script, words[:place] + words[place + 2 :], capsys)
        assert any(f"missing: {max(action.option_strings, key=len)}" in line for line in found)
    assert required or script == "compress"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("script", COMMANDS)
def test_what_is_no_finite_number(script, value, capsys, tmp_path, monkeypatch):
    """Every flag that takes a number, in every script."""
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    # Parsers are named by the running program, which differs if tests run in several processes.
    monkeypatch.setattr("sys.argv", [f"{script}.py"])
    numbers = [action for action in _flags(script) if getattr(action.type, "__name__", "") in ("float", "number")]
    assert numbers
    for action in numbers:
        found = _refused(script, [*COMMANDS[script].split(), f"{action.option_strings[0]}={value}"], capsys)
        name = "/".join(action.option_strings)
        assert f"{script}.py: {name}: must be a finite number, got {value}" in found


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"lr": ".nan"}, None),
        ({"lr": "nan"}, "lr must be a finite number, got 'nan'"),
        ({"weight_decay": "inf"}, "weight_decay must be a finite number"),
    ],
)
def test_settings_of_a_file(content, problem):
    with pytest.raises(job_settings.SettingsError, match=problem or "lr must be a number, got '.nan'"):
        job_settings.from_dict(job_settings.Training, content)


@pytest.mark.parametrize("name", ["min_lr", "warmup_steps", "weight_decay", "clip_grad", "seed"])
def test_settings_below_zero(name):
    training = job_settings.Training(**{name: -1})
    assert training.problems("distillation", job_settings.Layout()) == [
        f"distillation: {name} must not be negative, got -1"
    ]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--sq_alpha 1.5", "--sq_alpha must be from 0 to 1, got 1.5"),
        ("--seq_len 1", "--seq_len must be at least 2, got 1"),
        ("--calibration_shuffle_seed -1", "--calibration_shuffle_seed must be at least 0, got -1"),
        ("-algo auto --auto_quantize_bits 17", "--auto_quantize_bits must be from 1 to 16, got 17"),
    ],
)
def test_numbers_of_a_quantization(flags, problem, capsys, tmp_path, monkeypatch):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert any(
        problem in line for line in _refused("ptq", [*command_lines.RUNS["ptq"].split(), *flags.split()], capsys)
    )


@pytest.mark.parametrize("flags", ["--enable_kv_cache --disable_kv_cache", "--disable-kv-cache --enable-kv-cache"])
def test_a_switch_cannot_be_both_on_and_off(flags, capsys, tmp_path, monkeypatch):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    line = command_lines.RUNS["ptq"].replace("--disable_kv_cache", flags)
    first, second = flags.replace("-", "_").replace("__", "--").split()
    problem = _refused("ptq", line.split(), capsys)[0]
    assert problem.endswith(f": {first} and {second} contradict each other; use one of them")


@pytest.mark.parametrize(
    ("file", "flag", "expected"), [("true", "--disable_kv_cache", False), ("false", "--enable_kv_cache", True)]
)
def test_a_flag_overrides_the_switch_of_a_run_file(file, flag, expected, tmp_path, monkeypatch):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(f"enable_kv_cache: {file}\n")
    line = command_lines.RUNS["ptq"].replace("--disable_kv_cache", f"{flag} --config run.yaml")
    assert command_lines.script_of("ptq").resolve(line.split()).enable_kv_cache is expected

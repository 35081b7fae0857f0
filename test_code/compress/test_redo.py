"""``compress.py --redo``: unknown names, and permission that nothing needs. NeMo's trainer is not started."""

from __future__ import annotations

import pytest

from nemo_modelopt_cli.compress import plan, runner, stages
from nemo_modelopt_cli.compress.stages import Stage
from nemo_modelopt_dropin import files
from test_code.support import command_lines, installed


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Finish a job whose stages do nothing, and return its command line."""
    installed.need_pruning()
    for name in ("model", "teacher"):
        command_lines.checkpoint(tmp_path / name)
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "heldout.jsonl").write_text('{"text": "b"}\n')
    monkeypatch.chdir(tmp_path)
    command = [*command_lines.COMPRESS.split(), "--output", "out", "--cpu"]
    job, output, _ = command_lines.script_of("compress").resolve(command)
    idle = [
        Stage(one.name, lambda folder, records, out: {}, one.settings, one.after)
        for one in plan.compression_stages(job, output)
    ]
    files.own(output, files.COMPRESSION_RUN, *(one.name for one in idle))
    stages.run_stages(idle, output)
    return command


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_an_unknown_stage_is_reported_like_any_wrong_argument(finished, capsys, more):
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of("compress").main([*finished, "--redo", "distil", "export", "scratch", *more])
    found = capsys.readouterr().err.splitlines()
    program = found[-1].removesuffix(": see --help")
    names = "the stages are tokens, teacher, prune, distill, quantize, export"
    assert found[:-1] == [
        f"{program}: --redo distil: there is no such stage; {names}; did you mean distill?",
        f"{program}: --redo scratch: there is no such stage; {names}",
    ]


def test_a_redo_without_effect_is_reported_in_one_line(finished, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(runner, "execute", lambda *arguments: 0)
    main = command_lines.script_of("compress").main
    for more in ([], ["--dry-run"]):
        assert main([*finished, "--redo", "distill", "export", *more]) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("compress.py: --redo distill export has no effect, its settings and inputs did not")
        assert line.endswith(f"{tmp_path / 'out' / 'distill'}, {tmp_path / 'out' / 'export'}")
        assert main([*finished, "--algorithm", "int8", "--redo", "quantize", *more]) == 0
        assert capsys.readouterr().err == ""
    monkeypatch.setenv("NEMO_MODELOPT_LOCAL_RANKS", "2")  # a rank that this command started
    assert main([*finished, "--redo", "distill"]) == 0
    assert capsys.readouterr().err == ""


def resolved(folder, monkeypatch, flags, **model):
    """Return the job of a command line and the settings of its stages."""
    command_lines.checkpoint(folder / "model", **model)
    command_lines.checkpoint(folder / "teacher")
    (folder / "text.jsonl").write_text('{"text": "a"}\n')
    (folder / "heldout.jsonl").write_text('{"text": "b"}\n')
    monkeypatch.chdir(folder)
    command = [*command_lines.COMPRESS.split(), "--output", "out", "--cpu", *flags.split()]
    job, output, _ = command_lines.script_of("compress").resolve(command)
    return job, {stage.name: stage.settings for stage in plan.compression_stages(job, output)}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--algorithm int8_sq --formats nemo hf", "compressed-tensors"),
        ("--algorithm int8_sq --formats nemo hf --hf-layout modelopt", None),
        ("--algorithm int8_sq --formats nemo", None),
        ("--algorithm int8 --formats nemo hf", "compressed-tensors"),
        ("--algorithm nvfp4_awq --formats nemo hf", "modelopt"),
        ("--algorithm w4a8_awq --formats nemo hf --awq-block-size 32", None),
        ("--algorithm fp8 --formats nemo hf --hf-layout compressed-tensors", None),
    ],
)
def test_scales_of_inputs_are_moved_for_the_layout_that_lacks_them(tmp_path, monkeypatch, flags, expected):
    """The quantized NeMo checkpoint depends on it, and so does whether the step must run again."""
    job, settings = resolved(tmp_path, monkeypatch, flags)
    assert job.quantization.layout_of_scales == expected
    assert settings["quantize"].get("quantization", settings["quantize"]).get("hf_layout") == expected


@pytest.mark.parametrize(
    ("experts", "flags", "expected"),
    [
        (4, "--algorithm fp8 --formats nemo hf", "weighted outputs, for modelopt"),
        (4, "--algorithm int8 --formats nemo hf", "weighted outputs, for compressed-tensors"),
        (4, "--algorithm fp8 --formats nemo", None),
        (4, "--algorithm int8_sq --formats nemo hf", None),
        (None, "--algorithm fp8 --formats nemo hf", None),
    ],
)
def test_experts_run_again_if_the_rule_of_their_scales_changes(tmp_path, monkeypatch, experts, flags, expected):
    """Results from before experts were calibrated for readers have no such entry."""
    # Layers with and without experts, as in DeepSeek: their sizes are not known to the search.
    changed = {"num_moe_experts": experts, "moe_layer_freq": [0, 1]} if experts else {}
    _, settings = resolved(tmp_path, monkeypatch, flags, **changed)
    assert settings["quantize"].get("expert_inputs") == expected

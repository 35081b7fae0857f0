"""Flags, run files and what scripts say at the end."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from nemo_modelopt_cli import parser, run_file
from nemo_modelopt_cli.checks import distill_checks
from nemo_modelopt_cli.compress import settings as job_settings
from nemo_modelopt_dropin.preflight import loss_file
from test_code.support import command_lines


@pytest.fixture
def line() -> parser.Parser:
    found = parser.Parser(prog="p")
    found.add_argument("-n", "--needed", required=True)
    found.add_argument("--tp_size", "--tp", type=int, default=1)
    found.add_argument("--rate", type=float, default=0.5)
    found.add_argument("--format", choices=("nemo", "hf"), default="nemo")
    found.add_argument("--layers", type=int, nargs="*")
    found.add_argument("--cpu", action="store_true")
    found.add_argument("--enable_kv", action="store_true", default=None)
    found.add_argument("--disable_kv", dest="enable_kv", action="store_false")
    found.add_run_options()
    return found


def _refused(line: parser.Parser, argv: list[str], capsys) -> list[str]:
    with pytest.raises(SystemExit) as stopped:
        line.parse_args(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()


def test_every_wrong_argument_is_reported_at_once(line, capsys):
    argv = ["--tp", "two", "--format", "hff", "--rats", "3", "--rate", "--layers", "1", "b", "--cpuu"]
    assert _refused(line, argv, capsys) == [
        "p: --rate: expected one argument",
        "p: --tp_size/--tp: invalid int value: 'two'",
        "p: --format: 'hff' is none of nemo, hf; did you mean hf?",
        "p: --layers: invalid int value: 'b'",
        "p: unknown argument --rats; did you mean --rate?",
        "p: unknown argument --cpuu; did you mean --cpu?",
        "p: missing: --needed",
        "p: see --help",
    ]


@pytest.mark.parametrize("argv", [["--needed"], ["-n"], ["--neded", "x"]])
def test_what_is_wrong_is_not_missing_too(line, capsys, argv):
    found = _refused(line, argv, capsys)
    assert len(found) == 2 and "missing" not in found[0] and found[1] == "p: see --help"


def test_problems_of_the_caller_come_with_those_of_the_flags(line, capsys):
    line.read(["-n", "x", "--tp", "two"])
    with pytest.raises(SystemExit, match="2"):
        line.refuse(["and this"])
    assert capsys.readouterr().err.splitlines()[:2] == ["p: --tp_size/--tp: invalid int value: 'two'", "p: and this"]


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("rate: 1e-4", "rate", 1e-4),  # YAML 1.1 reads a text
        ("rate: 2", "rate", 2.0),
        ("tp: 010", "tp_size", 10),  # YAML 1.1 reads 8
        ("tp-size: 2", "tp_size", 2),
        ("needed: no", "needed", "no"),  # YAML 1.1 reads false
        ("needed: 1:30", "needed", "1:30"),  # YAML 1.1 reads 90
        ("needed: 'null'", "needed", "null"),
        ("layers: [1, 3]", "layers", [1, 3]),
        ("layers: 3", "layers", [3]),
        ("layers: null", "layers", None),
        ("cpu: yes", "cpu", True),
        ("cpu: false", "cpu", False),
        ("enable_kv: false", "enable_kv", False),
        ("disable_kv: true", "enable_kv", False),
        ("", "rate", 0.5),
    ],
)
def test_a_run_file_is_read_as_the_flags_are(line, tmp_path, text, name, value):
    (tmp_path / "run.yaml").write_text(text)
    found = line.parse_args(["--config", str(tmp_path / "run.yaml"), *([] if "needed" in text else ["-n", "x"])])
    assert getattr(found, name) == value
    assert type(getattr(found, name)) is type(value)


def test_flags_win_over_the_run_file(line, tmp_path):
    (tmp_path / "run.yaml").write_text("{needed: a, tp: 4, cpu: true, layers: [1, 2], rate: 1}")
    found = line.parse_args([f"--config={tmp_path / 'run.yaml'}", "--tp_size", "2", "--no-cpu", "--layers", "7"])
    assert (found.needed, found.tp_size, found.cpu, found.layers, found.rate) == ("a", 2, False, [7], 1.0)


def test_everything_wrong_in_a_run_file_is_reported(line, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("rats: 3\ntp: two\ncpu: maybe\nformat: [nemo]\nrate: {a: 1}\nlayers: [1, x]\nconfig: other\n")
    found = _refused(line, ["--config", str(file), "--formt", "hf"], capsys)
    for part in (
        "unknown setting 'rats'; did you mean rate?",
        "--tp_size/--tp: invalid int value: 'two'",
        "cpu is a switch, true or false, got 'maybe'",
        "format takes one value",
        "rate takes one value",
        "--layers: invalid int value: 'x'",
        "unknown setting 'config'",
        "--formt; did you mean --format?",
        "missing: --needed",
    ):
        assert any(part in text for text in found), part


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot be read: No such file"),
        ("a: [1", "is not YAML"),
        ("- a", "must hold settings by name"),
        ("rate: 1\nrate: 2", "line 2: rate is set twice"),
        ("? [a]\n: 1", "a name must be one word"),
    ],
)
def test_files_that_are_no_run_files(line, tmp_path, capsys, text, problem):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    assert any(problem in row for row in _refused(line, ["--config", str(tmp_path / "run.yaml")], capsys))


@pytest.mark.parametrize("name", command_lines.RUNS)
def test_a_saved_run_file_gives_the_same_run_from_anywhere(name, tmp_path, monkeypatch):
    from nemo_modelopt_cli.run_script import Script, save

    command_lines.inputs(tmp_path)
    script = command_lines.script_of(name)
    monkeypatch.chdir(tmp_path)
    given = script.resolve(command_lines.RUNS[name].split())
    settings = parser.saved_settings(given, script.PATHS)
    file = save(Script(name, tmp_path / "out", script.PATHS), settings)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".nemo-modelopt.json", "run.yaml"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = script.resolve(["--config", str(file)])
    assert parser.saved_settings(again, script.PATHS) == settings
    text = next(value for key, value in settings.items() if key in ("text", "calibration_dataset"))
    assert text == str(tmp_path / "text.jsonl")
    assert given.devices == 2, "as many ranks as one copy of the model needs"


def test_a_run_file_pins_no_ranks_that_nobody_gave(tmp_path, monkeypatch):
    from nemo_modelopt_cli.run_script import Script, save

    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    script = command_lines.script_of("prune")
    given = script.resolve(command_lines.RUNS["prune"].replace("--pp 2", "").split())
    file = save(Script("prune", tmp_path / "out", script.PATHS), parser.saved_settings(given, script.PATHS))
    assert script.resolve(["--config", str(file), "--pp", "2"]).devices == 2
    for name, value in (("LOCAL_WORLD_SIZE", "2"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert script.resolve(["--config", str(file), "--pp", "2"]).devices == 2
    with pytest.raises(SystemExit, match="2"):
        script.resolve(["--config", str(file), "--devices", "1"])


def test_what_follows_is_left_out_of_a_compressions_run_file(tmp_path, monkeypatch):
    from nemo_modelopt_cli.compress import runner

    kept = {}
    monkeypatch.setattr(runner, "execute", lambda *arguments: kept.update(arguments[5]) or 0)
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert (
        command_lines.script_of("compress").main(
            [*command_lines.COMPRESS.split(), "--output", "out", "--tp", "2", "--cpu"]
        )
        == 0
    )
    assert kept["layout"] == {"tp": 2, "pp": 1, "cpu": True}
    assert "warmup_steps" not in kept["distillation"]
    assert (
        command_lines.script_of("compress").main([*command_lines.COMPRESS.split(), "--output", "out", "--devices", "1"])
        == 0
    )
    assert kept["layout"]["devices"] == 1


def test_a_training_that_has_seen_all_its_samples_says_so(tmp_path, monkeypatch, capsys):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    last = tmp_path / "logs" / "n" / "checkpoints" / "n--val_loss=1.5-epoch=0-consumed_samples=8.0-last"
    last.mkdir(parents=True)
    assert command_lines.script_of("distill").main(command_lines.RUNS["distill"].split()) == 0
    assert f"nothing to do, n has seen all samples of --max_steps 2 x --gbs 4: {last.relative_to(tmp_path)}" in (
        capsys.readouterr().err
    )
    more = command_lines.script_of("distill").resolve([*command_lines.RUNS["distill"].split(), "--max_steps", "3"])
    assert distill_checks.finished(more) is None


def test_there_are_as_many_ranks_as_torchrun_started(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert parser.default_devices(1, 2, 2) == 4
    assert parser.default_devices(3, 2, 2) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert (parser.default_devices(1, 2, 2), parser.default_nodes(1)) == (8, 2)


def test_paths_that_follow_from_others_follow_again(tmp_path, monkeypatch):
    """A run file names no report or calibrated state that was not asked for: with another output they move along."""
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    script = command_lines.script_of("ptq")
    given = script.resolve(command_lines.RUNS["ptq"].split())
    assert given.report_path == "here/q.report"
    file = run_file.write(tmp_path / "run.yaml", parser.saved_settings(given, script.PATHS))
    again = script.resolve(["--config", str(file), "-out", "there/q"])
    assert (again.report_path, again.calibration_state) == ("there/q.report", "there/q.calibration-state")
    chosen = script.resolve([*command_lines.RUNS["ptq"].split(), "--report_path", "mine"])
    assert parser.saved_settings(chosen, script.PATHS)["report_path"] == str(tmp_path / "mine")


def test_names_and_paths_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_text_document.idx").touch()
    (tmp_path / "tokenizer").mkdir()
    given = argparse.Namespace(
        tokenizer="owner/name",
        data_paths=["0.5", "mine_text_document", "1.0", "data/other"],
        save_path="out",
        algorithm="fp8",
        report_path=None,
    )
    assert parser.absolute_paths(given, vars(given)) == {
        "tokenizer": "owner/name",
        "data_paths": ["0.5", str(tmp_path / "mine_text_document"), "1.0", str(tmp_path / "data" / "other")],
        "save_path": str(tmp_path / "out"),
        "algorithm": "fp8",
        "report_path": None,
    }
    given.tokenizer = "tokenizer"
    assert parser.absolute_paths(given, ["tokenizer"]) == {"tokenizer": str(tmp_path / "tokenizer")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "KL(teacher || student) of the logits at temperature 1.0; no LM loss"),
        (
            "intermediate_layer_pairs: [[a, b], [c, d, mse]]\nskip_lm_loss: false\nlogit_kl_topk: 50\n"
            "logit_kl_direction: jsd\n",
            "Jensen-Shannon of the logits at temperature 1.0, the teacher's top 50; cosine of a to b; mse of c to d; "
            "LM loss",
        ),
        ("logit_kl_direction: jsd\nlogit_kl_beta: 0.1\n", "Jensen-Shannon with beta 0.1 of the logits at"),
        ("[1]", "unknown"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_plan_says_what_is_minimised(tmp_path, text, expected):
    (tmp_path / "kd.yaml").write_text(text)
    assert expected in loss_file.describe(str(tmp_path / "kd.yaml"))


def test_a_distillation_ends_with_its_figures(cpu_backend, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from nemo_modelopt_cli.run_script import aligned
    from nemo_modelopt_dropin.console import progress

    metrics = {"val_loss": 3.25, "reduced_train_loss": 0.5, "grad_norm": 1.0, "kd_top1_agreement": 0.75}
    first = progress.FirstFigures()
    trainer = SimpleNamespace(callback_metrics=metrics, global_step=40, callbacks=[first], is_global_zero=True)
    first.on_train_batch_end(SimpleNamespace(callback_metrics={"reduced_train_loss": 0.9}), None, None, None, 0)
    first.on_train_batch_end(trainer, None, None, None, 1)
    monkeypatch.chdir(tmp_path)
    context = Path("logs/kd/x-last/context/io.json")
    context.parent.mkdir(parents=True)
    context.write_text("{}")
    checkpoints = SimpleNamespace(last_model_path="logs/kd/x-last.ckpt")
    rows = command_lines.script_of("distill").outcome(trainer, checkpoints)
    assert list(aligned(rows)) == [
        "steps            40",
        "training loss    0.5000 (this run began at 0.9000)",
        "top-1 agreement  0.7500",
        "validation loss  3.2500",
        "checkpoint       logs/kd/x-last",
    ]
    context.write_text("")  # NeMo continues if it fails to write it
    with pytest.raises(RuntimeError, match=r"io.json could not be written: NeMo cannot load logs/kd/x-last"):
        command_lines.script_of("distill").outcome(trainer, checkpoints)


def test_the_bar_of_a_validation_goes_with_it(cpu_backend, monkeypatch):
    """Also if Lightning replaces the list of callbacks inside."""
    from types import SimpleNamespace

    from nemo_modelopt_dropin.console import progress

    monkeypatch.setattr(progress.screen, "is_quiet", lambda: True)
    own = object()
    trainer = SimpleNamespace(callbacks=[own])
    with progress.validation_shown(trainer, "importance"):
        assert len(trainer.callbacks) == 2
        trainer.callbacks = [*trainer.callbacks]
    assert trainer.callbacks == [own]


@pytest.mark.parametrize(
    ("form", "said"), [("nemo", "nemo (a NeMo checkpoint that simulates it"), ("hf", "hf (Hugging Face files")]
)
def test_a_quantization_ends_with_format_and_sizes(tmp_path, cpu_backend, form, said):
    for name, size in (("model", 2_000_000), ("out", 1_100_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.bin").write_bytes(bytes(size))
    paths = {"nemo_checkpoint": str(tmp_path / "model"), "export_path": str(tmp_path / "out")}
    rows = dict(
        command_lines.script_of("ptq").outcome(argparse.Namespace(algorithm="int8", export_format=form, **paths))
    )
    assert rows["algorithm"] == "int8" and rows["format"].startswith(said)
    assert rows["on disk"] == "1.1 MB; the original 2.0 MB"


@pytest.mark.parametrize(("limit", "layout", "expected"), [(1, "", 4), (5, "", 8), (3, "--devices 2", 4), (0, "", 0)])
def test_validation_takes_whole_global_batches(tmp_path, monkeypatch, limit, layout, expected):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = command_lines.RUNS["distill"].replace("--tp 2", "").replace("--gbs 4 --mbs 2", "--gbs 8 --mbs 2")
    given = command_lines.script_of("distill").resolve(
        [*command.split(), "--limit_val_batches", str(limit), *layout.split()]
    )
    assert command_lines.script_of("distill").validation_batches(given) == expected


def test_names_of_data_sets_are_no_paths(tmp_path, monkeypatch):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    script = command_lines.script_of("ptq")
    given = script.resolve(["-nc", "model", "-calib_ds", "wikitext"])
    saved = parser.saved_settings(given, script.PATHS)
    assert (saved["calibration_dataset"], saved["algorithm"]) == ("wikitext", "fp8")
    assert saved["export_path"] == str(tmp_path / "qnemo_fp8_tp1_pp1")


def test_a_saved_compression_is_the_same_compression(tmp_path, monkeypatch):
    command_lines.inputs(tmp_path)
    compress = command_lines.script_of("compress")
    monkeypatch.chdir(tmp_path)
    job, output, _ = compress.resolve([*command_lines.COMPRESS.split(), "--cpu", "--formats", "nemo", "hf"])
    file = run_file.write(tmp_path / "saved.yaml", {"output": str(output), **job.as_dict()}, "a comment")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again, folder, _ = compress.resolve(["--config", str(file)])
    assert (again, folder) == (job, output)
    other, _, _ = compress.resolve(["--config", str(file), "--no-cpu", "--distill-steps", "70"])
    assert (other.layout.cpu, other.distillation.steps) == (False, 70)
    assert other.distillation.lr == 1e-3


@pytest.mark.parametrize(
    ("flags", "text", "expected"),
    [
        ("", "", 1),
        ("--tp 2 --pp 2", "", 4),
        ("--tp 2 --devices 4", "", 4),
        ("", "layout: {tp: 2}", 2),
        ("--pp 2", "layout: {tp: 2, devices: 8}", 8),
        ("", "layout: {tp: 2, pp: 2, num_nodes: 2}", 2),
    ],
)
def test_a_compression_has_as_many_ranks_as_it_needs(tmp_path, monkeypatch, flags, text, expected):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    job, _, _ = command_lines.script_of("compress").resolve(
        [*command_lines.COMPRESS.split(), *flags.split(), "--config", "run.yaml"]
    )
    assert job.layout.devices == expected


def test_settings_get_the_types_of_the_job():
    text = {"lr": "1e-4", "steps": "010", "save_every": 5}
    found = job_settings.from_dict(job_settings.Training, text)
    assert (found.lr, found.steps, found.save_every) == (1e-4, 10, 5)
    quantization = job_settings.from_dict(job_settings.Quantization, {"enable_kv_cache": None, "formats": "hf"})
    assert quantization.enable_kv_cache is None
    assert quantization.formats == ("hf",)

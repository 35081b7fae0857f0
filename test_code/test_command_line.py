"""Flags, run files and the plans of --dry-run: everything that happens before NeMo is imported."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from nemo_modelopt_dropin import command_line, distill_checks, dry_run, loss_file, model_sizes, run_file
from nemo_modelopt_dropin.compress import settings as job_settings

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def _scripts_on_the_path():
    sys.path.insert(0, str(ROOT / "scripts"))
    yield
    sys.path.remove(str(ROOT / "scripts"))


def _script(name: str):
    return importlib.import_module(name)


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def line() -> command_line.Parser:
    found = command_line.Parser(prog="p")
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


def _refused(line: command_line.Parser, argv: list[str], capsys) -> list[str]:
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


# --- a saved run is the same run --------------------------------------------------------------------------------------


def _inputs(folder: Path) -> dict[str, str]:
    for name in ("model", "teacher"):
        (folder / name / "context").mkdir(parents=True)
    (folder / "text.jsonl").write_text('{"text": "a"}\n')
    return {name: str(folder / name) for name in ("model", "teacher", "text.jsonl")}


IMPORTANCE = "--restore_path model --save_path out --text text.jsonl --seq_length 8 --cpu --target_ffn_hidden_size 16"
COMPRESSION = "--teacher model --train-text text.jsonl --heldout-text text.jsonl"
RUNS = {
    "ptq": "-nc model -calib_ds text.jsonl --tp 2 --cpu --sq_alpha 1e-1 -algo int8 --disable_kv_cache -out here/q",
    "prune": "--restore_path model --save_path here/p --text text.jsonl --seq_length 8 --target_num_layers 2 "
    "--pp 2 --cpu",
    "distill": "--name n --log_dir logs --model_path model --teacher_path teacher --text text.jsonl --seq_length 8 "
    "--max_steps 2 --gbs 4 --mbs 2 --lr 1e-5 --tp 2 --cpu",
}


@pytest.mark.parametrize("name", RUNS)
def test_a_saved_run_file_gives_the_same_run_from_anywhere(name, tmp_path, monkeypatch):
    from nemo_modelopt_dropin.script_run import Script, save

    _inputs(tmp_path)
    script = _script(name)
    monkeypatch.chdir(tmp_path)
    given = script.resolve(RUNS[name].split())
    settings = command_line.saved_settings(given, script.PATHS)
    file = save(Script(name, tmp_path / "out", script.PATHS), settings)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.yaml"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = script.resolve(["--config", str(file)])
    assert command_line.saved_settings(again, script.PATHS) == settings
    text = next(value for key, value in settings.items() if key in ("text", "calibration_dataset"))
    assert text == str(tmp_path / "text.jsonl")
    assert given.devices == 2, "as many ranks as one copy of the model needs"


def test_a_run_file_pins_no_ranks_that_nobody_gave(tmp_path, monkeypatch):
    from nemo_modelopt_dropin.script_run import Script, save

    _inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    script = _script("prune")
    given = script.resolve(RUNS["prune"].replace("--pp 2", "").split())
    file = save(Script("prune", tmp_path / "out", script.PATHS), command_line.saved_settings(given, script.PATHS))
    assert script.resolve(["--config", str(file), "--pp", "2"]).devices == 2
    for name, value in (("LOCAL_WORLD_SIZE", "2"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert script.resolve(["--config", str(file), "--pp", "2"]).devices == 2
    with pytest.raises(SystemExit, match="2"):
        script.resolve(["--config", str(file), "--devices", "1"])


def test_what_follows_is_left_out_of_a_compressions_run_file(tmp_path, monkeypatch):
    from nemo_modelopt_dropin.compress import runner

    kept = {}
    monkeypatch.setattr(runner, "execute", lambda *arguments: kept.update(arguments[5]) or 0)
    _inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert _script("compress").main([*COMPRESS.split(), "--output", "out", "--tp", "2", "--cpu"]) == 0
    assert kept["layout"] == {"tp": 2, "pp": 1, "cpu": True}
    assert "warmup_steps" not in kept["distillation"]
    assert _script("compress").main([*COMPRESS.split(), "--output", "out", "--devices", "1"]) == 0
    assert kept["layout"]["devices"] == 1


def test_a_training_that_has_seen_all_its_samples_says_so(tmp_path, monkeypatch, capsys):
    _inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    last = tmp_path / "logs" / "n" / "checkpoints" / "n--val_loss=1.5-epoch=0-consumed_samples=8.0-last"
    last.mkdir(parents=True)
    assert _script("distill").main(RUNS["distill"].split()) == 0
    assert f"nothing to do, n has seen all samples of --max_steps 2 x --gbs 4: {last.relative_to(tmp_path)}" in (
        capsys.readouterr().err
    )
    more = _script("distill").resolve([*RUNS["distill"].split(), "--max_steps", "3"])
    assert distill_checks.finished(more) is None


def test_there_are_as_many_ranks_as_torchrun_started(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert command_line.default_devices(1, 2, 2) == 4
    assert command_line.default_devices(3, 2, 2) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert (command_line.default_devices(1, 2, 2), command_line.default_nodes(1)) == (8, 2)


def test_paths_that_follow_from_others_follow_again(tmp_path, monkeypatch):
    """A run file names no report or calibrated state that was not asked for: with another output they move along."""
    _inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    script = _script("ptq")
    given = script.resolve(RUNS["ptq"].split())
    assert given.report_path == "here/q.report"
    file = run_file.write(tmp_path / "run.yaml", command_line.saved_settings(given, script.PATHS))
    again = script.resolve(["--config", str(file), "-out", "there/q"])
    assert (again.report_path, again.calibration_state) == ("there/q.report", "there/q.calibration-state")
    chosen = script.resolve([*RUNS["ptq"].split(), "--report_path", "mine"])
    assert command_line.saved_settings(chosen, script.PATHS)["report_path"] == str(tmp_path / "mine")


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
    assert command_line.absolute_paths(given, vars(given)) == {
        "tokenizer": "owner/name",
        "data_paths": ["0.5", str(tmp_path / "mine_text_document"), "1.0", str(tmp_path / "data" / "other")],
        "save_path": str(tmp_path / "out"),
        "algorithm": "fp8",
        "report_path": None,
    }
    given.tokenizer = "tokenizer"
    assert command_line.absolute_paths(given, ["tokenizer"]) == {"tokenizer": str(tmp_path / "tokenizer")}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wikitex", "did you mean wikitext?"),
        ("data/none.jsonl", "neither one of cnn_dailymail, wikitext nor a file"),
        ("data/*.jsonl", "nor a file, folder or pattern that is there"),
        ("*.jsonl", None),
        ("text.jsonl", None),
    ],
)
def test_calibration_data_is_looked_for_at_once(tmp_path, monkeypatch, capsys, name, message):
    _inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = ["-nc", "model", "-calib_ds", name]
    if message is None:
        assert _script("ptq").resolve(command).calibration_dataset == name
        return
    with pytest.raises(SystemExit, match="2"):
        _script("ptq").resolve(command)
    assert message in capsys.readouterr().err


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
        ("[1]", "unknown"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_plan_says_what_is_minimised(tmp_path, text, expected):
    (tmp_path / "kd.yaml").write_text(text)
    assert expected in loss_file.describe(str(tmp_path / "kd.yaml"))


def test_a_distillation_ends_with_its_figures(cpu_backend):
    from types import SimpleNamespace

    from nemo_modelopt_dropin import progress
    from nemo_modelopt_dropin.script_run import aligned

    metrics = {"val_loss": 3.25, "reduced_train_loss": 0.5, "grad_norm": 1.0, "kd_top1_agreement": 0.75}
    first = progress.FirstFigures()
    trainer = SimpleNamespace(callback_metrics=metrics, global_step=40, callbacks=[first])
    first.on_train_batch_end(SimpleNamespace(callback_metrics={"reduced_train_loss": 0.9}), None, None, None, 0)
    first.on_train_batch_end(trainer, None, None, None, 1)
    rows = _script("distill").outcome(trainer, SimpleNamespace(last_model_path="logs/kd/x-last.ckpt"))
    assert list(aligned(rows)) == [
        "steps            40",
        "training loss    0.5000 (this run began at 0.9000)",
        "top-1 agreement  0.7500",
        "validation loss  3.2500",
        "checkpoint       logs/kd/x-last",
    ]


def test_the_bar_of_a_validation_goes_with_it(cpu_backend, monkeypatch):
    """Also where Lightning, inside, puts another list in the place of the callbacks."""
    from types import SimpleNamespace

    from nemo_modelopt_dropin import progress

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
    rows = dict(_script("ptq").outcome(argparse.Namespace(algorithm="int8", export_format=form, **paths)))
    assert rows["algorithm"] == "int8" and rows["format"].startswith(said)
    assert rows["on disk"] == "1.1 MB; the original 2.0 MB"


@pytest.mark.parametrize(
    ("script", "flag", "command"),
    [
        ("ptq", "--nemo_checkpoint", "-calib_ds text.jsonl"),
        ("prune", "--restore_path", "--save_path x --drop_layers 1"),
    ],
)
@pytest.mark.parametrize(("file", "hint"), [("config.json", "import it first"), ("a.bin", "it has no folder context")])
def test_what_is_no_checkpoint_is_said_before_nemo_is_loaded(
    tmp_path, monkeypatch, capsys, script, flag, command, file, hint
):
    _inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / file).write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        _script(script).resolve([flag, "other", *command.split()])
    assert f"{flag} other is no NeMo 2 checkpoint" in (found := capsys.readouterr().err) and hint in found


@pytest.mark.parametrize(("limit", "layout", "expected"), [(1, "", 4), (5, "", 8), (3, "--devices 2", 4), (0, "", 0)])
def test_validation_takes_whole_global_batches(tmp_path, monkeypatch, limit, layout, expected):
    _inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = RUNS["distill"].replace("--tp 2", "").replace("--gbs 4 --mbs 2", "--gbs 8 --mbs 2")
    given = _script("distill").resolve([*command.split(), "--limit_val_batches", str(limit), *layout.split()])
    assert _script("distill").validation_batches(given) == expected


@pytest.mark.parametrize(
    ("script", "command", "message"),
    [
        ("ptq", "-nc model -calib_ds text.jsonl --cpu -algo nvfp4", "--algorithm nvfp4 needs CUDA kernels"),
        ("ptq", "-nc model -calib_ds text.jsonl --cpu --tp 3", "4 attention heads of model cannot be split over tp 3"),
        ("ptq", "-nc model -calib_ds text.jsonl --cpu --pp 3", "2 layers of model cannot be split over pp 3"),
        (
            "prune",
            "--restore_path model --save_path x --text text.jsonl --seq_length 8 --target_ffn_hidden_size 65",
            "--target_ffn_hidden_size 65 is above the model's 64",
        ),
        (
            "compress",
            "--teacher model --train-text text.jsonl --heldout-text text.jsonl --target-num-layers 3",
            "pruning: target_num_layers 3 is above the model's 2",
        ),
        (
            "compress",
            "--teacher model --train-text text.jsonl --heldout-text text.jsonl --target-num-layers 1 --formats hf "
            "--algorithm int4_awq",
            "blocks of 128 (awq_block_size) do not divide the 32 inputs on each rank of layers after hidden_size",
        ),
        (
            "compress",
            "--teacher model --train-text text.jsonl --heldout-text text.jsonl --target-num-layers 1 "
            "--distill-config kd.yaml",
            "unknown setting 'logit_kl_temprature'; did you mean logit_kl_temperature?",
        ),
        ("distill", RUNS["distill"].replace("--tp 2", "--tp 3"), "cannot be split over tp 3"),
        (
            "ptq",
            "-nc model -calib_ds text.jsonl --cpu -algo int4_awq --export_format hf",
            "blocks of 128 (awq_block_size) do not divide the 32 inputs",
        ),
        (
            "ptq",
            "-nc model -calib_ds text.jsonl --cpu --calibration_column body",
            "has no column \"body\"; its columns are ['text'] (--calibration_column)",
        ),
        (
            "prune",
            IMPORTANCE + " --target_num_attention_heads 3",
            "--target_num_attention_heads 3 is impossible with 2",
        ),
        ("prune", IMPORTANCE.partition(" --target_ffn")[0] + " --target_params 3%", "no sizes reach"),
        (
            "prune",
            "--restore_path model --save_path x --drop_layers 1 7",
            "there is no layer 7; the model has layers 1",
        ),
        ("prune", IMPORTANCE.replace("text.jsonl", "body.jsonl"), 'body.jsonl\' has no column "text"'),
        ("compress", COMPRESSION + " --target-params 3%", "pruning: target_params 3% is"),
        ("compress", COMPRESSION + " --drop-layers 3", "pruning: drop_layers: there is no layer 3"),
        (
            "compress",
            COMPRESSION + " --target-num-layers 1 --distill-config pairs.yaml",
            "there is no layer 'decoder.layers.1': the student has 1 layers, counted from 0",
        ),
        (
            "distill",
            RUNS["distill"] + " --distillation_config pairs.yaml",
            "there is no layer 'decoder.layers.2': the teacher has 2 layers, counted from 0",
        ),
        ("distill", RUNS["distill"] + " --lr -1", "--lr must not be negative, got -1.0"),
        ("distill", RUNS["distill"] + " --min_lr 1", "--min_lr 1 is above --lr 1e-05"),
        ("distill", RUNS["distill"] + " --cp 2", "--cp 2: context parallelism needs Transformer Engine"),
        ("distill", RUNS["distill"] + " --ep 2", "--ep 2 is for models with experts; model has none"),
        ("distill", RUNS["distill"] + " --teacher-topk teacher", "is not what --dump-teacher-topk wrote"),
        ("distill", RUNS["distill"].replace("logs", "teacher"), "teacher/n lies inside of --teacher_path teacher"),
        (
            "distill",
            RUNS["distill"] + " --distillation_config values.yaml",
            "fused_logits must be auto, on or off, got 'maybe'",
        ),
        (
            "distill",
            RUNS["distill"] + " --distillation_config values.yaml",
            "logit_kl_direction must be one of forward, reverse, jsd, got 'backward'",
        ),
        (
            "compress",
            COMPRESSION + " --target-num-layers 1 --distill-min-lr 1",
            "distillation: min_lr 1 is above lr 0.0001",
        ),
        ("compress", COMPRESSION + " --target-num-layers 1 --output model", "model is --teacher itself"),
        ("compress", COMPRESSION + " --target-num-layers 1 --output text.jsonl", "text.jsonl is a file; give a folder"),
        (
            "compress",
            COMPRESSION + " --target-num-layers 1 --output teacher",
            "teacher is a checkpoint; give a new folder",
        ),
        ("ptq", "-nc model -calib_ds text.jsonl --cpu -out model", "--export_path model is --nemo_checkpoint itself"),
        ("ptq", "-nc model -calib_ds text.jsonl --cpu -out teacher", "holds a checkpoint of format nemo already"),
        ("ptq", "-nc model -calib_ds empty.jsonl --cpu", "--calibration_dataset: empty.jsonl is empty"),
        ("ptq", "-nc model -calib_ds text.jsonl --cpu --tp 4", "2 query groups of model cannot be split over tp 4"),
        ("prune", IMPORTANCE.replace("out", "model"), "--save_path model is --restore_path itself"),
        ("prune", IMPORTANCE.replace("text.jsonl", "teacher"), "--text teacher is a folder; give one file"),
        ("prune", "--restore_path logs --save_path x --drop_layers 1", "did you mean logs/checkpoints/b-last?"),
        (
            "distill",
            RUNS["distill"] + " --distillation_config kd.yaml",
            "unknown setting 'logit_kl_temprature'; did you mean logit_kl_temperature?",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_said_before_nemo_is_loaded(
    tmp_path, monkeypatch, capsys, script, command, message
):
    _inputs(tmp_path)
    for name in ("model", "teacher"):
        shutil.rmtree(tmp_path / name)
        _checkpoint(tmp_path / name)
    (tmp_path / "kd.yaml").write_text("logit_kl_temprature: 2\n")
    (tmp_path / "pairs.yaml").write_text("intermediate_layer_pairs: [[decoder.layers.1, decoder.layers.2]]\n")
    (tmp_path / "values.yaml").write_text("fused_logits: maybe\nlogit_kl_direction: backward\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "logs" / "checkpoints" / "b-last").mkdir(parents=True)
    (tmp_path / "body.jsonl").write_text('{"body": "a"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        _script(script).resolve(command.split())
    assert message in capsys.readouterr().err


def test_the_settings_of_losses_are_those_of_the_configuration(cpu_backend):
    import dataclasses

    from nemo.collections.llm.modelopt.distill.utils import DistillationConfig

    assert [field.name for field in dataclasses.fields(DistillationConfig)] == [*loss_file.SETTINGS]
    from nemo.collections.llm.modelopt.distill import _config, _fused_model, _recording, _vocab_parallel

    assert {*loss_file._PAIR_LOSSES} == {*_config.INTERMEDIATE_LOSSES}
    assert {*loss_file._DIVERGENCES} == {*_vocab_parallel.DIRECTIONS}
    assert all(loss_file._VALUES["fused_logits"][0](value) for value in _fused_model.FUSED_LOGITS)
    assert distill_checks.RECORDING == _recording.MANIFEST


def test_names_of_data_sets_are_no_paths(tmp_path, monkeypatch):
    _inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    script = _script("ptq")
    given = script.resolve(["-nc", "model", "-calib_ds", "wikitext"])
    saved = command_line.saved_settings(given, script.PATHS)
    assert (saved["calibration_dataset"], saved["algorithm"]) == ("wikitext", "fp8")
    assert saved["export_path"] == str(tmp_path / "qnemo_fp8_tp1_pp1")


COMPRESS = "--teacher model --train-text text.jsonl --heldout-text text.jsonl --target-num-layers 1 --distill-lr 1e-3"


def test_a_saved_compression_is_the_same_compression(tmp_path, monkeypatch):
    _inputs(tmp_path)
    compress = _script("compress")
    monkeypatch.chdir(tmp_path)
    job, output, _ = compress.resolve([*COMPRESS.split(), "--cpu", "--formats", "nemo", "hf"])
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
    _inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    job, _, _ = _script("compress").resolve([*COMPRESS.split(), *flags.split(), "--config", "run.yaml"])
    assert job.layout.devices == expected


def test_every_wrong_setting_of_a_compression_is_reported(tmp_path, capsys, monkeypatch):
    _inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(
        "teachr: x\nlayout: 3\ndistillation: {lr: 1e-4x, stepps: 3}\nquantization: {formats: hff}\nscratch: perhaps\n"
    )
    with pytest.raises(SystemExit, match="2"):
        _script("compress").resolve(["--config", "run.yaml", "--devices", "x", "--traim-text", "a"])
    found = capsys.readouterr().err
    for part in (
        "unknown setting 'teachr'",
        "did you mean teacher?",
        "layout must hold settings by name",
        "distillation: lr must be a number, got '1e-4x'",
        "in distillation 'stepps'",
        "scratch is a switch",
        "--devices: invalid int value: 'x'",
        "did you mean --train-text?",
        "missing: --teacher, --heldout-text",
    ):
        assert part in found, part


def test_settings_get_the_types_of_the_job():
    text = {"lr": "1e-4", "steps": "010", "save_every": 5}
    found = job_settings.from_dict(job_settings.Training, text)
    assert (found.lr, found.steps, found.save_every) == (1e-4, 10, 5)
    quantization = job_settings.from_dict(job_settings.Quantization, {"enable_kv_cache": None, "formats": "hf"})
    assert quantization.enable_kv_cache is None
    assert quantization.formats == ("hf",)


# --- plans ------------------------------------------------------------------------------------------------------------

LLAMA = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 128,
    "gated_linear_unit": True,
    "normalization": "RMSNorm",
}


def _checkpoint(folder: Path, **changed) -> Path:
    import yaml

    (folder / "context").mkdir(parents=True)
    content = {"_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel", "config": {**LLAMA, **changed}}
    (folder / "context" / "model.yaml").write_text(yaml.safe_dump(content))
    return folder


MODELS = {
    "llama": {},
    "tied": {"share_embeddings_and_output_weights": True},
    "gpt": {
        "gated_linear_unit": False,
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "num_query_groups": None,
        "position_embedding_type": "learned_absolute",
        "seq_length": 32,
    },
    "qwen": {"add_qkv_bias": True, "qk_layernorm": True, "kv_channels": 16},
    "experts": {"num_moe_experts": 4, "moe_ffn_hidden_size": 24},
}


def test_parameters_are_those_of_the_models(ranks, tmp_path):
    from test_code import jobs_cli

    counted = ranks(1).run(jobs_cli.count_parameters, {name: {**LLAMA, **MODELS[name]} for name in MODELS})[0]
    shapes = {name: model_sizes.read(_checkpoint(tmp_path / name, **MODELS[name])) for name in MODELS}
    assert {
        name: {"parameters": shape.parameters, "body": shape.body_parameters, "linear": shape.linear_parameters}
        for name, shape in shapes.items()
    } == counted


def test_a_hugging_face_folder_has_the_same_sizes(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    assert model_sizes.read(tmp_path).parameters == sum(p.numel() for p in LlamaForCausalLM(config).parameters())


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"hybrid_override_pattern": "M*"}, "hybrid_override_pattern are not covered"),
        ({"num_layers": None}, "no num_layers"),
        ({"vocab_size": None}, "no vocab_size and no tokenizer.json"),
        ({"num_moe_experts": 2, "moe_layer_freq": 2}, "mixed"),
    ],
)
def test_sizes_that_cannot_be_told_are_not_guessed(tmp_path, changed, reason):
    with pytest.raises(model_sizes.UnknownModel, match=reason):
        model_sizes.read(_checkpoint(tmp_path, **changed))
    rows, shape = dry_run.model("model", tmp_path)
    assert shape is None
    assert reason in rows[1][1]
    assert dry_run.memory(None) == ("memory", "unknown")


def test_a_vocabulary_comes_from_the_tokenizer_where_the_configuration_has_none(tmp_path):
    checkpoint = _checkpoint(tmp_path, vocab_size=None, make_vocab_size_divisible_by=8)
    (tmp_path / "context" / "tokenizer").mkdir()
    content = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "</s>"}, {"content": "b"}]}
    (tmp_path / "context" / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    assert model_sizes.read(checkpoint).vocab_size == 8


def test_memory_is_shared_by_the_ranks(tmp_path):
    shape = model_sizes.read(_checkpoint(tmp_path))
    one = model_sizes.training_memory(shape, shape, 2, 8, 1, 1, 1, 2).parts
    four = model_sizes.training_memory(shape, shape, 2, 8, 2, 2, 2, 2).parts
    assert one["weights"] == 2 * shape.parameters
    assert one["teacher"] == 2 * shape.parameters
    assert one["optimizer"] == 12 * shape.parameters
    assert four["weights"] == one["weights"] / 4
    assert four["optimizer"] == one["optimizer"] / 8
    # fp32: its weights are what Adam steps on, so there is no second copy
    assert model_sizes.training_memory(shape, None, 2, 8, 1, 1, 1, 4).parts["optimizer"] == 8 * shape.parameters
    forward = model_sizes.forward_memory(shape, 2, 8, 2, 1, 2)
    assert forward.parts["logits"] == 4 * 2 * 8 * 128 / 2
    assert forward.total == sum(forward.parts.values())


PLANS = {
    "ptq": [
        "quantize  fp8; matrices in 8 bits",
        "data      at most 512 rows of cnn_dailymail",
        "ranks     2 x 1 nodes (CPU over gloo): tp 2 x pp 1 x dp 1",
        "run.yaml",
    ],
    "prune": ["after   1 layers, hidden 32", "of the parameters", "ranks   2 x 1", "run.yaml"],
    "distill": [
        "teacher  ",
        "train    2 steps of 4 x 8 tokens",
        "warm-up in 1 of them (all but the last",
        "optimizer",
        "checkpoints/",
    ],
    "compress": ["prune     would run", "pruned    1 layers", "report.html", "export/hf"],
}
PLANNED = {
    "ptq": "-nc model --tp 2 --cpu --export_format hf -out out",
    "prune": "--restore_path model --save_path out --pp 2 --cpu --drop_layers 2",
    "distill": RUNS["distill"].replace("logs", "out"),
    "compress": COMPRESS + " --formats hf --output out",
}


@pytest.mark.parametrize("name", PLANS)
def test_a_dry_run_prints_the_plan_and_writes_nothing(name, tmp_path, monkeypatch, capsys):
    _inputs(tmp_path)
    for folder in ("model", "teacher"):
        shutil.rmtree(tmp_path / folder)
        _checkpoint(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert _script(name).main([*PLANNED[name].split(), "--dry-run"]) == 0
    found = capsys.readouterr().out
    for part in (*PLANS[name], "LlamaModel", "2 layers, hidden 32", "memory", "a rank", "out"):
        assert part in found, f"{part!r} is not in\n{found}"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("layers", "stages"), [(4, 2), (3, 2), (5, 3), (7, 4), (32, 5), (3, 3), (9, 1)])
def test_layers_that_do_not_divide_go_to_the_outer_stages(layers, stages):
    first, last = model_sizes.stage_layers(layers, stages)
    if layers % stages == 0:
        assert (first, last) == (None, None)
        return
    between = layers - first - last
    assert min(first, last) >= layers // stages and abs(first - last) <= 1
    assert between == (stages - 2) * (layers // stages)


def test_a_plan_without_quantization_speaks_of_no_data(tmp_path, monkeypatch, capsys):
    _checkpoint(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    command = ["-nc", "model", "-algo", "no_quant", "--cpu", "--export_format", "hf", "-out", "out", "--dry-run"]
    assert _script("ptq").main(command) == 0
    found = capsys.readouterr().out
    assert "quantize  not at all: hf format" in found
    assert not any(word in found for word in ("data ", "report", "calibration-state"))


@pytest.mark.parametrize(("layers", "expected"), [(4, (None, None)), (3, (1, 2)), (5, (2, 3))])
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("ptq", "-nc model -calib_ds text.jsonl --cpu --pp 2"),
        ("prune", "--restore_path model --save_path x --drop_layers 1 --pp 2 --cpu"),
    ],
)
def test_stages_are_unequal_where_layers_do_not_divide(tmp_path, monkeypatch, name, command, layers, expected):
    _inputs(tmp_path)
    shutil.rmtree(tmp_path / "model")
    _checkpoint(tmp_path / "model", num_layers=layers)
    monkeypatch.chdir(tmp_path)
    script = _script(name)
    given = script.resolve(command.split())
    names = [f"num_layers_in_{end}_pipeline_stage" for end in ("first", "last")]
    assert tuple(getattr(given, name) for name in names) == expected
    assert not {*names} & {name for name, value in command_line.saved_settings(given, script.PATHS).items() if value}
    asked = script.resolve([*command.split(), "--num_layers_in_first_pipeline_stage", "1"])
    assert asked.num_layers_in_last_pipeline_stage is None, "what is asked for is left as it is"


@pytest.mark.parametrize(
    ("layers", "stages"), [(2, "2 pipeline stages."), (3, "2 pipeline stages (1 layers in the first, 2 in the last).")]
)
def test_tensor_parallel_ranks_measure_importance_as_pipeline_stages(layers, stages, tmp_path, monkeypatch, capsys):
    _inputs(tmp_path)
    shutil.rmtree(tmp_path / "model")
    _checkpoint(tmp_path / "model", num_layers=layers)
    monkeypatch.chdir(tmp_path)
    assert _script("prune").main([*IMPORTANCE.split(), "--tp", "2", "--dry-run"]) == 0
    found = capsys.readouterr().out
    assert "ranks   2 x 1 nodes (CPU over gloo): tp 1 x pp 2 x dp 1" in found
    assert f"instead of TP=2 the checkpoint is restored at TP=1 with {stages}" in found


def test_more_ranks_than_layers_cannot_measure_importance(tmp_path, monkeypatch, capsys):
    _inputs(tmp_path)
    shutil.rmtree(tmp_path / "model")
    _checkpoint(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    reason = "2 layers cannot be split over 4 pipeline stages; importance is measured on whole layers"
    with pytest.raises(SystemExit) as stopped:
        _script("prune").main([*IMPORTANCE.split(), "--tp", "2", "--devices", "4", "--dry-run"])
    assert stopped.value.code == 2 and reason in capsys.readouterr().err
    settings = {"teacher": "model", "train_text": "text.jsonl", "heldout_text": "text.jsonl"}
    layout = job_settings.Layout(devices=4, tp=4, cpu=True)
    pruning = job_settings.Pruning(target_ffn_hidden_size=16)
    job = job_settings.Job(**settings, pruning=pruning, layout=layout)
    assert [problem for problem in job.problems() if reason in problem]


def test_a_dry_run_of_a_search_says_what_is_tried(tmp_path, monkeypatch, capsys):
    _inputs(tmp_path)
    for folder in ("model", "teacher"):
        shutil.rmtree(tmp_path / folder)
        _checkpoint(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    command = [*COMPRESS.split(), "--output", "out", "--dry-run", "--max-candidates", "5"]
    assert _script("compress").main([*command, "--target-params", "70%"]) == 0
    assert "params at most 70%, the best of up to 5 candidates by held-out loss" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        _script("compress").main([*command, "--target-params", "most"])
    assert "target_params most is no number of parameters; give a share" in capsys.readouterr().err


# --- two runs -------------------------------------------------------------------------------------------------------


def test_comparing_two_runs(tmp_path, capsys):
    from test_code import test_report as reports

    content = reports.summary.build(reports._records(), "t", job_settings.Job("t", "a", "b"))
    compress = _script("compress")
    for name, run in zip(("one", "two"), reports._two(content), strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(run))
    assert compress.main(["--compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    shown = capsys.readouterr().out
    assert "4.2130" in shown and "+10.0%" in shown and "distillation.lr" in shown
    page = reports._Page((tmp_path / "two" / "compare.html").read_text(encoding="utf-8"))
    assert "4.2130" in page.cells
    assert json.loads(page.scripts["report"])["names"] == ["one", "two"]
    with pytest.raises(SystemExit, match="2"):
        compress.main(["--compare", str(tmp_path / "one"), str(tmp_path)])
    assert "no report.json there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dump-teacher-topk", "topk", "--distillation_config", "pairs.yaml"], "recording holds logits alone"),
        (["--dump-teacher-topk", "model"], "model exists; give a new folder"),
        (["--dump-teacher-topk", "topk", "--teacher-topk", "teacher"], "and no --teacher-topk"),
        (["--teacher-topk", "nowhere"], "--teacher_topk"),
    ],
)
def test_what_a_recorded_teacher_cannot_be(tmp_path, monkeypatch, capsys, flags, message):
    _inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("pairs.yaml").write_text("intermediate_layer_pairs: [[decoder.layers.0, decoder.layers.0]]")
    with pytest.raises(SystemExit, match="2"):
        _script("distill").resolve([*RUNS["distill"].split(), *flags])
    assert message in capsys.readouterr().err

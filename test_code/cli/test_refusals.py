"""What scripts refuse before NeMo is imported: what is not there, does not fit the model, or cannot be read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_modelopt_cli.checks import distill_checks
from nemo_modelopt_cli.compress import settings as job_settings
from nemo_modelopt_dropin import versions
from nemo_modelopt_dropin.preflight import loss_file
from test_code.support import command_lines


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
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = ["-nc", "model", "-calib_ds", name]
    if message is None:
        assert command_lines.script_of("ptq").resolve(command).calibration_dataset == name
        return
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of("ptq").resolve(command)
    assert message in capsys.readouterr().err


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
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / file).write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of(script).resolve([flag, "other", *command.split()])
    assert f"{flag} other is not a NeMo 2 checkpoint" in (found := capsys.readouterr().err) and hint in found


@pytest.mark.parametrize(
    ("script", "command", "message"),
    [
        (
            "ptq",
            "-nc model -calib_ds text.jsonl --cpu -algo MXINT8_DEFAULT_CFG",
            "--algorithm MXINT8_DEFAULT_CFG needs CUDA kernels",
        ),
        ("ptq", "-nc model -calib_ds text.jsonl --cpu --tp 3", "4 attention heads of model cannot be split over tp 3"),
        (
            "ptq",
            "-nc model -calib_ds text.jsonl --cpu -algo auto --auto_quantize_bits 6 --auto_quantize_formats int8,fp9",
            "--auto_quantize_formats: 'fp9' is not one of int8",
        ),
        ("ptq", "-nc model -calib_ds text.jsonl --cpu --pp 3", "2 layers of model cannot be split over pp 3"),
        (
            "prune",
            "--restore_path model --save_path x --text text.jsonl --seq_length 8 --target_ffn_hidden_size 65",
            "--target_ffn_hidden_size 65 is above the model's 64",
        ),
        (
            "compress",
            "--teacher model --train-text text.jsonl --heldout-text heldout.jsonl --target-num-layers 3",
            "pruning: target_num_layers 3 is above the model's 2",
        ),
        (
            "compress",
            "--teacher model --train-text text.jsonl --heldout-text heldout.jsonl --target-num-layers 1 --formats hf "
            "--algorithm int4_awq",
            "blocks of 128 (awq-block-size) do not divide the 32 inputs on each rank of layers after hidden_size",
        ),
        (
            "compress",
            "--teacher model --train-text text.jsonl --heldout-text heldout.jsonl --target-num-layers 1 "
            "--distill-config kd.yaml",
            "unknown setting 'logit_kl_temprature'; did you mean logit_kl_temperature?",
        ),
        ("distill", command_lines.RUNS["distill"].replace("--tp 2", "--tp 3"), "cannot be split over tp 3"),
        (
            "ptq",
            "-nc model -calib_ds text.jsonl --cpu -algo int4_awq --export_format hf",
            "blocks of 128 (awq_block_size) do not divide the 32 inputs",
        ),
        (
            "ptq",
            "-nc model -calib_ds text.jsonl --cpu -algo int4_awq -awq_bs 64 --tp 2 --export_format nemo",
            "blocks of 64 (awq_block_size) do not divide the 32 inputs on each rank of layers after ffn_hidden_size; "
            "use --awq_block_size 32, or a smaller tp than 2",
        ),
        (
            "ptq",
            "-nc model -calib_ds text.jsonl --cpu --calibration_column body",
            "has no column \"body\"; its columns are ['text'] (--calibration_column)",
        ),
        (
            "prune",
            command_lines.IMPORTANCE + " --target_num_attention_heads 3",
            "--target_num_attention_heads 3 is not possible with 2",
        ),
        ("prune", command_lines.IMPORTANCE.partition(" --target_ffn")[0] + " --target_params 3%", "no sizes go below"),
        (
            "prune",
            "--restore_path model --save_path x --drop_layers 1 7",
            "there is no layer 7; the model has layers 1",
        ),
        ("prune", command_lines.IMPORTANCE.replace("text.jsonl", "body.jsonl"), 'body.jsonl\' has no column "text"'),
        ("compress", command_lines.COMPRESSION + " --target-params 3%", "pruning: target_params 3% is"),
        ("compress", command_lines.COMPRESSION + " --drop-layers 3", "pruning: drop_layers: there is no layer 3"),
        (
            "compress",
            command_lines.COMPRESSION + " --target-num-layers 1 --distill-config pairs.yaml",
            "there is no layer 'decoder.layers.1': the student has 1 layers, counted from 0",
        ),
        (
            "distill",
            command_lines.RUNS["distill"] + " --distillation_config pairs.yaml",
            "there is no layer 'decoder.layers.2': the teacher has 2 layers, counted from 0",
        ),
        ("distill", command_lines.RUNS["distill"] + " --lr -1", "--lr must not be negative, got -1.0"),
        ("distill", command_lines.RUNS["distill"] + " --min_lr 1", "--min_lr 1 is above --lr 1e-05"),
        ("distill", command_lines.RUNS["distill"] + " --cp 2", "--cp 2: context parallelism needs Transformer Engine"),
        ("distill", command_lines.RUNS["distill"] + " --ep 2", "--ep 2 is for models with experts; model has none"),
        (
            "distill",
            command_lines.RUNS["distill"] + " --teacher-topk teacher",
            "is not a recording of --dump-teacher-topk",
        ),
        (
            "distill",
            command_lines.RUNS["distill"].replace("logs", "teacher"),
            "teacher/n lies inside --teacher_path teacher",
        ),
        (
            "distill",
            command_lines.RUNS["distill"] + " --distillation_config values.yaml",
            "fused_logits must be auto, on or off, got 'maybe'",
        ),
        (
            "distill",
            command_lines.RUNS["distill"] + " --distillation_config values.yaml",
            "logit_kl_direction must be one of forward, reverse, jsd, got 'backward'",
        ),
        (
            "distill",
            command_lines.RUNS["distill"] + " --distillation_config beta.yaml",
            "logit_kl_beta must be a number between 0 and 1, got 2",
        ),
        (
            "distill",
            command_lines.RUNS["distill"] + " --distillation_config beta.yaml",
            "logit_kl_beta needs logit_kl_direction: jsd",
        ),
        (
            "distill",
            command_lines.RUNS["distill"] + " --distillation_config lists.yaml",
            "logit_kl_direction must be one of forward, reverse, jsd, got ['forward']",
        ),
        (
            "compress",
            command_lines.COMPRESSION + " --target-num-layers 1 --distill-min-lr 1",
            "distillation: min_lr 1 is above lr 0.0001",
        ),
        ("compress", command_lines.COMPRESSION + " --target-num-layers 1 --output model", "model is --teacher itself"),
        (
            "compress",
            command_lines.COMPRESSION + " --target-num-layers 1 --output text.jsonl",
            "text.jsonl is --train-text itself, which would be overwritten",
        ),
        (
            "compress",
            command_lines.COMPRESSION + " --target-num-layers 1 --output teacher",
            "teacher is a checkpoint; use a new folder",
        ),
        ("ptq", "-nc model -calib_ds text.jsonl --cpu -out model", "--export_path model is --nemo_checkpoint itself"),
        ("ptq", "-nc model -calib_ds text.jsonl --cpu -out teacher", "holds a checkpoint of format nemo already"),
        ("ptq", "-nc model -calib_ds empty.jsonl --cpu", "--calibration_dataset: empty.jsonl is empty"),
        ("ptq", "-nc model -calib_ds text.jsonl --cpu --tp 4", "2 query groups of model cannot be split over tp 4"),
        ("prune", command_lines.IMPORTANCE.replace("out", "model"), "--save_path model is --restore_path itself"),
        (
            "prune",
            command_lines.IMPORTANCE.replace("text.jsonl", "teacher"),
            "--text teacher is a folder; pass one file",
        ),
        ("prune", "--restore_path logs --save_path x --drop_layers 1", "did you mean logs/checkpoints/b-last?"),
        (
            "distill",
            command_lines.RUNS["distill"] + " --distillation_config kd.yaml",
            "unknown setting 'logit_kl_temprature'; did you mean logit_kl_temperature?",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_said_before_nemo_is_loaded(
    tmp_path, monkeypatch, capsys, script, command, message
):
    command_lines.inputs(tmp_path)
    for name in ("model", "teacher"):
        shutil.rmtree(tmp_path / name)
        command_lines.checkpoint(tmp_path / name)
    (tmp_path / "kd.yaml").write_text("logit_kl_temprature: 2\n")
    (tmp_path / "pairs.yaml").write_text("intermediate_layer_pairs: [[decoder.layers.1, decoder.layers.2]]\n")
    (tmp_path / "values.yaml").write_text("fused_logits: maybe\nlogit_kl_direction: backward\n")
    (tmp_path / "beta.yaml").write_text("logit_kl_beta: 2\n")
    (tmp_path / "lists.yaml").write_text("logit_kl_direction: [forward]\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "logs" / "checkpoints" / "b-last").mkdir(parents=True)
    (tmp_path / "body.jsonl").write_text('{"body": "a"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of(script).resolve(command.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("prune", "--restore_path model --save_path new --drop_layers 1"),
        ("compress", "--teacher model --train-text text.jsonl --heldout-text text.jsonl --output new --drop-layers 1"),
    ],
)
def test_a_modelopt_that_cannot_prune_is_said_before_nemo_is_loaded(tmp_path, monkeypatch, capsys, script, command):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(versions, "installed_version", lambda name: "0.47.0")
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of(script).resolve(command.split())
    assert "the pruning of nvidia-modelopt 0.47.0 imports" in (said := capsys.readouterr().err)
    assert "Install nvidia-modelopt 0.43" in said


def test_what_does_not_fit_the_model_is_said_with_the_rest(tmp_path, monkeypatch, capsys):
    command_lines.inputs(tmp_path)
    shutil.rmtree(tmp_path / "model")
    command_lines.checkpoint(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for script, command, expected in (
        ("prune", "--restore_path model --save_path x --target_num_attention_heads 3 --drop_layers 9", 3),
        ("distill", command_lines.RUNS["distill"].replace("--tp 2", "--tp 3") + " --gbs 3 --lr -1", 3),
        ("compress", command_lines.COMPRESSION + " --target-num-layers 9 --tp 3 --distill-lr 0 --target-params 3", 4),
        ("ptq", "-nc model -calib_ds none.jsonl --cpu --tp 3 -bs 0", 3),
    ):
        with pytest.raises(SystemExit, match="2"):
            command_lines.script_of(script).resolve(command.split())
        found = capsys.readouterr().err.splitlines()
        assert len(found) == expected + 1, found  # and "see --help"


def test_the_settings_of_losses_are_those_of_the_configuration(cpu_backend):
    import dataclasses

    from nemo.collections.llm.modelopt.distill.utils import DistillationConfig

    assert [field.name for field in dataclasses.fields(DistillationConfig) if field.init] == [*loss_file.SETTINGS]
    from nemo.collections.llm.modelopt._divergence import vocab_parallel
    from nemo.collections.llm.modelopt.distill import _config, _fusion
    from nemo.collections.llm.modelopt.distill.recorded import store

    assert {*loss_file._PAIR_LOSSES} == {*_config.INTERMEDIATE_LOSSES}
    assert {*loss_file._DIVERGENCES} == {*vocab_parallel.DIRECTIONS}
    assert all(loss_file._VALUES["fused_logits"][0](value) for value in _fusion.FUSED_LOGITS)
    assert distill_checks.RECORDING == store.MANIFEST


def test_every_wrong_setting_of_a_compression_is_reported(tmp_path, capsys, monkeypatch):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(
        "teachr: x\nlayout: 3\ndistillation: {lr: 1e-4x, stepps: 3}\nquantization: {formats: hff}\nscratch: perhaps\n"
    )
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of("compress").resolve(["--config", "run.yaml", "--devices", "x", "--traim-text", "a"])
    found = capsys.readouterr().err
    for part in (
        "unknown setting 'teachr'",
        "did you mean teacher?",
        "layout must hold settings by name",
        "distillation: lr must be a number, got '1e-4x'",
        "in distillation 'stepps'",
        "scratch must be true or false",
        "--devices: invalid int value: 'x'",
        "did you mean --train-text?",
        "missing: --teacher, --heldout-text",
    ):
        assert part in found, part


def test_more_ranks_than_layers_cannot_measure_importance(tmp_path, monkeypatch, capsys):
    command_lines.inputs(tmp_path)
    shutil.rmtree(tmp_path / "model")
    command_lines.checkpoint(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    reason = "2 layers cannot be split over 4 pipeline stages; importance is measured on whole layers"
    with pytest.raises(SystemExit) as stopped:
        command_lines.script_of("prune").main(
            [*command_lines.IMPORTANCE.split(), "--tp", "2", "--devices", "4", "--dry-run"]
        )
    assert stopped.value.code == 2 and reason in capsys.readouterr().err
    settings = {"teacher": "model", "train_text": "text.jsonl", "heldout_text": "heldout.jsonl"}
    layout = job_settings.Layout(devices=4, tp=4, cpu=True)
    pruning = job_settings.Pruning(target_ffn_hidden_size=16)
    job = job_settings.Job(**settings, pruning=pruning, layout=layout)
    assert [problem for problem in job.problems() if reason in problem]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dump-teacher-topk", "topk", "--distillation_config", "pairs.yaml"], "recording holds logits alone"),
        (["--dump-teacher-topk", "model"], "model exists; choose a new folder"),
        (["--dump-teacher-topk", "topk", "--teacher-topk", "teacher"], "and no --teacher-topk"),
        (["--teacher-topk", "nowhere"], "--teacher_topk"),
    ],
)
def test_what_a_recorded_teacher_cannot_be(tmp_path, monkeypatch, capsys, flags, message):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("pairs.yaml").write_text("intermediate_layer_pairs: [[decoder.layers.0, decoder.layers.0]]")
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of("distill").resolve([*command_lines.RUNS["distill"].split(), *flags])
    assert message in capsys.readouterr().err

"""Sizes read from configurations, and the plans that --dry-run prints."""

from __future__ import annotations

import json
import shutil

import pytest

from nemo_modelopt_cli import dry_run, parser
from nemo_modelopt_cli.compress import settings as job_settings
from nemo_modelopt_dropin.preflight import model_sizes
from test_code.support import command_lines, tiny

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


def count_parameters(configurations: dict[str, dict]) -> dict[str, dict[str, int]]:
    """Return the parameters of each model: all, outside of embedding and output layer, and of the layers' matrices."""
    tiny.init_parallel()
    found = {}
    for name, settings in configurations.items():
        core = tiny.config(**settings).configure_model(tiny.tokenizer())
        sizes = {"parameters": 0, "body": 0, "linear": 0}
        for key, parameter in core.named_parameters():
            body = "embedding" not in key and "output_layer" not in key
            sizes["parameters"] += parameter.numel()
            sizes["body"] += parameter.numel() if body else 0
            sizes["linear"] += parameter.numel() if body and "linear_" in key and parameter.ndim == 2 else 0
        found[name] = sizes
    return found


def test_parameters_are_those_of_the_models(ranks, tmp_path):

    counted = ranks(1).run(count_parameters, {name: {**command_lines.LLAMA, **MODELS[name]} for name in MODELS})[0]
    shapes = {name: model_sizes.read(command_lines.checkpoint(tmp_path / name, **MODELS[name])) for name in MODELS}
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
        ({"vocab_size": None}, "no vocab_size and there is no tokenizer.json"),
        ({"num_moe_experts": 2, "moe_layer_freq": 2}, "mixed"),
    ],
)
def test_sizes_that_cannot_be_told_are_not_guessed(tmp_path, changed, reason):
    with pytest.raises(model_sizes.UnknownModel, match=reason):
        model_sizes.read(command_lines.checkpoint(tmp_path, **changed))
    rows, shape = dry_run.model("model", tmp_path)
    assert shape is None
    assert reason in rows[1][1]
    assert dry_run.memory(None) == ("memory", "unknown")


def test_a_vocabulary_comes_from_the_tokenizer_where_the_configuration_has_none(tmp_path):
    checkpoint = command_lines.checkpoint(tmp_path, vocab_size=None, make_vocab_size_divisible_by=8)
    (tmp_path / "context" / "tokenizer").mkdir()
    content = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "</s>"}, {"content": "b"}]}
    (tmp_path / "context" / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    assert model_sizes.read(checkpoint).vocab_size == 8


def test_memory_is_shared_by_the_ranks(tmp_path):
    shape = model_sizes.read(command_lines.checkpoint(tmp_path))
    one = model_sizes.training_memory(shape, shape, 2, 8, 1, 1, 1, 2).parts
    four = model_sizes.training_memory(shape, shape, 2, 8, 2, 2, 2, 2).parts
    assert one["weights"] == 2 * shape.parameters
    assert one["teacher"] == 2 * shape.parameters
    assert one["optimizer"] == 12 * shape.parameters
    assert four["weights"] == one["weights"] / 4
    assert four["optimizer"] == one["optimizer"] / 8
    # fp32: its weights are what Adam steps on, so there is no second copy
    assert model_sizes.training_memory(shape, None, 2, 8, 1, 1, 1, 4).parts["optimizer"] == 8 * shape.parameters
    forward = model_sizes.forward_memory(shape, 2, 8, 2, 1, 2, logits=2 * 8)
    assert forward.parts["logits"] == 4 * 2 * 8 * 128 / 2
    assert forward.total == sum(forward.parts.values())


PLANS = {
    "ptq": [
        "quantize   fp8; matrices in 8 bits",
        "hf layout  modelopt, read by vLLM (run), SGLang",
        "data       at most 512 rows of cnn_dailymail",
        "ranks      2 x 1 nodes (CPU over gloo): tp 2 x pp 1 x dp 1",
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
    "compress": ["prune      would run", "pruned     1 layers", "report.html", "export/hf"],
}


PLANNED = {
    "ptq": "-nc model --tp 2 --cpu --export_format hf -out out",
    "prune": "--restore_path model --save_path out --pp 2 --cpu --drop_layers 2",
    "distill": command_lines.RUNS["distill"].replace("logs", "out"),
    "compress": command_lines.COMPRESS + " --formats hf --output out",
}


@pytest.mark.parametrize("name", PLANS)
def test_a_dry_run_prints_the_plan_and_writes_nothing(name, tmp_path, monkeypatch, capsys):
    command_lines.inputs(tmp_path)
    for folder in ("model", "teacher"):
        shutil.rmtree(tmp_path / folder)
        command_lines.checkpoint(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert command_lines.script_of(name).main([*PLANNED[name].split(), "--dry-run"]) == 0
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
    command_lines.checkpoint(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    command = ["-nc", "model", "-algo", "no_quant", "--cpu", "--export_format", "hf", "-out", "out", "--dry-run"]
    assert command_lines.script_of("ptq").main(command) == 0
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
    command_lines.inputs(tmp_path)
    shutil.rmtree(tmp_path / "model")
    command_lines.checkpoint(tmp_path / "model", num_layers=layers)
    monkeypatch.chdir(tmp_path)
    script = command_lines.script_of(name)
    given = script.resolve(command.split())
    names = [f"num_layers_in_{end}_pipeline_stage" for end in ("first", "last")]
    assert tuple(getattr(given, name) for name in names) == expected
    assert not {*names} & {name for name, value in parser.saved_settings(given, script.PATHS).items() if value}
    asked = script.resolve([*command.split(), "--num_layers_in_first_pipeline_stage", "1"])
    assert asked.num_layers_in_last_pipeline_stage is None, "what is asked for is left as it is"


@pytest.mark.parametrize(
    ("layers", "stages"), [(2, "2 pipeline stages."), (3, "2 pipeline stages (1 layers in the first, 2 in the last).")]
)
def test_tensor_parallel_ranks_measure_importance_as_pipeline_stages(layers, stages, tmp_path, monkeypatch, capsys):
    command_lines.inputs(tmp_path)
    shutil.rmtree(tmp_path / "model")
    command_lines.checkpoint(tmp_path / "model", num_layers=layers)
    monkeypatch.chdir(tmp_path)
    assert command_lines.script_of("prune").main([*command_lines.IMPORTANCE.split(), "--tp", "2", "--dry-run"]) == 0
    found = capsys.readouterr().out
    assert "ranks   2 x 1 nodes (CPU over gloo): tp 1 x pp 2 x dp 1" in found
    assert f"instead of TP=2 the checkpoint is restored at TP=1 with {stages}" in found


def test_a_dry_run_of_a_search_says_what_is_tried(tmp_path, monkeypatch, capsys):
    command_lines.inputs(tmp_path)
    for folder in ("model", "teacher"):
        shutil.rmtree(tmp_path / folder)
        command_lines.checkpoint(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    command = [*command_lines.COMPRESS.split(), "--output", "out", "--dry-run", "--max-candidates", "5"]
    assert command_lines.script_of("compress").main([*command, "--target-params", "70%"]) == 0
    assert "params at most 70%, the best of up to 5 candidates by held-out loss" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command_lines.script_of("compress").main([*command, "--target-params", "most"])
    assert "target_params most is not a valid parameter budget; use a fraction" in capsys.readouterr().err


def test_comparing_two_runs(tmp_path, capsys):
    from test_code.report import test_report as reports

    content = reports.summary.build(reports._records(), "t", job_settings.Job("t", "a", "b"))
    compress = command_lines.script_of("compress")
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
    assert "there is no report.json" in capsys.readouterr().err

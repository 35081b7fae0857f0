"""What a family of models cannot do is an error of the commands before NeMo is imported."""

from __future__ import annotations

import shutil

import pytest

from nemo_modelopt_dropin.preflight import families
from test_code.support import command_lines

LATENT = {"multi_latent_attention": True}
HEADS = {"mtp_num_layers": 1}
PTQ = "-nc model -calib_ds text.jsonl --cpu --disable_kv_cache -out out"
NORMS = {
    "_target_": "nemo.collections.llm.gpt.model.nemotron.Nemotron3Config4B",
    "layernorm_zero_centered_gamma": False,
}
# The routing of DeepSeek-V2.
GROUPS = {
    "_target_": "nemo.collections.llm.gpt.model.deepseek.DeepSeekConfig",
    "multi_latent_attention": True,
    "moe_router_topk": 6,
    "moe_router_num_groups": 8,
    "moe_router_group_topk": 3,
}
REMOTE = {"_target_": "nemo.collections.llm.gpt.model.baichuan.Baichuan2Config7B"}
COMPRESS = command_lines.COMPRESSION + " --target-num-layers 1 --formats hf"


@pytest.mark.parametrize(
    ("script", "command", "changed", "message"),
    [
        ("ptq", f"{PTQ} -algo int8_sq --export_format hf", LATENT, families.LATENT_SCALES.reason),
        ("ptq", f"{PTQ} -algo int4_awq -awq_bs 32 --export_format nemo", LATENT, None),
        ("ptq", f"{PTQ} -algo fp8 --export_format hf", LATENT, None),
        ("ptq", f"{PTQ} -algo fp8 --export_format hf", HEADS, "no multi-token-prediction block (mtp_num_layers=1)"),
        ("ptq", f"{PTQ} -algo no_quant --export_format hf", HEADS, "no multi-token-prediction block"),
        ("ptq", f"{PTQ} -algo fp8 --export_format hf", NORMS, families.PLAIN_NORMS.reason),
        ("ptq", f"{PTQ} -algo no_quant --export_format hf", GROUPS, "choose other experts: to choose 3 of 8 groups"),
        ("ptq", f"{PTQ} -algo fp8 --export_format nemo", GROUPS, None),
        ("ptq", f"{PTQ} -algo fp8 --export_format hf", GROUPS | {"moe_router_topk": 3}, None),
        ("ptq", f"{PTQ} -algo fp8 --export_format hf", REMOTE, "transformers has no class for this family"),
        ("compress", f"{COMPRESS} --algorithm int8_sq", LATENT, "quantization: int8_sq cannot be exported as hf: "),
        ("compress", f"{COMPRESS} --algorithm fp8", HEADS, "no multi-token-prediction block"),
        ("prune", command_lines.IMPORTANCE, HEADS, "--target_ffn_hidden_size: modelopt does not prune the multi-token"),
        (
            "prune",
            command_lines.IMPORTANCE.replace("ffn_", ""),
            LATENT,
            "cannot be pruned in a model with multi-latent",
        ),
    ],
)
def test_families_are_checked_before_nemo_is_loaded(tmp_path, monkeypatch, capsys, script, command, changed, message):
    command_lines.inputs(tmp_path)
    shutil.rmtree(tmp_path / "model")
    command_lines.checkpoint(tmp_path / "model", **changed)
    monkeypatch.chdir(tmp_path)
    if message is None:
        command_lines.script_of(script).resolve(command.split())
        return
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of(script).resolve(command.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("script", ["ptq", "prune"])
def test_other_kinds_of_models_are_not_supported(tmp_path, monkeypatch, capsys, script):
    command_lines.inputs(tmp_path)
    shutil.rmtree(tmp_path / "model")
    path = tmp_path / "model" / "context" / "model.yaml"
    command_lines.checkpoint(tmp_path / "model")
    path.write_text(path.read_text().replace("gpt.model.llama.LlamaModel", "t5.model.t5.T5Model"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of(script).resolve((PTQ if script == "ptq" else command_lines.IMPORTANCE).split())
    assert "a T5Model is not supported: modelopt converts NeMo's GPT and Mamba models" in capsys.readouterr().err

"""Every flag of NeMo's own scripts is a flag of ours, with its aliases, its default and its choices.

The rows were read off ``scripts/llm/ptq.py``, ``gpt_prune.py`` and ``gpt_train.py`` of NeMo at the commit that is named
below; the branches of 2.5 have the same. A default in brackets is ours where it differs on purpose.
"""

from __future__ import annotations

import pytest

from test_code.support.command_lines import script_of

COMMIT = "8cfedd7203"
REQUIRED = "required"
# NeMo's 1 device and 1 node are what torchrun or the layout says, if they say something.
BY_LAYOUT = (None, "torchrun's, or as many as the layout needs")
STAGES = [(("--num_layers_in_first_pipeline_stage",), None), (("--num_layers_in_last_pipeline_stage",), None)]

FLAGS = {
    "ptq": [
        # NeMo does not demand it, and fails without.
        (("-nc", "--nemo_checkpoint"), REQUIRED),
        (("--tokenizer",), None),
        (("--decoder_type",), None),
        (("-ctp", "--calibration_tp", "--calib_tp"), 1),
        (("-cpp", "--calibration_pp", "--calib_pp"), 1),
        *STAGES,
        (("-itp", "--inference_tp", "--tensor_parallelism_size"), 1),
        (("-ipp", "--inference_pp", "--pipeline_parallelism_size"), 1),
        (("--devices",), None),
        (("-nodes", "--num_nodes"), None),
        (("-out", "--export_path", "--output_path"), None),
        (("--export_format",), "trtllm"),
        (("-algo", "--algorithm"), "fp8"),
        (("-awq_bs", "--awq_block_size"), 128),
        (("--sq_alpha",), 0.5),
        (("--enable_kv_cache",), None),
        (("--disable_kv_cache",), None),
        (("--kv_cache_qformat",), "fp8"),
        (("-dt", "--dtype"), "bf16"),
        (("-bs", "--batch_size"), 64),
        (("-sl", "--seq_len"), 128),
        (("-calib_size", "--calibration_dataset_size"), 512),
        (("-calib_ds", "--calibration_dataset"), "cnn_dailymail"),
        (("--generate_sample",), False),
        (("--trust_remote_code",), False),
        (("--legacy_ckpt",), False),
    ],
    "prune": [
        (("--devices",), BY_LAYOUT),
        (("--num_nodes",), BY_LAYOUT),
        (("--tp_size",), 1),
        (("--pp_size",), 1),
        *STAGES,
        (("--seq_length",), None),
        (("--restore_path",), REQUIRED),
        (("--legacy_ckpt",), False),
        (("--save_path",), REQUIRED),
        (("--tokenizer",), None),
        (("--data_paths",), None),
        (("--split",), "99,1,0"),
        (("--index_mapping_dir",), None),
        (("--mbs",), 1),
        (("--num_train_samples",), 1024),
        (("--target_ffn_hidden_size",), None),
        (("--target_hidden_size",), None),
        (("--target_num_attention_heads",), None),
        (("--target_num_query_groups",), None),
        (("--target_num_layers",), None),
        (("--target_mamba_num_heads",), None),
        (("--target_mamba_head_dim",), None),
        (("--drop_layers",), None),
    ],
    "distill": [
        (("--name",), REQUIRED),
        (("--model_path",), REQUIRED),
        (("--teacher_path",), None),
        (("--kd_config",), None),
        (("--tp_size",), 1),
        (("--cp_size",), 1),
        (("--pp_size",), 1),
        (("--ep_size",), 1),
        (("--precision",), (None, "bf16-mixed, or 32 with --cpu")),
        (("--devices",), BY_LAYOUT),
        (("--num_nodes",), BY_LAYOUT),
        (("--log_dir",), REQUIRED),
        (("--max_steps",), REQUIRED),
        (("--gbs",), REQUIRED),
        (("--mbs",), REQUIRED),
        (("--data_paths",), None),
        (("--split",), "99,1,0"),
        (("--index_mapping_dir",), None),
        (("--use-chat-data",), False),
        (("--chat-template-path",), None),
        (("--use_mock_data",), False),
        (("--seq_length",), REQUIRED),
        (("--tokenizer",), None),
        (("--lr",), 1e-4),
        (("--min_lr",), 1e-5),
        (("--warmup_steps",), 50),
        (("--val_check_interval",), 100),
        (("--limit_val_batches",), 32),
        (("--log_interval",), 10),
        (("--legacy_ckpt",), False),
    ],
}
CHOICES = {
    ("ptq", "--export_format"): {"trtllm", "nemo", "hf"},
    ("ptq", "--dtype"): {"16", "bf16"},
    ("ptq", "--kv_cache_qformat"): {"fp8", "nvfp4"},
}
ALGORITHMS = ("no_quant", "int8", "int8_sq", "fp8", "block_fp8", "int4_awq", "w4a8_awq", "int4", "nvfp4")
ALGORITHMS += ("fp8_pc_pt", "fp8_wo", "int8_wo", "mxfp8", "nvfp4_awq", "w4a16_nvfp4", "gptq")
ROWS = [
    pytest.param(script, names, default, id=f"{script}{names[-1]}")
    for script, rows in FLAGS.items()
    for names, default in rows
]


def known_flags(script):
    return {name: action for action in script_of(script).parser()._actions for name in action.option_strings}


@pytest.mark.parametrize("script, names, default", ROWS)
def test_flag(script, names, default):
    known = known_flags(script)
    assert set(names) <= known.keys()
    action = known[names[0]]
    assert all(known[name] is action for name in names), "aliases mean the same"
    assert action.required is (default == REQUIRED)
    if default == REQUIRED:
        return
    parser = script_of(script).parser()
    needed = [action.option_strings[0] for action in parser._actions if action.required]
    parsed = parser.parse_args([word for flag in needed for word in (flag, "1")])
    expected = default[0] if isinstance(default, tuple) else default
    assert getattr(parsed, action.dest) == expected


@pytest.mark.parametrize(("script", "flag"), CHOICES)
def test_choices(script, flag):
    assert set(known_flags(script)[flag].choices) == CHOICES[script, flag]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithm(name):
    assert script_of("ptq").algorithm(name) == name


@pytest.mark.parametrize("flag, expected", [("--enable_kv_cache", True), ("--disable_kv_cache", False)])
def test_kv_cache_switches(flag, expected):
    assert script_of("ptq").parser().parse_args(["-nc", "x", flag]).enable_kv_cache is expected


def test_the_losses_by_either_name():
    required = {"--name": "n", "--model_path": "m", "--log_dir": "l", "--max_steps": "1", "--gbs": "1", "--mbs": "1"}
    words = [word for pair in {**required, "--seq_length": "8"}.items() for word in pair]
    for flag in ("--kd_config", "--distillation_config"):
        assert script_of("distill").parser().parse_args([*words, flag, "kd.yaml"]).distillation_config == "kd.yaml"

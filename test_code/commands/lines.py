"""List command lines: those of the documentation, lines that set every flag, wrong lines, and small real runs."""

from __future__ import annotations

SCRIPTS = ("ptq", "prune", "distill", "compress", "demo")

_TEXTS = "--teacher my_checkpoint --train-text texts.jsonl --heldout-text heldout.jsonl"
_DISTILL = "--model_path my_checkpoint --teacher_path my_checkpoint --seq_length 64 --gbs 4 --mbs 2"
_PRUNE = "--restore_path my_checkpoint --text texts.jsonl --seq_length 64 --num_train_samples 32"

# The command lines of README.md and docs/. Their plans (--dry-run) and their settings are compared.
DOCUMENTED = {
    "ptq": [
        "--cpu -nc my_checkpoint -algo fp8 -calib_ds texts.jsonl --export_format nemo -out my_fp8",
        "--cpu -nc my_checkpoint -algo int8 -calib_ds texts.jsonl --calibration_dataset_size 64 --export_format hf "
        "-out my_int8_hf",
        "--cpu -nc my_checkpoint -algo auto --auto_quantize_bits 10 --auto_quantize_formats int8,fp8 "
        "-calib_ds texts.jsonl --calibration_dataset_size 32 --batch_size 8 --export_format nemo -out my_mixed",
        "--cpu -nc my_checkpoint -algo no_quant --export_format hf -out student_hf",
        "-nc my_checkpoint -algo fp8 -ctp 4 -calib_ds texts.jsonl -out 8b_fp8",
    ],
    "prune": [
        f"--cpu {_PRUNE} --save_path pruned --target_ffn_hidden_size 96 --target_num_layers 1",
        f"--cpu {_PRUNE} --save_path my_pruned --mbs 4 --target_ffn_hidden_size 96 --target_num_layers 3",
        f"--cpu {_PRUNE} --save_path my_small --mbs 4 --target_params 70% --max_candidates 4 --heldout_batches 4",
    ],
    "distill": [
        f"--cpu --name my_run --log_dir my_logs {_DISTILL} --text texts.jsonl --heldout_text heldout.jsonl "
        "--max_steps 4 --lr 1e-4 --val_check_interval 4 --limit_val_batches 2",
        f"--cpu --name with_pairs --log_dir my_logs {_DISTILL} --distillation_config losses.yaml --text texts.jsonl "
        "--heldout_text heldout.jsonl --max_steps 2 --val_check_interval 2 --limit_val_batches 2",
        f"--cpu --name recorded --log_dir my_logs {_DISTILL} --text texts.jsonl --max_steps 2 "
        "--dump-teacher-topk my_topk",
        "--name kd --log_dir runs --model_path my_checkpoint --teacher_path my_checkpoint --tp_size 4 "
        "--text texts.jsonl --seq_length 8192 --max_steps 10000 --gbs 256 --mbs 1",
    ],
    "compress": [
        f"--cpu {_TEXTS} --output runs/mine --target-ffn-hidden-size 96",
        f"--cpu {_TEXTS} --output runs/mine --target-ffn-hidden-size 96 --seq-length 64 --prune-samples 32 "
        "--prune-batch-size 4 --distill-steps 4 --distill-global-batch-size 4 --distill-micro-batch-size 2 "
        "--distill-evaluate-every 2 --distill-save-every 2 --distill-warmup-steps 1 --calibration-size 32 "
        "--calibration-batch-size 8",
        f"--cpu {_TEXTS} --output runs/small --fit-disk 0.6x --fit-candidates 2 --awq-block-size 32 --seq-length 64 "
        "--prune-samples 32 --prune-batch-size 4 --heldout-batches 2 --distill-steps 4 "
        "--distill-global-batch-size 4 --distill-micro-batch-size 2 --distill-warmup-steps 1 --calibration-size 32 "
        "--calibration-batch-size 8",
    ],
    "demo": [""],
}

# Together with the documented lines, these set every flag.
COMPLETE = {
    "ptq": [
        "-nc my_checkpoint --tokenizer my_tokenizer --decoder_type llama --legacy_ckpt --trust_remote_code "
        "-ctp 2 -cpp 2 --num_layers_in_first_pipeline_stage 1 --num_layers_in_last_pipeline_stage 3 --devices 4 "
        "-nodes 1 --cpu -algo int4_awq -awq_bs 32 --sq_alpha 0.3 --enable_kv_cache --kv_cache_qformat nvfp4 -dt 16 "
        "-bs 2 -sl 32 -calib_size 8 -calib_ds texts.jsonl --calibration_column text --sensitivity_scan "
        "--calibration_shuffle_seed 3 -out out --export_format hf -itp 2 -ipp 2 --report_path my_report "
        "--generate_sample --verify files --hf-layout modelopt --max-shard-size 500MB --calibration_state my_state",
        "-nc my_checkpoint -algo auto --auto_quantize_bits 6 --auto_quantize_checkpoint search --disable_kv_cache "
        "--no_report --no_calibration_state",
    ],
    "prune": [
        f"{_PRUNE} --save_path out --tokenizer my_tokenizer --legacy_ckpt --devices 4 --num_nodes 1 --tp_size 2 "
        "--pp_size 2 --num_layers_in_first_pipeline_stage 1 --num_layers_in_last_pipeline_stage 3 --cpu "
        "--heldout_text heldout.jsonl --scores_path my_scores --split 90,5,5 --index_mapping_dir index --mbs 2 "
        "--target_hidden_size 32 --target_num_attention_heads 2 --target_num_query_groups 2 "
        "--target_ffn_hidden_size 0.5 --max_candidates 3 --heldout_batches 2 --report_path my_report",
        "--restore_path my_checkpoint --save_path out --drop_layers 2 3 --no_report --cpu",
        "--restore_path my_checkpoint --save_path out --data_paths 1.0 my_corpus --seq_length 64 --cpu "
        "--target_num_layers 2",
        "--restore_path my_experts --save_path out --text texts.jsonl --seq_length 64 --cpu "
        "--target_num_moe_experts 2 --target_moe_ffn_hidden_size 16 --target_active_params 80%",
        "--restore_path my_hybrid --save_path out --text texts.jsonl --seq_length 64 --cpu "
        "--target_mamba_num_heads 2 --target_mamba_head_dim 4 --target_moe_shared_expert_intermediate_size 16",
    ],
    "distill": [
        f"--name n --log_dir logs {_DISTILL} --distillation_config losses.yaml --tokenizer my_tokenizer "
        "--legacy_ckpt --tp_size 2 --cp_size 1 --pp_size 2 --ep_size 1 --devices 4 --num_nodes 1 --precision 32 --cpu "
        "--text texts.jsonl --heldout_text heldout.jsonl --split 90,5,5 --index_mapping_dir index --max_steps 8 "
        "--lr 1e-5 --min_lr 1e-6 --warmup_steps 2 --val_check_interval 4 --save_minutes 0 --limit_val_batches 2 "
        "--log_interval 2",
        f"--name n --log_dir logs {_DISTILL} --max_steps 8 --use_mock_data --cpu",
        f"--name n --log_dir logs {_DISTILL} --max_steps 8 --data_paths 1.0 my_corpus --cpu",
        f"--name n --log_dir logs {_DISTILL} --max_steps 8 --data_paths my_chats --use-chat-data "
        "--chat-template-path template.jinja --tokenizer my_tokenizer",
        f"--name n --log_dir logs {_DISTILL} --max_steps 8 --text texts.jsonl --teacher-topk old_topk --cpu",
        f"--name n --log_dir logs {_DISTILL} --max_steps 8 --text my_chats/training.jsonl --answer_only_loss "
        "--packed_sequence_size 128 --mbs 1 --tokenizer my_tokenizer --chat-template-path template.jinja --cpu",
    ],
    "compress": [
        f"{_TEXTS} --output out --seq-length 64 --scratch --devices 4 --num-nodes 1 --tp 2 --pp 2 --cpu "
        "--target-ffn-hidden-size 64 --target-hidden-size 32 --target-num-attention-heads 2 "
        "--target-num-query-groups 2 --target-num-layers 2 --prune-samples 8 --prune-batch-size 2 "
        "--distill-config losses.yaml --distill-steps 6 --distill-global-batch-size 8 --distill-micro-batch-size 2 "
        "--distill-lr 1e-3 --distill-min-lr 1e-6 --distill-warmup-steps 1 --distill-weight-decay 0.2 "
        "--distill-seed 5 --distill-evaluate-every 3 --distill-save-every 2 --algorithm int4_awq --formats nemo hf "
        "--verify files --enable-kv-cache --awq-block-size 16 --calibration-size 4 --calibration-batch-size 2 "
        "--calibration-seq-len 32 --hf-layout modelopt --max-shard-size 500MB",
        f"{_TEXTS} --output out --target-params 70% --max-candidates 3 --heldout-batches 2",
        f"{_TEXTS} --output out --drop-layers 2 3",
        # The program false stands for an interpreter without lm-eval: the plan ends with an error everywhere.
        f"{_TEXTS} --output out --target-num-layers 2 --evaluate arc_easy,mmlu --evaluate-models teacher distilled "
        "--evaluate-limit 5 --evaluate-fewshot 2 --evaluate-batch-size 4 --evaluate-backend vllm "
        "--evaluate-chat-template --evaluate-model-args dtype=float32 --evaluate-python false",
        f"{_TEXTS} --output out --fit-disk 0.9x --fit-memory 0.9x --fit-latency 0.9x --context 128 --batch 2 "
        "--fit-device l4 --fit-formats fp8 int8_wo --fit-minutes 5 --fit-candidates 2 --fit-recovery 0.7 --fit-point 1",
        f"{_TEXTS} --output out --algorithm fp8 --attention-algorithm no_quant --target-num-moe-experts 2 "
        "--target-moe-ffn-hidden-size 64",
    ],
    "demo": ["--output out --devices 1 --algorithm int8 --steps-scale 0.5 --fresh"],
}

# Each of these exits with the recorded code before NeMo is imported.
WRONG = {
    "ptq": [
        "",
        "-nc nowhere -algo fp8",
        "-nc my_checkpoint -algo fp9",
        "-nc my_checkpoint -algo auto",
        "-nc my_checkpoint -calib_ds nowhere.jsonl --export_format nemo",
        "-nc my_checkpoint -calib_ds texts.jsonl --export_format gguf",
        "-nc my_checkpoint -calib_ds texts.jsonl -ctp 2 --devices 3",
        "-nc my_checkpoint -calib_ds texts.jsonl -bs many",
    ],
    "prune": [
        "",
        f"{_PRUNE} --save_path out",
        f"{_PRUNE} --save_path out --target_num_layers 1 --drop_layers 2",
        f"{_PRUNE} --save_path out --target_hiden_size 32",
        f"{_PRUNE} --save_path my_checkpoint --target_num_layers 1",
    ],
    "distill": [
        "",
        f"--name n --log_dir logs {_DISTILL} --max_steps 2",
        f"--name n --log_dir logs {_DISTILL} --max_steps 2 --text nowhere.jsonl",
        f"--name n --log_dir logs {_DISTILL} --max_steps 2 --text texts.jsonl --precision 8",
    ],
    "compress": [
        "",
        _TEXTS,
        f"{_TEXTS} --target-num-layers 2 --algorithm fp9",
        f"{_TEXTS} --target-num-layers 2 --redo polish",
        "--compare runs/one runs/two",
        "--config nowhere.yaml",
    ],
    "demo": ["--algorithm fp88", "--devices 3", "--steps 3"],
}

# Small real runs on one CPU rank, by name: the script and its command line.
RUNS = {
    "ptq to nemo": "ptq --cpu -nc my_checkpoint -algo fp8 -calib_ds texts.jsonl -calib_size 8 -bs 4 -sl 32 "
    "--export_format nemo -out my_fp8",
    "ptq to hf": "ptq --cpu -nc my_checkpoint -algo int8 -calib_ds texts.jsonl -calib_size 8 -bs 4 -sl 32 "
    "--export_format hf -out my_int8_hf",
    "prune": "prune --cpu --restore_path my_checkpoint --save_path my_pruned --text texts.jsonl --seq_length 32 "
    "--num_train_samples 4 --mbs 2 --target_ffn_hidden_size 64 --target_num_layers 3 --scores_path my_scores",
    "record a teacher": f"distill --cpu --name recorded --log_dir my_logs {_DISTILL} --text texts.jsonl --max_steps 2 "
    "--dump-teacher-topk my_topk",
    "distill": f"distill --cpu --name my_run --log_dir my_logs {_DISTILL} --text texts.jsonl "
    "--heldout_text heldout.jsonl --max_steps 2 --lr 1e-4 --val_check_interval 2 --limit_val_batches 2",
}
# Whole jobs by script. They take minutes, and each runs in a process of its own.
WHOLE_JOBS = {
    "compress": f"--cpu {_TEXTS} --output runs/mine --target-ffn-hidden-size 64 --seq-length 32 --prune-samples 4 "
    "--prune-batch-size 2 --distill-steps 2 --distill-global-batch-size 4 --distill-micro-batch-size 2 "
    "--distill-warmup-steps 1 --distill-evaluate-every 1 --distill-save-every 1 --formats nemo hf "
    "--calibration-size 4 --calibration-batch-size 2 --calibration-seq-len 32",
    "demo": "--output runs/demo --devices 1 --steps-scale 0.01",
}

# Options that control how a command runs and are no settings; other tests cover what they do.
NO_SETTINGS = {"--help -h", "--verbose -v", "--config", "--dry-run", "--redo", "--compare"}


def accepted(script: str) -> list[str]:
    """Return the lines that a script accepts."""
    return DOCUMENTED[script] + COMPLETE[script]

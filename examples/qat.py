"""Quantize a NeMo checkpoint, then continue training it with its quantizers (QAT)."""

import torch

if not torch.cuda.is_available():
    from nemo_modelopt_dropin import cpu_backend

    cpu_backend.enable()

from megatron.core.optimizer import OptimizerConfig

from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.llm.modelopt import ExportConfig, QuantizationConfig
from nemo_modelopt_cli.tokens import TextDataModule

STEPS = 4
ON_GPU = torch.cuda.is_available()

if __name__ == "__main__":  # saving a checkpoint starts processes
    llm.ptq(
        model_path="my_checkpoint",
        export_config=ExportConfig(path="my_quantized", export_format="nemo"),
        quantization_config=QuantizationConfig(
            algorithm="int4_awq", calibration_dataset="texts.jsonl", awq_block_size=32
        ),
    )
    data = TextDataModule(
        "texts.jsonl",
        "my_checkpoint",
        "heldout.jsonl",
        train_samples=STEPS * 4,
        seq_length=64,
        micro_batch_size=2,
        global_batch_size=4,
    )
    llm.train(
        model="my_quantized",
        data=data,
        trainer=nl.Trainer(
            accelerator="gpu" if ON_GPU else "cpu",
            devices=1,
            max_steps=STEPS,
            limit_val_batches=2,
            val_check_interval=STEPS,
            strategy=nl.MegatronStrategy(ckpt_async_save=False),
            plugins=nl.MegatronMixedPrecision("bf16-mixed") if ON_GPU else None,
        ),
        optim=nl.MegatronOptimizerModule(OptimizerConfig(optimizer="adam", lr=1e-4, bf16=ON_GPU)),
        log=nl.NeMoLogger(name="qat", log_dir="my_runs", use_datetime_version=False),
        resume=nl.AutoResume(restore_config=nl.RestoreConfig(path="my_quantized"), resume_if_exists=True),
        tokenizer="data",
    )

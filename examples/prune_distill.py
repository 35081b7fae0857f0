"""Prune a NeMo checkpoint to half of its MLPs and three quarters of its layers, then distill it from the original."""

import torch

if not torch.cuda.is_available():
    from nemo_modelopt_dropin import cpu_backend

    cpu_backend.enable()

from megatron.core.optimizer import OptimizerConfig

from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.llm.modelopt import PruningConfig
from nemo_modelopt_cli.tokens import TextDataModule

STEPS, SEQ_LENGTH = 4, 64
ON_GPU = torch.cuda.is_available()


def data(samples: int) -> TextDataModule:
    """Return the texts as token sequences; any of NeMo's data modules works too."""
    return TextDataModule(
        "texts.jsonl",
        "my_checkpoint",
        "heldout.jsonl",
        train_samples=samples,
        seq_length=SEQ_LENGTH,
        micro_batch_size=4,  # llm.prune needs equal micro and global batch sizes, and a process has one setting
        global_batch_size=4,
    )


if __name__ == "__main__":  # saving a checkpoint starts processes
    llm.prune(
        nemo_checkpoint="my_checkpoint",
        save_path="my_student",
        pruning_config=PruningConfig(target_ffn_hidden_size=0.5, target_num_layers=0.75),
        data=data(32),
        num_train_samples=32,
    )
    llm.distill(
        student_model_path="my_student",
        teacher_model_path="my_checkpoint",
        data=data(STEPS * 4),
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
        log=nl.NeMoLogger(name="distilled", log_dir="my_runs", use_datetime_version=False),
        resume=nl.AutoResume(restore_config=nl.RestoreConfig(path="my_student"), resume_if_exists=True),
    )

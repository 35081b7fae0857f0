"""Recipe that distils any GPT checkpoint into a smaller one."""

from typing import Optional

import nemo_run as run
import torch
from lightning.pytorch.callbacks.callback import Callback
from megatron.core.distributed import DistributedDataParallelConfig
from nemo.collections.llm.recipes.log.default import default_log, default_resume, tensorboard_logger
from nemo.collections.llm.recipes.optim.adam import distributed_fused_adam_with_cosine_annealing
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_mixed

from nemo import lightning as nl
from nemo.collections import llm

NAME = "default"


def trainer(
    tensor_parallelism: int = 8,
    pipeline_parallelism: int = 1,
    pipeline_parallelism_type: Optional[torch.dtype] = None,  # noqa: UP045  NeMo-Run's command line supports Optional
    virtual_pipeline_parallelism: Optional[int] = None,  # noqa: UP045
    context_parallelism: int = 1,
    sequence_parallelism: bool = True,
    num_nodes: int = 1,
    num_gpus_per_node: int = 8,
    max_steps: int = 1168251,
    callbacks: Optional[list[run.Config[Callback]]] = None,  # noqa: UP045
) -> run.Config[nl.Trainer]:
    """Return the trainer's configuration: bf16, Megatron DDP with overlapped collectives, no model in particular.

    Args:
        tensor_parallelism: ranks that share each layer.
        pipeline_parallelism: stages that share the layers.
        pipeline_parallelism_type: dtype of what the stages send.
        virtual_pipeline_parallelism: chunks of each stage; distillation needs None.
        context_parallelism: ranks that share each sequence.
        sequence_parallelism: split activations along the sequence over the tensor-parallel ranks, if there are any.
        num_nodes: nodes.
        num_gpus_per_node: GPUs of each node.
        max_steps: training steps.
        callbacks: further callbacks.
    """
    ddp = run.Config(
        DistributedDataParallelConfig,
        **dict.fromkeys(
            (
                "average_in_collective",
                "check_for_nan_in_grad",
                "grad_reduce_in_fp32",
                "overlap_grad_reduce",
                "overlap_param_gather",
            ),
            True,
        ),
    )
    strategy = run.Config(
        nl.MegatronStrategy,
        ddp=ddp,
        pipeline_dtype=pipeline_parallelism_type,
        ckpt_parallel_load=True,
        ckpt_async_save=True,
        gradient_as_bucket_view=True,
    )
    strategy.tensor_model_parallel_size = tensor_parallelism
    strategy.pipeline_model_parallel_size = pipeline_parallelism
    strategy.virtual_pipeline_model_parallel_size = virtual_pipeline_parallelism
    strategy.context_parallel_size = context_parallelism
    strategy.sequence_parallel = sequence_parallelism and tensor_parallelism > 1
    return run.Config(
        nl.Trainer,
        strategy=strategy,
        plugins=bf16_mixed(),
        callbacks=callbacks,
        devices=num_gpus_per_node,
        num_nodes=num_nodes,
        accelerator="gpu",
        max_steps=max_steps,
        val_check_interval=2000,
        limit_val_batches=32,
        limit_test_batches=50,
        log_every_n_steps=10,
        accumulate_grad_batches=1,
        use_distributed_sampler=False,
    )


@run.cli.factory(target=llm.distill, name=NAME)
def distillation_recipe(
    student_model_path: str,
    teacher_model_path: str,
    distillation_config_path: Optional[str] = None,  # noqa: UP045
    dir: Optional[str] = None,  # noqa: UP045
    name: str = "default",
    num_nodes: int = 1,
    num_gpus_per_node: int = 8,
) -> run.Partial:
    """Return ``llm.distill`` with mock data, Adam and TensorBoard: set the data before running it.

    Args:
        student_model_path: NeMo checkpoint that training starts from.
        teacher_model_path: NeMo checkpoint of the teacher.
        distillation_config_path: YAML file with a ``DistillationConfig``; the logits alone by default.
        dir: folder of logs and checkpoints.
        name: name of the run.
        num_nodes: nodes.
        num_gpus_per_node: GPUs of each node.

    Examples:
        >>> recipe = distillation_recipe(student_model_path="/models/4b", teacher_model_path="/models/8b")
        >>> recipe.data = run.Config(llm.PreTrainingDataModule, paths=["/data/text"], seq_length=8192)
        >>> recipe.trainer.strategy.tensor_model_parallel_size = 4
        >>> run.run(recipe)
    """
    return run.Partial(
        llm.distill,
        student_model_path=student_model_path,
        teacher_model_path=teacher_model_path,
        distillation_config_path=distillation_config_path,
        data=run.Config(llm.MockDataModule, seq_length=8192, global_batch_size=512, micro_batch_size=1),
        trainer=trainer(num_nodes=num_nodes, num_gpus_per_node=num_gpus_per_node),
        optim=distributed_fused_adam_with_cosine_annealing(max_lr=3e-5),
        log=default_log(dir=dir, name=name, tensorboard_logger=tensorboard_logger(name=name)),
        resume=default_resume(),
    )

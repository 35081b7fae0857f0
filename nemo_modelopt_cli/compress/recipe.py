"""NeMo-Run recipe of the whole job: prune, distill, quantize, export, report."""

import nemo_run as run

from nemo_modelopt_cli.compress import api
from nemo_modelopt_cli.compress.settings import Evaluation, Job, Layout, Pruning, Quantization, Training

NAME = "default"


@run.cli.factory(target=api.compress, name=NAME)
def compress_recipe(
    teacher: str,
    train_text: str,
    heldout_text: str,
    output: str,
    num_nodes: int = 1,
    num_gpus_per_node: int = 8,
    tensor_parallelism: int = 1,
    pipeline_parallelism: int = 1,
) -> run.Partial:
    """Return the job of ``nemo-modelopt compress``; set a pruning target before you run it.

    Args:
        teacher: NeMo checkpoint to compress.
        train_text: file of texts to distill and calibrate on.
        heldout_text: file of texts to measure on.
        output: folder of the run; the same job resumes there after an interruption.
        num_nodes: nodes.
        num_gpus_per_node: GPUs, or CPU ranks, on each node; the executor must start as many tasks there.
        tensor_parallelism: ranks that share each layer; 1 unless layers are dropped by number.
        pipeline_parallelism: pipeline stages.

    Examples:
        >>> recipe = compress_recipe("/models/8b", "/data/train.jsonl", "/data/heldout.jsonl", "/runs/4b")
        >>> recipe.job.pruning.target_ffn_hidden_size = 9216
        >>> recipe.job.distillation.steps = 2000
        >>> run.run(recipe, executor=run.LocalExecutor(launcher="torchrun", ntasks_per_node=8))
    """
    layout = run.Config(
        Layout, devices=num_gpus_per_node, num_nodes=num_nodes, tp=tensor_parallelism, pp=pipeline_parallelism
    )
    job = run.Config(
        Job,
        teacher=teacher,
        train_text=train_text,
        heldout_text=heldout_text,
        layout=layout,
        pruning=run.Config(Pruning),
        distillation=run.Config(Training),
        quantization=run.Config(Quantization),
        evaluation=run.Config(Evaluation),
    )
    return run.Partial(api.compress, job=job, output=output)

"""NeMo-Run recipe of the whole job: prune, distill, quantize, export, report."""

import nemo_run as run

from nemo_modelopt_cli.compress import api
from nemo_modelopt_cli.compress.fit_settings import Fit
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
    fit_disk: str | None = None,
    fit_memory: str | None = None,
    fit_latency: str | None = None,
    fit_device: str = Fit.device,
    context: int = Fit.context,
    batch: int = Fit.batch,
) -> run.Partial:
    """Return the job of ``nemo-modelopt compress``; set a budget, or a pruning target before you run it.

    Args:
        teacher: NeMo checkpoint to compress.
        train_text: file of texts to distill and calibrate on.
        heldout_text: file of texts to measure on.
        output: folder of the run; the same job resumes there after an interruption.
        num_nodes: nodes.
        num_gpus_per_node: GPUs, or CPU ranks, on each node; the executor must start as many tasks there.
        tensor_parallelism: ranks that share each layer; 1 unless layers are dropped by number.
        pipeline_parallelism: pipeline stages.
        fit_disk: most bytes of the Hugging Face folder, such as "600MB" or "0.5x"; sizes and formats are searched.
        fit_memory: most memory to serve ``batch`` sequences of ``context`` tokens.
        fit_latency: longest time per token on ``fit_device``.
        fit_device: a device of the table, or its numbers.
        context: tokens of a served sequence.
        batch: sequences that are served at a time.

    Examples:
        >>> recipe = compress_recipe("/models/8b", "/data/train.jsonl", "/data/heldout.jsonl", "/runs/4b")
        >>> recipe.job.pruning.target_ffn_hidden_size = 9216
        >>> recipe.job.distillation.steps = 2000
        >>> run.run(recipe, executor=run.LocalExecutor(launcher="torchrun", ntasks_per_node=8))
    """
    layout = run.Config(
        Layout, devices=num_gpus_per_node, num_nodes=num_nodes, tp=tensor_parallelism, pp=pipeline_parallelism
    )
    fit = run.Config(
        Fit, disk=fit_disk, memory=fit_memory, latency=fit_latency, device=fit_device, context=context, batch=batch
    )
    # Budgets are those of Hugging Face files.
    formats = {"formats": ("hf",)} if any((fit_disk, fit_memory, fit_latency)) else {}
    job = run.Config(
        Job,
        teacher=teacher,
        train_text=train_text,
        heldout_text=heldout_text,
        layout=layout,
        pruning=run.Config(Pruning),
        distillation=run.Config(Training),
        quantization=run.Config(Quantization, **formats),
        fit=fit,
        evaluation=run.Config(Evaluation),
    )
    return run.Partial(api.compress, job=job, output=output)

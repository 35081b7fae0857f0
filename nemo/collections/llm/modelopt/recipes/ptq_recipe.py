"""Recipe that quantizes any checkpoint after training."""

from typing import Optional

import nemo_run as run

from nemo.collections import llm

from .. import ExportConfig, QuantizationConfig

NAME = "default"


@run.cli.factory(target=llm.ptq, name=NAME)
def ptq_recipe(
    model_path: str,
    export_path: str,
    algorithm: str = "fp8",
    export_format: str = "nemo",
    calibration_dataset: str = "cnn_dailymail",
    tensor_parallelism: int = 1,
    pipeline_parallelism: int = 1,
    num_nodes: int = 1,
    tokenizer_path: Optional[str] = None,  # noqa: UP045  NeMo-Run's command line supports Optional
) -> run.Partial:
    """Return ``llm.ptq`` for a checkpoint: calibration and export open to change before it runs.

    Args:
        model_path: NeMo checkpoint, or a Hugging Face folder, to quantize.
        export_path: where the quantized checkpoint goes.
        algorithm: as `QuantizationConfig` has it.
        export_format: nemo, hf or trtllm.
        calibration_dataset: as `QuantizationConfig` has it.
        tensor_parallelism: ranks that share each layer.
        pipeline_parallelism: stages that share the layers.
        num_nodes: nodes.
        tokenizer_path: tokenizer in place of the checkpoint's.

    Examples:
        >>> recipe = ptq_recipe("/models/llama-8b", "/models/llama-8b-fp8", export_format="hf", tensor_parallelism=2)
        >>> recipe.quantization_config.calibration_dataset_size = 1024
        >>> run.run(recipe, executor=run.LocalExecutor(launcher="torchrun", ntasks_per_node=2))
    """
    return run.Partial(
        llm.ptq,
        model_path=model_path,
        export_config=run.Config(ExportConfig, path=export_path, export_format=export_format),
        quantization_config=run.Config(
            QuantizationConfig, algorithm=algorithm, calibration_dataset=calibration_dataset
        ),
        calibration_tp=tensor_parallelism,
        calibration_pp=pipeline_parallelism,
        devices=-(-tensor_parallelism * pipeline_parallelism // num_nodes),
        num_nodes=num_nodes,
        tokenizer_path=tokenizer_path,
    )

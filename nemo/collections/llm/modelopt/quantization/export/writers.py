"""The three export formats as the Quantizer writes them.

``tools`` holds the functions and classes that can be replaced in the module `quantizer`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nemo.utils.model_utils import unwrap_model

from nemo.collections.llm.modelopt import _real
from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo.collections.llm.modelopt.quantization import decoders, stand_ins, transformers_models
from nemo.collections.llm.modelopt.quantization.collaborators import Collaborators
from nemo.collections.llm.modelopt.quantization.export import hf_files, hf_kv_cache, hf_verify, hf_writer, support
from nemo.collections.llm.modelopt.quantization.insert import row_blocks
from nemo_modelopt_dropin import files


def check_planned(planned: dict[str, dict[str, Any]], export_config: Any) -> None:
    """Refuse algorithms that cannot be exported from a Megatron model as configured.

    Args:
        planned: Name to quant_cfg.
        export_config: The ``ExportConfig``.

    Raises:
        ModelOptConfigError: With the reason and what to do.
    """
    for name, quant_cfg in planned.items():
        support.check_format(quant_cfg, name, export_config.export_format)
    support.check_mixture(planned, export_config.export_format)


def check_model(
    model: Any,
    export_config: Any,
    quant_cfg: dict[str, Any],
    planned: dict[str, dict[str, Any]],
    enable_kv_cache: bool | None = None,
) -> None:
    """Raise before any work for a model that cannot be quantized, or exported as configured.

    Args:
        model: The ``llm.GPTModel``, or NeMo 2.5's wrapper of a transformers model.
        export_config: The ``ExportConfig``, or None.
        quant_cfg: How it will be quantized; see `kv_export.settle` for what may be taken out.
        planned: Name to quant_cfg of the algorithms, see `check_planned`.
        enable_kv_cache: The user's option.

    Raises:
        ModelOptConfigError: With what was given and what is possible.
    """
    if transformers_models.is_wrapped(model):
        transformers_models.check(model, export_config, quant_cfg)
        return
    transformers_models.check_plain(model)
    inner = decoders.find_gpt_model(model)
    if inner is None:
        raise ModelOptConfigError(
            f"Quantizer.quantize expects an llm.GPTModel or llm.MambaModel (or NeMo's wrapper of one), not a "
            f"{type(model).__name__}."
        )
    if export_config is not None:
        check_planned(planned, export_config)
        support.check_layout(export_config.export_format, inner.config, inner.config.tensor_model_parallel_size)
        support.check_model(export_config.export_format, inner)
        row_blocks.check(export_config.export_format, quant_cfg, inner)
        core = unwrap_model(model)
        hf_kv_cache.settle(export_config.export_format, quant_cfg, core, enable_kv_cache)
        support.check_contents(export_config.export_format, quant_cfg, inner, core)


def write(tools: Collaborators, quantizer: Any, model, model_dir: str, trainer, folder: Path) -> None:
    """Write a model in the format of the quantizer's export configuration into a folder.

    Args:
        tools: The functions that can be replaced in the module `quantizer`.
        quantizer: The ``Quantizer``.
        model: What its `quantize` returned.
        model_dir: The checkpoint the model came from.
        trainer: The model's trainer, for the NeMo format.
        folder: Where to write to.

    Raises:
        ExportError: If what was written is not what it should be.
    """
    fmt = quantizer.export_config.export_format
    if fmt == "nemo":
        _write_nemo(tools, quantizer, model, trainer, folder)
    elif fmt == "hf":
        _write_hf(tools, quantizer, model, model_dir, folder)
    else:
        support.write_trtllm(tools, quantizer, model, folder)


def _write_nemo(tools: Collaborators, quantizer: Any, model, trainer, folder: Path) -> None:
    support.write_nemo(tools, model, trainer, folder)
    if tools.is_global_rank_zero() and quantizer.quantization_config.algorithm is not None:
        support.check_state(Path(tools.ckpt_to_weights_subdir(folder, False)))


def _write_hf(tools: Collaborators, quantizer: Any, model, model_dir: str, folder: Path) -> None:
    keywords = {} if quantizer.torch_dtype == torch.bfloat16 else {"dtype": quantizer.torch_dtype}
    level = quantizer.export_config.verify
    if level != "full":
        keywords["verify"] = level
    if tools.export_hf_checkpoint(model_dir, folder, model=model, **keywords) is None:
        # Nothing was quantized: a plain model.
        if transformers_models.is_wrapped(model):
            transformers_models.write_plain_hf(model, folder, quantizer.torch_dtype)
            return
        _write_plain_hf(tools, model, model_dir, folder, quantizer.torch_dtype, level)


def _write_plain_hf(tools: Collaborators, model, model_dir: str, folder: Path, dtype: torch.dtype, level: str) -> None:
    """Write a plain model: from memory where modelopt knows the architecture, else by NeMo's exporter."""
    exporter = tools.load_connector_from_trainer_ckpt(model_dir, "hf")
    core = tools.unwrap_for_modelopt_operations(model)
    architectures = getattr(exporter.config, "architectures", None) or [None]
    if architectures[0] not in support.known_architectures():
        exporter(output_path=Path(folder), overwrite=True)
        if tools.is_global_rank_zero():
            hf_files.name_dtype(folder)
        return
    writer = tools.mte.export_mcore_gpt_to_hf
    hf_writer.write(core, exporter.config, support.hf_tokenizer(model), folder, writer, dtype=dtype)
    _finish_hf(tools, model, core, folder, level, dtype)


def _finish_hf(tools: Collaborators, model, core, folder: Path, level: str, dtype: torch.dtype) -> None:
    """Write what belongs beside the weights, and verify the checkpoint as far as asked for."""
    with support.together("The check of the checkpoint"):
        if tools.is_global_rank_zero():
            hf_files.name_dtype(folder, dtype)
            hf_verify.write_generation_config(model, folder)
            if level != "none":
                hf_files.verify(folder)
    if level == "full":
        hf_verify.check_logits(core, folder, dtype)


def is_complete_trtllm(tools: Collaborators, folder: Path, tensor_parallel: int) -> bool:
    """Return whether a TensorRT-LLM checkpoint has its configuration and one file for each inference rank."""
    names = ["config.json", *(f"rank{rank}.safetensors" for rank in range(tensor_parallel))]
    missing = [name for name in names if not (Path(folder) / name).exists()]
    if missing:
        tools.logging.error(f"Failed to export the quantized model. Not written: {missing}.")
    return not missing


def save_tokenizer(tools: Collaborators, model, model_dir: str, folder: Path, fmt: str) -> None:
    """Put the tokenizer beside an exported model: Hugging Face's own files, or NeMo's context."""
    if fmt == "nemo" or not tools.is_global_rank_zero():
        return
    if transformers_models.is_wrapped(model):
        transformers_models.save_tokenizer(model, folder, fmt)
        return
    tokenizer = getattr(getattr(model, "tokenizer", None), "tokenizer", None)
    if fmt == "hf" and isinstance(tokenizer, tools.PreTrainedTokenizerBase):
        tokenizer.save_pretrained(str(folder))
        return
    # nemo.export looks for the tokenizer under this name.
    target = tools.os.path.join(folder, "nemo_context")
    tools.shutil.copytree(tools.ckpt_to_context_subdir(model_dir), target, dirs_exist_ok=True)


def write_converted_hf(tools: Collaborators, model_dir, export_dir, model, verify: str, **kwargs: Any) -> Path | None:
    """Write a converted model as a Hugging Face checkpoint and verify it; see ``quantizer.export_hf_checkpoint``."""
    if transformers_models.is_wrapped(model):
        return transformers_models.write_hf(tools, model, Path(export_dir), **kwargs)
    exporter = tools.load_connector_from_trainer_ckpt(model_dir, "hf")
    if model is None:
        model, _ = exporter.nemo_load(model_dir)
    core = tools.unwrap_for_modelopt_operations(model)
    if not tools.mto.ModeloptStateManager.is_converted(core):
        return None
    if not _real.holds_core(core):
        return stand_ins.write_hf(tools, core, exporter, export_dir, **kwargs)
    support.check_converted(core)
    with support.staged(Path(export_dir), files.checkpoint("hf")) as folder:
        tokenizer = support.hf_tokenizer(model)
        hf_writer.write(core, exporter.config, tokenizer, folder, tools.mte.export_mcore_gpt_to_hf, **kwargs)
        _finish_hf(tools, model, core, folder, verify, kwargs.get("dtype", torch.bfloat16))
    return Path(export_dir)

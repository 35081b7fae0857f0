"""Write the three export formats.

``tools`` holds the functions and classes that can be replaced in the module `quantizer`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero

from nemo_modelopt_dropin import files
from nemo_modelopt_dropin.preflight import shard_sizes

from ... import _parallel, _real, _staging
from .. import _checks, _decoders, _transformers_models
from .._collaborators import Collaborators
from ..insert import routed_experts
from . import (
    hf_card,
    hf_configs,
    hf_describe,
    hf_files,
    hf_names,
    hf_verify,
    hf_writer,
    layout_choice,
    layouts,
    support,
)

_OWN_ARGUMENTS = frozenset({"dtype", "layout", "max_shard_bytes"})


def write(tools: Collaborators, quantizer: Any, model, model_dir: str, trainer, folder: Path) -> None:
    """Write a model into a folder, in the format of the quantizer's export configuration.

    Args:
        tools: The functions that can be replaced in the module `quantizer`.
        quantizer: The ``Quantizer``.
        model: What its `quantize` returned.
        model_dir: The checkpoint the model came from.
        trainer: The model's trainer, for the NeMo format.
        folder: The folder.

    Raises:
        ExportError: If the written checkpoint is incomplete or wrong.
    """
    fmt = quantizer.export_config.export_format
    if fmt == "nemo":
        _write_nemo(tools, quantizer, model, trainer, folder)
    elif fmt == "hf":
        _write_hf(tools, quantizer, model, model_dir, folder)
        if tools.is_global_rank_zero():
            hf_card.add_measurements(folder, quantizer)
    else:
        write_trtllm(tools, quantizer, model, folder)


def _write_nemo(tools: Collaborators, quantizer: Any, model, trainer, folder: Path) -> None:
    write_nemo(tools, model, trainer, folder)
    if tools.is_global_rank_zero() and quantizer.quantization_config.algorithm is not None:
        check_state(Path(tools.ckpt_to_weights_subdir(folder, False)))


def write_nemo(tools: Collaborators, model, trainer, target) -> None:
    """Write a NeMo checkpoint: weights with the quantizers' state, and the context.

    Args:
        tools: The functions that can be replaced in the module `quantizer`.
        model: The ``llm.GPTModel``.
        trainer: Its trainer.
        target: The checkpoint's folder.
    """
    trainer.strategy.connect(model)
    trainer.strategy.setup_environment()
    trainer.strategy.setup_megatron_parallel(trainer=trainer)
    trainer.strategy.trainer = trainer
    trainer.save_checkpoint(target)
    finalize = getattr(getattr(trainer.strategy, "checkpoint_io", None), "maybe_finalize_save_checkpoint", None)
    if finalize is not None and getattr(trainer.strategy, "async_save", False) is True:
        finalize(blocking=True)
    tools.barrier()
    if tools.is_global_rank_zero():
        context = tools.TrainerContext.from_trainer(trainer)
        context.io_dump(tools.ckpt_to_context_subdir(target), yaml_attrs=["model"])


def check_state(weights: Path) -> None:
    """Check that a NeMo checkpoint contains the state of Model Optimizer.

    Raises:
        ExportError: With the path of the missing state.
    """
    state = weights / "modelopt_state"
    if not state.exists():
        raise _staging.ExportError(f"The checkpoint was written without Model Optimizer's state ({state}).")


def write_trtllm(tools: Collaborators, quantizer: Any, model, target) -> None:
    """Write a TensorRT-LLM checkpoint.

    Args:
        tools: The functions that can be replaced in the module `quantizer`.
        quantizer: The ``Quantizer``.
        model: The ``llm.GPTModel``.
        target: The checkpoint's folder.

    Raises:
        ExportError: If it is not complete.
    """
    from accelerate.hooks import remove_hook_from_module

    config = quantizer.export_config
    # Pipeline stages may be on different nodes, which then exchange their parts through the file system.
    stages = getattr(getattr(model, "config", None), "pipeline_model_parallel_size", 1)
    with torch.inference_mode():
        remove_hook_from_module(model, recurse=True)
        tools.mte.export_tensorrt_llm_checkpoint(
            model=tools.unwrap_for_modelopt_operations(model),
            decoder_type=quantizer._get_decoder_type(model),
            dtype=quantizer.torch_dtype,
            export_dir=target,
            inference_tensor_parallel=config.inference_tp,
            inference_pipeline_parallel=config.inference_pp,
            use_nfs_workspace=isinstance(stages, int) and stages > 1,
        )
    tools.barrier()
    if tools.is_global_rank_zero() and not quantizer._validate_quantized_checkpoint(target, config.inference_tp):
        raise _staging.ExportError(f"The TensorRT-LLM checkpoint for {config.path} is not complete.")


def _write_hf(tools: Collaborators, quantizer: Any, model, model_dir: str, folder: Path) -> None:
    keywords = {} if quantizer.torch_dtype == torch.bfloat16 else {"dtype": quantizer.torch_dtype}
    level = quantizer.export_config.verify
    # A replaced function may have the parameters of stock only.
    ours = {"verify": "full", "hf_layout": "auto", "max_shard_size": "5GB"}
    values = {name: getattr(quantizer.export_config, name, default) for name, default in ours.items()}
    keywords |= {name: value for name, value in values.items() if value != ours[name]}
    if tools.export_hf_checkpoint(model_dir, folder, model=model, **keywords) is None:
        # The model is not quantized.
        if _transformers_models.is_wrapped(model):
            _transformers_models.write_plain_hf(model, folder, quantizer.torch_dtype)
            if tools.is_global_rank_zero():
                hf_card.write(folder, model_dir, model)
            return
        size = shard_sizes.parse(values["max_shard_size"])
        _write_plain_hf(tools, model, model_dir, folder, level, dtype=quantizer.torch_dtype, max_shard_bytes=size)


def _write_plain_hf(tools: Collaborators, model, model_dir: str, folder: Path, level: str, **kwargs: Any) -> None:
    """Write a plain model from memory, or with NeMo's exporter if that does not define names for all parameters."""
    core, exporter = tools.unwrap_for_modelopt_operations(model), _exporter(tools, model, model_dir)
    try:
        if _real.holds_core(core):
            if _write_core(tools, model, core, exporter, folder, **kwargs):
                _finish_hf(tools, model, model_dir, core, folder, level, kwargs["dtype"])
            return
    except hf_names.NamesError as error:
        if tools.is_global_rank_zero():
            logging.warning(f"{error} NeMo's exporter writes the checkpoint, which is not compared with the model.")
    exporter(output_path=Path(folder), overwrite=True)
    if tools.is_global_rank_zero():
        hf_files.name_dtype(folder)
        hf_card.write(folder, model_dir, model)


def _write_core(tools: Collaborators, model, core, exporter, folder: Path, **kwargs: Any) -> bool:
    """Write a real Megatron-Core model.

    A user's replacement of modelopt's function is called, and modelopt's own function for arguments that only it has.

    Returns:
        Whether the files are ours. What a replacement writes is not changed and not verified, as in stock.
    """
    tokenizer, write = support.hf_tokenizer(model), tools.mte.export_mcore_gpt_to_hf
    if hf_writer.is_own(write) and set(kwargs) <= _OWN_ARGUMENTS:
        hf_writer.write(core, exporter, tokenizer, folder, **kwargs)
        return True
    theirs = {name: value for name, value in kwargs.items() if name not in _OWN_ARGUMENTS - {"dtype"}}
    hf_writer.write_with(write, core, exporter.config, tokenizer, folder, **theirs)
    if hf_writer.is_own(write):
        return True
    if tools.is_global_rank_zero():
        logging.warning(f"A replacement of modelopt's writer wrote {folder.name}. Its files are not verified.")
    return False


def _finish_hf(tools: Collaborators, model, model_dir: Any, core, folder: Path, level: str, dtype: torch.dtype) -> None:
    """Write the files that go with the weights, and verify the checkpoint at the requested level."""
    with _staging.fail_together("The check of the checkpoint"), _parallel.while_rank_zero_works():
        if tools.is_global_rank_zero():
            hf_files.name_dtype(folder, dtype)
            hf_describe.write_generation_config(model, folder)
            hf_card.write(folder, model_dir, model)
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
    """Write the tokenizer into the folder of an exported model: Hugging Face's files, or NeMo's context."""
    if fmt == "nemo" or not tools.is_global_rank_zero():
        return
    if _transformers_models.is_wrapped(model):
        _transformers_models.save_tokenizer(model, folder, fmt)
        return
    tokenizer = getattr(getattr(model, "tokenizer", None), "tokenizer", None)
    if fmt == "hf" and isinstance(tokenizer, tools.PreTrainedTokenizerBase):
        tokenizer.save_pretrained(str(folder))
        return
    # nemo.export looks for the tokenizer in a folder with this name.
    target = tools.os.path.join(folder, "nemo_context")
    tools.shutil.copytree(tools.ckpt_to_context_subdir(model_dir), target, dirs_exist_ok=True)


def write_converted_hf(
    tools: Collaborators,
    model_dir,
    export_dir,
    model,
    verify: str,
    hf_layout: str = "auto",
    max_shard_size: str = "5GB",
    **kwargs: Any,
) -> Path | None:
    """Write a converted model as a Hugging Face checkpoint and verify it; see ``quantizer.export_hf_checkpoint``."""
    _checks.check_files(hf_layout, max_shard_size)
    if _transformers_models.is_wrapped(model):
        written = _transformers_models.write_hf(tools, model, Path(export_dir), **kwargs)
        if written is not None and tools.is_global_rank_zero():
            hf_card.write(written, model_dir, model)
        return written
    exporter = _exporter(tools, model, model_dir)
    if model is None:
        model, _ = exporter.nemo_load(model_dir)
    core = tools.unwrap_for_modelopt_operations(model)
    if not tools.mto.ModeloptStateManager.is_converted(core):
        return None
    if not _real.holds_core(core):
        return _write_stand_in_hf(tools, core, exporter, export_dir, **kwargs)
    support.check_converted(core)
    routed_experts.warn(core)
    with _staging.staged(Path(export_dir), files.checkpoint("hf")) as folder:
        size = shard_sizes.parse(max_shard_size)
        layout = layouts.LAYOUTS[layout_choice.of_model(core, hf_layout)]
        if _write_core(tools, model, core, exporter, folder, layout=layout, max_shard_bytes=size, **kwargs):
            _finish_hf(tools, model, model_dir, core, folder, verify, kwargs.get("dtype", torch.bfloat16))
    return Path(export_dir)


def _exporter(tools: Collaborators, model, model_dir) -> Any:
    """Return NeMo's exporter for a checkpoint.

    Raises:
        ModelOptConfigError: If the class of the model, which may be None, has none that defines the files.
    """
    if _real.holds_core(model):
        support.check_architecture("hf", _decoders.find_gpt_model(model) or model)
    with hf_configs.from_context():
        return tools.load_connector_from_trainer_ckpt(model_dir, "hf")


def _write_stand_in_hf(tools: Collaborators, core: Any, exporter: Any, export_dir: Any, **kwargs: Any) -> Path:
    """Write a converted stand-in with modelopt's writer; see ``quantizer.export_hf_checkpoint``."""
    with torch.inference_mode(), tools.tempfile.TemporaryDirectory() as source:
        exporter.config.save_pretrained(source)
        tools.mte.export_mcore_gpt_to_hf(
            core, pretrained_model_name_or_path=source, export_dir=str(export_dir), **kwargs
        )
    return Path(export_dir)


def log_success(target: Path) -> None:
    """Log where the checkpoint is, on rank zero."""
    if is_global_rank_zero():
        logging.info(f"Export succeeded, model has been exported to {target}.")

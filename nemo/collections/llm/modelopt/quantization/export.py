"""Writers of quantized checkpoints, what they can write correctly, and the check of what they wrote."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from nemo.collections.llm.utils import barrier
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero

from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices


class ExportError(Exception):
    """An export failed or wrote something wrong.

    Not a ``RuntimeError``: NeMo's ``export_ckpt`` takes that as "not a quantized model" and would write a plain one.
    """


_REMEDY = 'Use export_format="nemo" (any algorithm, any layout) or "trtllm"'


def hf_obstacle(quant_cfg: dict[str, Any] | None) -> str | None:
    """Return why modelopt's Hugging Face writer cannot store a quantized model correctly, or None if it can."""
    if not quant_cfg:
        return None
    if choices.is_awq(quant_cfg) or choices.is_smoothquant(quant_cfg):
        return "the writer has no place for the scales that AWQ and SmoothQuant put on the inputs (pre_quant_scale)"
    for pattern, attributes in choices.quantizer_settings(quant_cfg):
        if "weight_quantizer" not in pattern:
            continue
        bits = attributes["num_bits"]
        if bits == 8:
            return "the writer cannot split INT8's scales of fused layers (query-key-value, gate-up)"
        if bits == 4:
            return "the writer records no format for INT4, so no reader could load the checkpoint"
    return None


def hf_obstacle_of(model: torch.nn.Module) -> str | None:
    """Return why the Hugging Face writer cannot store a converted model correctly, by its quantizers, or None."""
    for module in model.modules():
        weight_quantizer = getattr(module, "weight_quantizer", None)
        if weight_quantizer is None:
            continue
        if getattr(getattr(module, "input_quantizer", None), "pre_quant_scale", None) is not None:
            return hf_obstacle({"algorithm": "smoothquant"})
        parts = weight_quantizer if isinstance(weight_quantizer, torch.nn.Sequential) else [weight_quantizer]
        for part in parts:
            if getattr(part, "is_enabled", False):
                found = hf_obstacle({"quant_cfg": {"*weight_quantizer": {"num_bits": part.num_bits}}})
                if found:
                    return found
    return None


def check_format(quant_cfg: dict[str, Any] | None, algorithm: str | None, export_format: str) -> None:
    """Refuse a combination of algorithm and format that cannot be exported correctly.

    Raises:
        ModelOptConfigError: With the reason and what to do.
    """
    obstacle = hf_obstacle(quant_cfg) if export_format == "hf" else None
    if obstacle:
        raise ModelOptConfigError(
            f'algorithm={algorithm!r} cannot be exported with export_format="hf": {obstacle}. {_REMEDY}.'
        )


def check_layout(export_format: str, tensor_parallel: int) -> None:
    """Refuse a layout in which ranks would overwrite each other's files.

    Raises:
        ModelOptConfigError: With the reason and what to do.
    """
    if export_format == "hf" and tensor_parallel > 1:
        raise ModelOptConfigError(
            f'export_format="hf" needs tensor parallel size 1, not {tensor_parallel}: the writer stores a rank\'s '
            "part of a weight under the name of the whole. Calibrate with calibration_tp=1 (any pipeline parallel "
            f"size). {_REMEDY}."
        )


def check_converted(model: torch.nn.Module) -> None:
    """Refuse a converted Megatron-Core model whose Hugging Face checkpoint would be wrong.

    Raises:
        ModelOptConfigError: With the reason and what to do.
    """
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        check_layout("hf", parallel_state.get_tensor_model_parallel_world_size())
    obstacle = hf_obstacle_of(model)
    if obstacle:
        raise ModelOptConfigError(f"This model cannot be exported to Hugging Face format: {obstacle}. {_REMEDY}.")


def hf_tokenizer(model: Any) -> Any:
    """Return the ``transformers`` tokenizer inside of a NeMo model's tokenizer, or None where it has another kind."""
    from transformers import PreTrainedTokenizerBase

    tokenizer = getattr(getattr(model, "tokenizer", None), "tokenizer", None)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def hf_architecture(model: Any) -> str | None:
    """Return the transformers class that NeMo's exporter of a model names, or None where it does not say."""
    exporter = type(model)._EXPORTERS.get(str(type(model)) + "hf") if hasattr(type(model), "_EXPORTERS") else None
    for base in getattr(exporter, "__orig_bases__", ()):
        for argument in getattr(base, "__args__", ())[1:]:
            name = getattr(argument, "__forward_arg__", getattr(argument, "__name__", None))
            if name and not name.startswith("Auto"):
                return name
    return None


def check_model(export_format: str, model: Any) -> None:
    """Refuse a model that has no way to Hugging Face, before time goes into calibrating it.

    Args:
        export_format: Format asked for.
        model: The ``llm.GPTModel``.

    Raises:
        ModelOptConfigError: If NeMo has no exporter for the model or modelopt no mapping for its architecture.
    """
    if export_format != "hf":
        return
    exporters = getattr(type(model), "_EXPORTERS", {})
    if str(type(model)) + "hf" not in exporters:
        raise ModelOptConfigError(
            f'export_format="hf": NeMo has no Hugging Face exporter for {type(model).__name__}; a model class such as '
            f"llm.LlamaModel has one. {_REMEDY}."
        )
    architecture = hf_architecture(model)
    known = known_architectures()
    if architecture and architecture not in known:
        raise ModelOptConfigError(
            f'export_format="hf": modelopt cannot write a quantized {architecture}; it can write {sorted(known)}. '
            f"{_REMEDY}."
        )


def known_architectures() -> set[str]:
    """Return the transformers classes that modelopt can write from Megatron-Core models."""
    from modelopt.torch.export.plugins.mcore_common import all_mcore_hf_export_mapping

    return {name for name in all_mcore_hf_export_mapping if "Eagle" not in name}


@contextlib.contextmanager
def staged(target: Path, beside: bool = True) -> Iterator[Path]:
    """Give a folder to write into; its content appears at ``target`` only when the context ends well, on all ranks.

    Args:
        target: Where the checkpoint shall be.
        beside: False writes straight into the target (for writers that are stand-ins).

    Raises:
        ExportError: On the ranks that succeeded, when another rank failed.
    """
    if not beside:
        yield target
        return
    target = Path(target)
    staging = target.parent / f".{target.name}.partial"
    if is_global_rank_zero():
        shutil.rmtree(staging, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
    barrier()
    failed = True
    try:
        yield staging
        failed = False
    finally:
        elsewhere = _any_rank(failed)
        if is_global_rank_zero():
            if failed or elsewhere:
                shutil.rmtree(staging, ignore_errors=True)
            else:
                _publish(staging, target)
        barrier()
    if elsewhere:
        raise ExportError(f"The export to {target} failed on another rank, see its log; nothing was left there.")


def _any_rank(failed: bool) -> bool:
    """Return whether any rank failed."""
    if not torch.distributed.is_initialized():
        return failed
    flag = torch.tensor(int(failed), device="cuda" if torch.cuda.is_available() else "cpu")
    torch.distributed.all_reduce(flag)
    return bool(flag)


def _publish(staging: Path, target: Path) -> None:
    """Move what was written into place; in an existing folder only entries of the same name are replaced."""
    if not staging.exists():
        return
    if not target.exists():
        staging.rename(target)
        return
    for entry in staging.iterdir():
        old = target / entry.name
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        entry.replace(old)
    staging.rmdir()


def write_nemo(model, trainer, target: Path, context_of: Callable, context_dir: Callable) -> None:
    """Write a NeMo checkpoint: weights with the quantizers' state, and the context.

    Args:
        model: The ``llm.GPTModel``.
        trainer: Its trainer.
        target: The checkpoint's folder.
        context_of: ``TrainerContext.from_trainer``.
        context_dir: ``ckpt_to_context_subdir``.
    """
    trainer.strategy.connect(model)
    trainer.strategy.setup_environment()
    trainer.strategy.setup_megatron_parallel(trainer=trainer)
    trainer.strategy.trainer = trainer
    trainer.save_checkpoint(target)
    finalize = getattr(getattr(trainer.strategy, "checkpoint_io", None), "maybe_finalize_save_checkpoint", None)
    if finalize is not None and getattr(trainer.strategy, "async_save", False) is True:
        finalize(blocking=True)
    barrier()
    if is_global_rank_zero():
        context_of(trainer).io_dump(context_dir(target), yaml_attrs=["model"])


def write_hf(model, hf_config, tokenizer, target: Path, write: Callable, **kwargs: Any) -> None:
    """Write a Megatron-Core model as a Hugging Face checkpoint, quantized or plain.

    Args:
        model: This rank's Megatron-Core model; tensor parallel size 1.
        hf_config: The ``transformers`` configuration.
        tokenizer: The ``transformers`` tokenizer to write along, or None.
        target: The checkpoint's folder.
        write: ``modelopt.torch.export.export_mcore_gpt_to_hf``.
        **kwargs: Further arguments of ``write``.
    """
    from megatron.core import parallel_state

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        source = stack.enter_context(tempfile.TemporaryDirectory())
        hf_config.save_pretrained(source)
        # The writer asks transformers for a tokenizer there, and fails for some classes where there is none.
        if tokenizer is not None:
            tokenizer.save_pretrained(source)
        folder = str(target)
        if parallel_state.model_parallel_is_initialized() and parallel_state.get_data_parallel_rank() > 0:
            # Each data-parallel replica would write the same files at the same time.
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        Path(folder).mkdir(parents=True, exist_ok=True)
        stack.enter_context(_without_padding(model, hf_config.vocab_size))
        write(model, pretrained_model_name_or_path=source, export_dir=folder, **kwargs)


def write_plain_hf(model, exporter, tokenizer, target: Path, write: Callable, dtype: torch.dtype) -> None:
    """Write a model that was not quantized: from memory where modelopt knows the architecture, else by NeMo's exporter.

    Args:
        model: This rank's Megatron-Core model.
        exporter: NeMo's exporter of the checkpoint the model came from.
        tokenizer: See `write_hf`.
        target: The checkpoint's folder.
        write: See `write_hf`.
        dtype: Of the weights.
    """
    architectures = getattr(exporter.config, "architectures", None) or [None]
    if architectures[0] not in known_architectures():
        exporter(output_path=Path(target), overwrite=True)
        return
    write_hf(model, exporter.config, tokenizer, target, write, dtype=dtype)
    if is_global_rank_zero():
        verify_hf(target)


def write_trtllm(wrapped, write: Callable, **kwargs: Any) -> None:
    """Write a TensorRT-LLM checkpoint.

    Args:
        wrapped: The ``llm.GPTModel``.
        write: ``modelopt.torch.export.export_tensorrt_llm_checkpoint``.
        **kwargs: Its arguments.
    """
    from accelerate.hooks import remove_hook_from_module

    with torch.inference_mode():
        remove_hook_from_module(wrapped, recurse=True)
        # Stages may be on different nodes, which then exchange their parts through the file system.
        stages = getattr(getattr(wrapped, "config", None), "pipeline_model_parallel_size", 1)
        write(use_nfs_workspace=stages > 1, **kwargs)


@contextlib.contextmanager
def _without_padding(model, vocabulary: int) -> Iterator[None]:
    """Cut the rows that pad the vocabulary off the embedding and the output layer, inside of the context."""
    layers = [
        getattr(getattr(model, "embedding", None), "word_embeddings", None),
        getattr(model, "output_layer", None),
    ]
    weights = {id(w): w for w in (getattr(layer, "weight", None) for layer in layers) if w is not None}
    whole = [(weight, weight.data) for weight in weights.values() if weight.shape[0] > vocabulary]
    for weight, data in whole:
        weight.data = data[:vocabulary]
    try:
        yield
    finally:
        for weight, data in whole:
            weight.data = data


def verify_hf(folder: Path) -> None:
    """Reopen a Hugging Face checkpoint: every tensor is there with its shape, and every scale is positive.

    Raises:
        ExportError: Listing what is wrong.
    """
    tensors = dict(_read_safetensors(folder))
    problems = [f"{name} is not finite" for name, value in tensors.items() if _is_scale(name) and not _sound(value)]
    expected = _expected_shapes(folder)
    for name, shape in expected.items():
        if name not in tensors:
            problems.append(f"{name} is missing")
        elif tensors[name].dtype != torch.uint8 and tensors[name].shape != shape:
            problems.append(f"{name} has shape {list(tensors[name].shape)}, not {list(shape)}")
    if expected:
        problems += [f"{name} is unexpected" for name in tensors if name not in expected and not _is_scale(name)]
    if problems:
        raise ExportError(f"The checkpoint that was written is wrong: {'; '.join(sorted(problems)[:10])}")


def _is_scale(name: str) -> bool:
    return name.endswith(("_scale", "_scale_2", "_scale_inv"))


def _sound(scale: torch.Tensor) -> bool:
    value = scale.float()
    return bool(torch.isfinite(value).all()) and bool((value >= 0).all())


def _read_safetensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    for file in files:
        with safe_open(str(folder / file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def _expected_shapes(folder: Path) -> dict[str, torch.Size]:
    """Return name and shape of each tensor `transformers` will look for; nothing for a class it does not know."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.__dict__.pop("quantization_config", None)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    return {name: value.shape for name, value in model.state_dict().items() if name not in tied}


def log_success(target: Path) -> None:
    """Say where the checkpoint is, on rank zero."""
    if is_global_rank_zero():
        logging.info(f"Export succeeded, model has been exported to {target}.")

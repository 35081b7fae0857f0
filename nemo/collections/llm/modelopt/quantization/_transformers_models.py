"""Quantize NeMo's wrapper of a ``transformers`` model, ``llm.HFAutoModelForCausalLM`` of nemo-toolkit 2.5.

Later versions of nemo-toolkit have no such class, and only `check_plain` applies, which reports a ``transformers``
model. The wrapped model runs in this process alone, without ranks or a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero

from nemo.collections import llm
from nemo_modelopt_dropin import files

from .. import _staging
from ..errors import ModelOptConfigError
from . import quant_cfg_choices as choices
from ._collaborators import Collaborators
from ._quant_cfg import AUTO
from .export import hf_files

_NAME = "HFAutoModelForCausalLM"
_NEW_TOKENS = 30


def exists() -> bool:
    """Return whether the installed nemo-toolkit has the class."""
    return isinstance(getattr(llm, _NAME, None), type)


def is_real(model: Any) -> bool:
    """Return whether a model is a wrapper, and not a mock with its ``spec``."""
    return exists() and issubclass(type(model), getattr(llm, _NAME))


def is_wrapped(model: Any) -> bool:
    """Return whether a model is NeMo's wrapper of a ``transformers`` model."""
    return exists() and isinstance(model, getattr(llm, _NAME))


def check(model: Any, export_config: Any, quant_cfg: dict[str, Any]) -> None:
    """Check, before calibrating, that a wrapper holds a model and can be exported in the requested format.

    Raises:
        ModelOptConfigError: With the reason and what to do.
    """
    if model.model is None:
        raise ModelOptConfigError(f"This {_NAME} does not hold a model yet: call its configure_model() first.")
    if quant_cfg.get("algorithm") == AUTO:
        raise ModelOptConfigError(
            f'algorithm="auto" searches Megatron models, not a {_NAME}: use one algorithm, or import the model with '
            "llm.import_ckpt first."
        )
    if export_config is not None:
        check_format(export_config.export_format)
        if export_config.export_format == "hf" and _is_plain_int4(quant_cfg):
            raise ModelOptConfigError(
                'export_format="hf": modelopt cannot write INT4 weights without AWQ from a transformers model; use '
                'algorithm="int4_awq", or export_format="trtllm".'
            )


def _is_plain_int4(quant_cfg: dict[str, Any]) -> bool:
    """Return whether weights are INT4 without AWQ's scales of the inputs, which modelopt's writer expects."""
    return not choices.is_awq(quant_cfg) and any(
        "weight_quantizer" in pattern and attributes["num_bits"] == 4
        for pattern, attributes in choices.quantizer_settings(quant_cfg)
    )


def check_format(export_format: str) -> None:
    """Check that an export format does not need Megatron's weights.

    Raises:
        ModelOptConfigError: For "nemo".
    """
    if export_format == "nemo":
        raise ModelOptConfigError(
            "NeMo export format can only be used with native NeMo checkpoints, not HuggingFace models: "
            f'export_format="nemo" does not support a {_NAME}. Use "hf" or "trtllm", or import the model with '
            "llm.import_ckpt first."
        )


def check_plain(model: Any) -> None:
    """Check that a model is not a bare ``transformers`` model.

    Raises:
        ModelOptConfigError: If it is one.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    wrap = f"wrap it in llm.{_NAME}" if exists() else f"only nemo-toolkit 2.5 has llm.{_NAME} to wrap it"
    raise ModelOptConfigError(
        f"Quantizer supports NeMo's models, not a {type(model).__name__} of transformers: {wrap}, or convert it "
        'into a NeMo model with llm.import_ckpt(..., "hf://..."), which works in all versions.'
    )


def forward_loop(model: Any, get_batches: Callable) -> Callable:
    """Return the loop that feeds calibration batches `[b, s]` to the ``transformers`` model.

    Args:
        model: The wrapper.
        get_batches: Returns an iterator over token batches; called each time the loop runs.
    """
    device = model.model.device

    def loop(core: torch.nn.Module) -> None:
        with torch.no_grad():
            for batch in get_batches():
                core(batch.to(device))

    return loop


def generate_sample(model: Any, prompts: list[str]) -> list[str]:
    """Return each prompt with the wrapped model's continuation."""
    tokenizer = model.tokenizer.tokenizer
    texts = []
    for prompt in prompts:
        inputs = {k: v.to(model.model.device) for k, v in tokenizer(prompt, return_tensors="pt").items()}
        inputs.pop("token_type_ids", None)
        output = model.model.generate(**inputs, max_new_tokens=_NEW_TOKENS)
        texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return texts


def save_tokenizer(model: Any, export_dir: Path, export_format: str) -> None:
    """Write the tokenizer's files: next to the weights ("hf"), or into ``huggingface_tokenizer`` ("trtllm")."""
    folder = Path(export_dir) if export_format == "hf" else Path(export_dir) / "huggingface_tokenizer"
    model.tokenizer.save_pretrained(str(folder))


def write_hf(tools: Collaborators, model: Any, export_dir: Path, **kwargs: Any) -> Path | None:
    """Write a quantized wrapped model as a Hugging Face checkpoint; return None if it is not quantized.

    Args:
        tools: The functions that can be replaced in the module `quantizer`.
        model: The wrapper.
        export_dir: The folder to write.
        **kwargs: Further arguments of ``modelopt.torch.export.export_hf_checkpoint``.

    Raises:
        ExportError: If the written checkpoint is incomplete.
    """
    core = tools.unwrap_for_modelopt_operations(model)
    if not tools.mto.ModeloptStateManager.is_converted(core):
        return None
    write = tools.mte.export_hf_checkpoint
    if not is_real(model):
        with torch.inference_mode():
            write(core, export_dir=str(export_dir), **kwargs)
        return Path(export_dir)
    with _staging.staged(Path(export_dir), files.checkpoint("hf")) as folder, torch.inference_mode():
        write(core, export_dir=str(folder), **kwargs)
        if is_global_rank_zero():
            if not (folder / "config.json").exists():
                raise _staging.ExportError(f"modelopt wrote no config.json for {export_dir}.")
            hf_files.name_dtype(folder)
    return Path(export_dir)


def write_plain_hf(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a wrapped model that is not quantized, in the requested precision."""
    if is_global_rank_zero():
        logging.info(f"The model is not quantized and is written in {dtype}")
        weights = {name: value.to(dtype) for name, value in model.model.state_dict().items()}
        model.model.save_pretrained(str(folder), state_dict=weights)
        hf_files.name_dtype(folder, dtype)

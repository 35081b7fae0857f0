"""Quantize and export models that are not real by exactly the steps of stock.

Unit tests pass mocks, namespaces and small networks, and also call the methods unbound, with a stand-in for the
Quantizer. This module therefore reads only what stock reads, and calls every collaborator as often as stock does.

``tools`` holds the functions that can be replaced in the module `quantizer`.
"""

from __future__ import annotations

import pprint
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import _real
from ..errors import ModelOptConfigError
from . import _decoders, _transformers_models
from ._collaborators import Collaborators
from .export import writers
from .insert import quantizers


def is_stand_in(model: Any) -> bool:
    """Return whether a model is not one of NeMo's and does not hold a Megatron-Core language model."""
    return not (_real.holds_core(model) or _real.is_nemo_model(model) or _transformers_models.is_real(model))


def quantize(tools: Collaborators, quantizer: Any, model: Any, forward_loop: Any) -> Any:
    """Quantize a stand-in; see ``Quantizer.quantize``.

    Raises:
        ModelOptConfigError: If it is a network that is not a model of NeMo and does not look like a stand-in for one.
    """
    config = quantizer.quantization_config
    decoder_type = quantizer._get_decoder_type(model, optional=True)
    is_network = issubclass(type(model), torch.nn.Module)
    if is_network and decoder_type is None and not hasattr(model, "freeze") and _decoders.find_gpt_model(model) is None:
        raise ModelOptConfigError(
            f"Quantizer.quantize expects an llm.GPTModel or llm.MambaModel (or NeMo's wrapper of one), not a "
            f"{type(model).__name__}."
        )
    quantizer._setup(model)
    quant_cfg = quantizer._get_quant_cfg(model)
    tools.logging.info(f"Using quant_cfg:\n{pprint.pformat(quant_cfg)}")
    if forward_loop is None and tools.mtq.config.need_calibration(quant_cfg):
        forward_loop = quantizer._get_forward_loop(model)
    core = tools.unwrap_for_modelopt_operations(model)
    quantized = tools.mtq.quantize(core, quant_cfg, forward_loop)
    if decoder_type == "gpt":
        quantized = quantizers.keep_amax_from_vanishing(tools.mtq, quantized, config.algorithm)
    if tools.is_global_rank_zero():
        tools.mtq.print_quant_summary(quantized)
    if quantizer.export_config is not None and quantizer.export_config.generate_sample:
        tools.logging.info("Generating a sample output after model quantization.")
        quantizer._generate_sample(model)
    return model


def forward_loop(quantizer: Any, model: Any, create_data_iterator_getter: Callable) -> Any:
    """Return the loop that calibrates a stand-in; see ``Quantizer._get_forward_loop``."""
    config = quantizer.quantization_config
    size, batch_size = config.calibration_dataset_size, config.calibration_batch_size
    get_batches = create_data_iterator_getter(
        model,
        dataset=config.calibration_dataset,
        seq_len=config.calibration_seq_len,
        batch_size=batch_size,
        calibration_size=size,
    )
    if _transformers_models.is_wrapped(model):
        return _transformers_models.forward_loop(model, get_batches)
    return quantizer.create_megatron_forward_loop(
        get_batches,
        num_batches=size // batch_size,
        seq_length=config.calibration_seq_len,
        micro_batch_size=batch_size,
    )


def write(tools: Collaborators, quantizer: Any, model: Any, model_dir: Any, trainer: Any) -> None:
    """Export a stand-in directly into the configured folder; see ``Quantizer.export``."""
    config = quantizer.export_config
    if config.export_format == "nemo":
        writers.write_nemo(tools, model, trainer, config.path)
        if tools.is_global_rank_zero():
            writers.check_state(Path(tools.ckpt_to_weights_subdir(config.path, False)))
    elif config.export_format == "hf":
        tools.export_hf_checkpoint(model_dir, config.path, model=model)
    else:
        writers.write_trtllm(tools, quantizer, model, config.path)
    if tools.is_global_rank_zero():
        quantizer._save_tokenizer(model, model_dir, config.path, config.export_format)
        tools.logging.info(f"Export succeeded, model has been exported to {config.path}.")

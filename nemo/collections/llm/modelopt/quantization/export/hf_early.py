"""Check before the calibration that a model can be written as a Hugging Face checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from .. import quant_cfg_choices as choices
from . import hf_configs, hf_names, hf_sizes, parts


def check(model: Any, core: torch.nn.Module, quant_cfg: dict[str, Any] | None, tokenizer: Any) -> None:
    """Check that NeMo's exporter defines the checkpoint of a model; all ranks must call.

    Args:
        model: The ``llm.GPTModel``.
        core: Its Megatron-Core model on this rank.
        quant_cfg: How it will be quantized; None for a plain model.
        tokenizer: Its ``transformers`` tokenizer, or None; without a tokenizer nothing is checked.

    Raises:
        NamesError: With the parameters or tensors that it does not define.
        SizesError: If its Hugging Face class cannot have the model's sizes.
    """
    if getattr(model, "tokenizer", None) is None:
        # NeMo's exporters derive the size of the vocabulary from it.
        return
    directory = parts.Directory(core, {})
    shapes = directory.shapes()
    with hf_configs.in_memory(model):
        exporter = hf_configs.exporter_of(model)
        hf_config = hf_configs.of(exporter, core, tokenizer, hf_names.rows_of_embedding(shapes))
        names = hf_names.of(core, exporter, hf_config, shapes)
    hf_sizes.check(names, shapes, hf_config, core.config)
    if quant_cfg is not None:
        check_rows(names, core, quant_cfg, shapes)


def check_rows(names: hf_names.Names, core: torch.nn.Module, quant_cfg: dict[str, Any], shapes: Any) -> None:
    """Check that each matrix of this rank that will be quantized is stored by whole rows.

    Raises:
        NamesError: With the names of one that is not.
    """
    # Experts may be sources of one tensor: every rank then has one of them, and all ranks raise the error.
    by_source = {source: rule for rule in names.rules for source in rule.sources}
    modules = {id(module): name for name, module in core.named_modules()}
    for name, part in parts.own(core, {}).items():
        rule, module = by_source.get(name), modules[id(part.module)]
        is_linear = module.rpartition(".")[2].startswith(("linear_", "output_layer"))
        if rule is None or part.leaf != "weight" or len(shapes[name]) != 2 or not is_linear:
            continue
        if choices.enabled_quantizers(quant_cfg, module, ("weight_quantizer",)):
            names.rows(rule, shapes[name])

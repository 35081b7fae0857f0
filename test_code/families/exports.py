"""Write Hugging Face folders on ranks and compare them in `transformers` with the model in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from test_code.families import dequantized, jobs, models


def _rounding_inputs(core: torch.nn.Module, on: bool) -> None:
    """Switch the rounding of all inputs; factors of inputs stay."""
    for name, module in core.named_modules():
        if name.endswith("input_quantizer") and module.is_enabled:
            module.enable_quant() if on else module.disable_quant()


@contextlib.contextmanager
def _scales_in_bf16(core: torch.nn.Module) -> Iterator[None]:
    """Round the scales of INT4 blocks to bf16, as the layout of compressed-tensors stores them."""
    kept = []
    for name, module in core.named_modules():
        if name.endswith("weight_quantizer") and module.is_enabled and module.num_bits == 4:
            kept.append((module._amax, module._amax.clone()))
            module._amax.copy_((module._amax / 7).bfloat16().float() * 7)
    yield
    for amax, value in kept:
        amax.copy_(value)


@contextlib.contextmanager
def _logits_in_memory() -> Iterator[dict[tuple[str, bool], torch.Tensor]]:
    """Keep the logits of the model that a Quantizer returns.

    The keys are the layout whose scales the model has, and whether inputs are rounded.
    """
    from nemo.collections.llm.modelopt.quantization import quantizer as module
    from test_code.support import tiny

    found: dict[tuple[str, bool], torch.Tensor] = {}
    quantize = module.Quantizer.quantize

    def keep(self, model, forward_loop=None):
        quantized = quantize(self, model, forward_loop)
        core = tiny.core(quantized)
        for layout, scales in (("modelopt", contextlib.nullcontext()), ("compressed-tensors", _scales_in_bf16(core))):
            with scales:
                for on in (False, True):
                    _rounding_inputs(core, on)
                    found[layout, on] = jobs.core_logits(core)
        return quantized

    with mock.patch.object(module.Quantizer, "quantize", keep):
        yield found


def export(
    checkpoint: str | Path, target: str | Path, algorithm: str | None, layout: str = "auto", block: int = 32
) -> dict[str, Any]:
    """Write a checkpoint as a Hugging Face folder and read that with code of the tests alone.

    Args:
        checkpoint: The NeMo checkpoint.
        target: The folder.
        algorithm: Of ``QuantizationConfig``; None for a plain folder.
        layout: Of ``ExportConfig.hf_layout``.
        block: Of ``QuantizationConfig.awq_block_size``.

    Returns:
        Relative differences of the logits from the model in memory: ``difference`` without rounded inputs, ``rounded``
        with them, and ``rounding``, what rounding inputs changes in memory. ``left`` are the linear layers of the
        decoder that are not quantized, without routers.
    """
    from test_code.support import jobs_quant, ranks

    data = jobs_quant.corpus(Path(target).parent / "text.jsonl")
    settings = {"calibration_dataset": data, "calibration_dataset_size": 8, "enable_kv_cache": False}
    settings |= {"awq_block_size": block} if "awq" in str(algorithm) else {}
    with _logits_in_memory() as memory:
        jobs_quant.ptq(checkpoint, target, algorithm, "hf", quant=settings, export={"hf_layout": layout})
    ranks.reset()
    model, switch, layers = dequantized.load(target)
    written = dequantized.layout(target)
    exact, rounded = memory[written, False], memory[written, True]
    found: dict[str, Any] = {"rounding": jobs.difference(rounded, exact)}
    for name, expected in (("difference", exact), ("rounded", rounded)):
        switch.on = name == "rounded"
        with torch.no_grad():
            found[name] = jobs.difference(model(models.tokens()).logits[..., :256].float(), expected)
    head = model.get_output_embeddings()
    linear = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and part is not head}
    left = linear - set(layers) if algorithm else set()
    found["left"] = sorted(name for name in left if name.rpartition(".")[2] not in ("gate", "router"))
    return found

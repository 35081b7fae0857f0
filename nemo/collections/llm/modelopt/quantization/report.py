"""What quantization did to a model: loss, output error, quantizers and size, the same numbers on every rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero

from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from nemo.collections.llm.modelopt.quantization import calibration
from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices

KINDS = ("weight", "input", "output", "kv_cache")


@dataclass
class Evaluation:
    """Loss over some text, its final hidden states `[s, b, h]` (last stage only), and the error against others."""

    loss: float
    tokens: int
    relative_error: float | None = None
    hidden: list[torch.Tensor] = field(default_factory=list)


def is_comparable(model: Any) -> bool:
    """Return whether outputs of the model can be compared: a Megatron-Core language model in initialised groups."""
    return isinstance(model, LanguageModule) and parallel_state.model_parallel_is_initialized()


@torch.no_grad()
def evaluate(model, batches: list[torch.Tensor], reference: Evaluation | None = None, title="Evaluation") -> Evaluation:
    """Measure next-token loss, and the error of the logits relative to those of a reference.

    Works on any layout: hidden states exist on the last pipeline stage, where the output layer gives this rank's part
    `[s, b, v]` of the vocabulary. Hidden states are kept and not logits, which would take v / h times the memory.

    Args:
        model: This rank's Megatron-Core model.
        batches: This data-parallel rank's microbatches `[b, s]`.
        reference: What this function returned for the same batches before the model changed.
        title: Of the progress bar.

    Returns:
        Loss in nats for each token and ``||logits - reference|| / ||reference||``, over all ranks.
    """
    was_training = model.training
    model.eval()
    hidden: list[torch.Tensor] = []
    with calibration.output_layer_skipped(model):
        calibration.run_forward(model, batches, hidden.append, title)
    sums = torch.zeros(4, dtype=torch.float64, device=batches[0].device)
    for index, (states, tokens) in enumerate(zip(hidden, batches, strict=False)):
        logits = _logits(model, states)
        if reference is not None:
            expected = _logits(model, reference.hidden[index].to(states.device), quantized=False).double()
            sums[2] += (logits.double() - expected).square().sum()
            sums[3] += expected.square().sum()
        losses = _token_losses(logits, tokens)
        # Every tensor-parallel rank computes the whole loss: count it once.
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            sums[0] += losses.double().sum()
            sums[1] += losses.numel()
    model.train(was_training)
    torch.distributed.all_reduce(sums)
    loss_sum, tokens, error, norm = sums.tolist()
    return Evaluation(
        loss=loss_sum / max(tokens, 1),
        tokens=int(tokens),
        relative_error=None if reference is None else math.sqrt(error / norm) if norm else 0.0,
        hidden=[] if reference is not None else [states.cpu() for states in hidden],
    )


def _logits(model, hidden: torch.Tensor, quantized: bool = True) -> torch.Tensor:
    """Apply the output layer to `[s, b, h]`, with its quantizers or without."""
    weight = None
    if getattr(model, "share_embeddings_and_output_weights", False):
        weight = model.shared_embedding_or_output_weight()
    active = [m for m in model.output_layer.modules() if isinstance(m, TensorQuantizer) and m.is_enabled]
    if not quantized:
        for quantizer in active:
            quantizer.disable()
    try:
        return model.output_layer(hidden, weight=weight)[0]
    finally:
        if not quantized:
            for quantizer in active:
                quantizer.enable()


def _token_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return cross entropy `[s - 1, b]` of logits `[s, b, v]` against the next token of `[b, s]`."""
    labels = tokens.t()[1:].contiguous()
    # Megatron's cross entropy works in place on fp32 logits: give it a copy.
    return tensor_parallel.vocab_parallel_cross_entropy(logits[:-1].float().clone(), labels)


def _kind(name: str) -> str | None:
    leaf = next((part for part in reversed(name.split(".")) if part.endswith("_quantizer")), "")
    if leaf.endswith("bmm_quantizer"):
        return "kv_cache"
    kind = leaf.removesuffix("_quantizer").rsplit("_", 1)[-1]
    return kind if kind in KINDS else None


def _model_parallel_sum(values: list[float]) -> list[float]:
    """Add up over tensor and pipeline ranks."""
    if not parallel_state.model_parallel_is_initialized():
        return values
    group = parallel_state.get_model_parallel_group()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total, group=group)
    return total.tolist()


def count_quantizers(model) -> dict[str, int]:
    """Return the number of enabled quantizers of each kind, over all pipeline stages."""
    counts = dict.fromkeys(KINDS, 0)
    first = not parallel_state.model_parallel_is_initialized() or parallel_state.get_tensor_model_parallel_rank() == 0
    for name, module in model.named_modules():
        # The parts of a SequentialQuantizer (W4A8) are one quantizer in two steps.
        in_sequence = name.rsplit(".", 1)[-1].isdigit()
        is_quantizer = isinstance(module, (TensorQuantizer, SequentialQuantizer)) and not in_sequence
        kind = _kind(name) if is_quantizer else None
        # Tensor-parallel ranks hold shards of the same layers.
        if kind and first and _is_enabled(module):
            counts[kind] += 1
    return dict(zip(counts, map(int, _model_parallel_sum(list(counts.values()))), strict=True))


def _is_enabled(quantizer) -> bool:
    parts = quantizer if isinstance(quantizer, SequentialQuantizer) else [quantizer]
    return any(part.is_enabled for part in parts)


def model_bytes(model) -> tuple[int, int]:
    """Return the size of all weights as they are, and as they would be stored once quantized (scales in 4 bytes)."""
    tp_rank = parallel_state.get_tensor_model_parallel_rank() if parallel_state.model_parallel_is_initialized() else 0
    quantizers = {
        id(module.weight): module.weight_quantizer
        for module in model.modules()
        if isinstance(getattr(module, "weight_quantizer", None), (TensorQuantizer, SequentialQuantizer))
        and isinstance(getattr(module, "weight", None), torch.Tensor)
    }
    plain = quantized = 0.0
    for parameter in model.parameters():
        # Norms and the like are whole on every tensor-parallel rank.
        if tp_rank and not getattr(parameter, "tensor_model_parallel", False):
            continue
        stored = parameter.numel() * parameter.element_size()
        plain += stored
        quantizer = quantizers.get(id(parameter))
        if quantizer is None or not _is_enabled(quantizer):
            quantized += stored
            continue
        first = quantizer[0] if isinstance(quantizer, SequentialQuantizer) else quantizer
        scales = first.amax.numel() if first.amax is not None else 0
        quantized += parameter.numel() * choices.bits_of(first.num_bits) / 8 + 4 * scales
    plain, quantized = _model_parallel_sum([plain, quantized])
    return int(plain), int(quantized)


def describe(model, before: Evaluation | None, after: Evaluation | None, **facts: Any) -> dict[str, Any]:
    """Return the report: a plain dictionary of numbers and strings.

    Args:
        model: The quantized Megatron-Core model.
        before: The original's evaluation, None where nothing was compared.
        after: The quantized model's evaluation.
        **facts: Further entries, put first.
    """
    plain, quantized = model_bytes(model)
    report: dict[str, Any] = {
        **facts,
        "quantizers": count_quantizers(model),
        "weight_bytes_before": plain,
        "weight_bytes_after": quantized,
    }
    if before is not None and after is not None:
        report.update(
            evaluation_tokens=after.tokens,
            loss_before=before.loss,
            loss_after=after.loss,
            perplexity_before=_perplexity(before.loss),
            perplexity_after=_perplexity(after.loss),
            relative_output_error=after.relative_error,
        )
    return report


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def table(report: dict[str, Any]) -> str:
    """Return the report as lines "name  before  after" for people."""
    rows = [("", "original", "quantized")]
    if "loss_before" in report:
        rows += [
            ("loss (nats/token)", f"{report['loss_before']:.4f}", f"{report['loss_after']:.4f}"),
            ("perplexity", f"{report['perplexity_before']:.2f}", f"{report['perplexity_after']:.2f}"),
            ("relative output error", "", f"{report['relative_output_error']:.2%}"),
        ]
    mib = 2**20
    sizes = (report["weight_bytes_before"] / mib, report["weight_bytes_after"] / mib)
    rows.append(("weights (MiB)", f"{sizes[0]:.2f}", f"{sizes[1]:.2f}"))
    rows += [(f"{kind} quantizers", "0", str(count)) for kind, count in report["quantizers"].items()]
    return "\n".join(f"  {name:<24}{first:>12}{second:>12}" for name, first, second in rows)


def log(report: dict[str, Any]) -> None:
    """Write the table to NeMo's log, on rank zero."""
    if not is_global_rank_zero():
        return
    where = "held-out" if report.get("held_out") else "calibration"
    tokens = f" on {report['evaluation_tokens']} {where} tokens" if "evaluation_tokens" in report else ""
    logging.info(f"Quantization with {report.get('algorithm')}{tokens}:\n{table(report)}")

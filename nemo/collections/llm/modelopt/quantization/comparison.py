"""Measure what quantization did to a model: loss, output error, quantizers and size, equally on all ranks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero

from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from nemo_modelopt_dropin.console import screen

from .. import _heldout, _parallel
from . import quant_cfg_choices as choices
from .calibration import batching

KINDS = ("weight", "input", "output", "kv_cache")
_SHOWN_LAYERS = 3
# The size of one model's fp32 logits that are processed at a time. Losses and divergence pass over them some 20 times,
# so they should fit a cache, and the allocator should reuse their memory.
_LOGITS_BYTES = 16 << 20
# What these passes cost for a logit, in products of its matrix multiplication.
_PASSES = 1000
_STORED_BYTES = 2
_PLAIN = (str, int, float, bool, list, type(None))


@dataclass
class Evaluation:
    """The loss of a model on some text, compared with the original model.

    Attributes:
        loss: Next-token cross entropy in nats per token.
        reference_loss: The loss of the original model.
        tokens: The number of predicted tokens.
        relative_error: ``||logits - original's|| / ||original's||``.
        kl: KL(original || model) in nats per position.
    """

    loss: float
    reference_loss: float
    tokens: int
    relative_error: float
    kl: float


def is_comparable(model: Any) -> bool:
    """Return whether outputs can be compared: the model is Megatron-Core's and the process groups are initialized."""
    return isinstance(model, LanguageModule) and parallel_state.model_parallel_is_initialized()


def share_of_calibration(model) -> float:
    """Return how many tokens can be compared in the time in which one token calibrates; equal on all ranks.

    A compared token passes through the original and the quantized decoder, and twice through the output layer. Three
    tenths of the time are left for quantizing the weights, which takes as long for any number of tokens.
    """
    config, width = model.config, model.config.hidden_size
    experts = config.moe_router_topk if getattr(config, "num_moe_experts", None) else 0
    ffn = experts * (config.moe_ffn_hidden_size or config.ffn_hidden_size) if experts else config.ffn_hidden_size
    decoder = config.num_layers * width * (4 * width + 3 * ffn)
    output = (width + _PASSES) * model.vocab_size
    return 0.7 * decoder / (2 * decoder + 2 * output)


def hidden_states(model, batches: list[torch.Tensor], title: str) -> list[torch.Tensor]:
    """Return the final hidden states `[s, b, h]` of each micro-batch `[b, s]`; an empty list before the last stage.

    Logits would take v / h times the memory.
    """
    was_training = model.training
    model.eval()
    states: list[torch.Tensor] = []
    with batching.output_layer_skipped(model):
        batching.run_forward(model, batches, states.append, title)
    model.train(was_training)
    return states


@torch.no_grad()
def evaluate(
    model, batches: list[torch.Tensor], reference: list[torch.Tensor], title: str = "Evaluation"
) -> Evaluation:
    """Measure the next-token loss, and the distance of the logits from the original model's.

    Any parallel layout works: hidden states exist on the last pipeline stage, where the output layer computes this
    rank's part `[s, b, v]` of the vocabulary, for a few tokens of both models at a time.

    Args:
        model: This rank's Megatron-Core model.
        batches: This data-parallel rank's micro-batches `[b, s]`.
        reference: What `hidden_states` returned for the same batches before the model changed.
        title: The title of the progress bar.

    Returns:
        The figures over all ranks, see `Evaluation`.
    """
    hidden = hidden_states(model, batches, title)
    sums = torch.zeros(7, dtype=torch.float64, device=batches[0].device)
    chunks = [(i, *chunk) for i, tokens in enumerate(batches[: len(hidden)]) for chunk in _chunks(model, tokens)]
    shown = batching.with_progress(chunks, len(chunks), f"{title}: logits") if chunks else iter(())
    for i, positions, columns in shown:
        states, expected = (one[i][positions, columns] for one in (hidden, reference))
        # A position predicts the next token, which may be in the next chunk; the last one of a sequence predicts none.
        labels = batches[i][columns].t()[positions.start + 1 : positions.stop + 1]
        sums += _sums(model, states, expected.to(states.device), labels)
    torch.distributed.all_reduce(sums)
    loss, reference_loss, tokens, error, norm, divergence, positions = sums.tolist()
    return Evaluation(
        loss=loss / max(tokens, 1),
        reference_loss=reference_loss / max(tokens, 1),
        tokens=int(tokens),
        relative_error=math.sqrt(error / norm) if norm else 0.0,
        # Rounding may make it negative if the models agree.
        kl=max(0.0, divergence / max(positions, 1)),
    )


def _chunks(model, tokens: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield positions and sequences of tokens `[b, s]` whose logits are processed at a time."""
    vocabulary = int(getattr(model.output_layer, "output_size_per_partition", model.vocab_size))
    count, length = tokens.shape
    most = max(1, _LOGITS_BYTES // (4 * vocabulary))
    # With sequence parallelism, ranks hold parts of the positions, and the output layer gathers whole sequences.
    rows = length if model.config.sequence_parallel else min(length, most)
    columns = max(1, most // length)
    for first in range(0, count, columns):
        for start in range(0, length, rows):
            yield slice(start, min(start + rows, length)), slice(first, first + columns)


def _sums(model, states: torch.Tensor, expected: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sums [7] from which `Evaluation` is computed.

    Args:
        model: This rank's Megatron-Core model.
        states: Its hidden states `[s, b, h]`.
        expected: Those of the original model.
        labels: The next token of each position, `[s, b]`, or `[s - 1, b]` at the end of the sequences.
    """
    # Every tensor-parallel rank computes the whole loss and divergence, so only one of them counts.
    counts = int(parallel_state.get_tensor_model_parallel_rank() == 0)
    sums = torch.zeros(7, dtype=torch.float64, device=states.device)
    logits, original = (one.float() for one in _logits_of_both(model, states, expected))
    divergence = _heldout.divergence(logits, original)
    sums[5] = _heldout.weighted_sum(divergence) * counts
    sums[6] = divergence.numel() * counts
    sums[4] = torch.linalg.vector_norm(original).double().square()
    sums[3] = torch.linalg.vector_norm(logits - original).double().square()
    losses = _token_losses(logits, labels)
    sums[0] = _heldout.weighted_sum(losses) * counts
    sums[1] = _heldout.weighted_sum(_token_losses(original, labels)) * counts
    sums[2] = losses.numel() * counts
    return sums


def _logits_of_both(model, states: torch.Tensor, expected: torch.Tensor) -> Iterable[torch.Tensor]:
    """Return the logits `[s, b, v]` of hidden states `[s, b, h]` of the quantized and of the original model."""
    weight = None
    if getattr(model, "share_embeddings_and_output_weights", False):
        weight = model.shared_embedding_or_output_weight()
    active = [m for m in model.output_layer.modules() if isinstance(m, TensorQuantizer) and m.is_enabled]
    if not active:  # the same layer: its weight, often the largest of the model, is read once
        axis = 1 if model.config.sequence_parallel else 0
        return model.output_layer(torch.cat([states, expected], axis), weight=weight)[0].chunk(2, axis)
    logits = model.output_layer(states, weight=weight)[0]
    for quantizer in active:
        quantizer.disable()
    try:
        return logits, model.output_layer(expected, weight=weight)[0]
    finally:
        for quantizer in active:
            quantizer.enable()


def _token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of fp32 logits `[s, b, v]`, which are overwritten, for the labels of the first ones."""
    # Megatron's cross entropy works in place.
    return tensor_parallel.vocab_parallel_cross_entropy(logits[: labels.shape[0]].contiguous(), labels.contiguous())


def _kind(name: str) -> str | None:
    leaf = next((part for part in reversed(name.split(".")) if part.endswith("_quantizer")), "")
    if leaf.endswith("bmm_quantizer"):
        return "kv_cache"
    kind = leaf.removesuffix("_quantizer").rsplit("_", 1)[-1]
    return kind if kind in KINDS else None


def count_quantizers(model) -> dict[str, int]:
    """Return the number of enabled quantizers of each kind, over all pipeline stages."""
    counts = dict.fromkeys(KINDS, 0)
    first = not parallel_state.model_parallel_is_initialized() or parallel_state.get_tensor_model_parallel_rank() == 0
    for name, module in model.named_modules():
        # The parts of a SequentialQuantizer (W4A8) are the two steps of one quantizer.
        in_sequence = name.rsplit(".", 1)[-1].isdigit()
        is_quantizer = isinstance(module, (TensorQuantizer, SequentialQuantizer)) and not in_sequence
        kind = _kind(name) if is_quantizer else None
        # Tensor-parallel ranks hold shards of the same layers.
        if kind and first and _is_enabled(module):
            counts[kind] += 1
    return dict(zip(counts, map(int, _parallel.model_parallel_sum(list(counts.values()))), strict=True))


def _is_enabled(quantizer) -> bool:
    parts = quantizer if isinstance(quantizer, SequentialQuantizer) else [quantizer]
    return any(part.is_enabled for part in parts)


def model_bytes(model) -> tuple[int, int]:
    """Return the size of all weights in 16 bits, and as stored after quantization (scales in 4 bytes).

    The size in memory would not be comparable: on CPU ranks weights are fp32.
    """
    quantizers = {
        id(module.weight): module.weight_quantizer
        for module in model.modules()
        if isinstance(getattr(module, "weight_quantizer", None), (TensorQuantizer, SequentialQuantizer))
        and isinstance(getattr(module, "weight", None), torch.Tensor)
    }
    plain = quantized = 0.0
    for _, parameter in _parallel.own_parameters(model):
        stored = parameter.numel() * min(_STORED_BYTES, parameter.element_size())
        plain += stored
        quantizer = quantizers.get(id(parameter))
        if quantizer is None or not _is_enabled(quantizer):
            quantized += stored
            continue
        first = quantizer[0] if isinstance(quantizer, SequentialQuantizer) else quantizer
        scales = first.amax.numel() if first.amax is not None else 0
        quantized += parameter.numel() * choices.bits_of(first.num_bits) / 8 + 4 * scales
    plain, quantized = _parallel.model_parallel_sum([plain, quantized])
    return int(plain), int(quantized)


def describe(model, measured: Evaluation | None) -> dict[str, Any]:
    """Return the report: a plain dictionary of numbers and strings.

    Args:
        model: The quantized Megatron-Core model.
        measured: The comparison with the original, None if nothing was compared.
    """
    plain, quantized = model_bytes(model)
    report: dict[str, Any] = {
        "quantizers": count_quantizers(model),
        "weight_bytes_before": plain,
        "weight_bytes_after": quantized,
    }
    if measured is not None:
        report.update(
            evaluation_tokens=measured.tokens,
            loss_before=measured.reference_loss,
            loss_after=measured.loss,
            perplexity_before=_perplexity(measured.reference_loss),
            perplexity_after=_perplexity(measured.loss),
            relative_output_error=measured.relative_error,
            kl_to_original=measured.kl,
        )
    return report


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def table(report: dict[str, Any]) -> str:
    """Return the report as text, in lines of "name  before  after"."""
    rows = [("", "original", "quantized")]
    if "loss_before" in report:
        rows += [
            ("loss (nats/token)", f"{report['loss_before']:.4f}", f"{report['loss_after']:.4f}"),
            ("perplexity", f"{report['perplexity_before']:.2f}", f"{report['perplexity_after']:.2f}"),
            ("relative output error", "", f"{report['relative_output_error']:.2%}"),
            ("KL to the original (nats)", "", f"{report['kl_to_original']:.2e}"),
        ]
    mib = 2**20
    sizes = (report["weight_bytes_before"] / mib, report["weight_bytes_after"] / mib)
    rows.append(("weights in this format (MiB)", f"{sizes[0]:.2f}", f"{sizes[1]:.2f}"))
    rows += [(f"{kind} quantizers", "0", str(count)) for kind, count in report["quantizers"].items()]
    if "effective_bits" in report:
        rows.append(("bits of a weight", "16", f"{report['effective_bits']:.2f}"))
    lines = [f"  {name:<28}{first:>12}{second:>12}" for name, first, second in rows]
    chosen = Counter((report.get("formats") or {}).values())
    if chosen:
        lines.append("  layers by format: " + ", ".join(f"{count} {name}" for name, count in chosen.most_common()))
    for row in report.get("layers", [])[:_SHOWN_LAYERS]:
        errors = [f"{row[key]:.1f} dB" if key in row else "" for key in ("weight_sqnr_db", "activation_sqnr_db")]
        lines.append(f"  {row['layer']:<44}{errors[0]:>12}{errors[1]:>12}")
    if report.get("layers"):
        lines.insert(
            -min(len(report["layers"]), _SHOWN_LAYERS), f"  {'layers, worst first':<44}{'weight':>12}{'input':>12}"
        )
    costly = report.get("sensitivity", [])[:_SHOWN_LAYERS]
    if costly:
        lines.append(f"  {'alone quantized, costliest first':<44}{'KL (nats)':>12}")
        lines += [f"  {row['group']:<44}{row['kl_to_original']:>12.2e}" for row in costly]
    return "\n".join(lines)


def log(report: dict[str, Any]) -> None:
    """Write the table to NeMo's log, on rank zero."""
    if not is_global_rank_zero():
        return
    rows = "that did not calibrate" if report.get("held_out") else "that calibrated it"
    count = report.get("evaluation_tokens")
    tokens = "" if count is None else f", compared on {count} tokens of the calibration data {rows}"
    with screen.results():
        logging.info(f"Quantization with {report.get('algorithm')}{tokens}:\n{table(report)}")


def bytes_on_disk(folder: Path) -> int | None:
    """Return the number of bytes that a model takes on disk; None if there is no folder.

    For a NeMo checkpoint the index of its files is used, and the state of the optimizer is not counted.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    index = folder / "weights" / ".metadata"
    if not index.is_file():
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    from torch.distributed.checkpoint import FileSystemReader

    stored = FileSystemReader(str(index.parent)).read_metadata().storage_data or {}
    return sum(place.length for key, place in stored.items() if not key.fqn.startswith("optimizer"))


def sizes_on_disk(original: Any, exported: Path) -> dict[str, int]:
    """Return "disk_bytes_before" and "disk_bytes_after" as measured by rank zero; all ranks must call it."""
    sizes: dict[str, int | None] = {}
    if is_global_rank_zero():
        sizes = {"disk_bytes_before": bytes_on_disk(original), "disk_bytes_after": bytes_on_disk(exported)}
    return _parallel.from_rank_zero({name: size for name, size in sizes.items() if size is not None})


def write(content: dict[str, Any], config: Any, folder: Path) -> None:
    """Write the files of the report on rank zero; a failure is only logged, because the checkpoint is complete.

    Args:
        content: The report.
        config: The QuantizationConfig.
        folder: The folder for the files.
    """
    if not is_global_rank_zero():
        return
    from nemo_modelopt_dropin.report import quantization as quantization_report

    settings = {name: str(value) if not isinstance(value, _PLAIN) else value for name, value in vars(config).items()}
    try:
        page = quantization_report.write({**content, "settings": settings}, folder)
    except (OSError, ImportError) as error:
        logging.error(f"The report could not be written to {folder}: {error}")
        return
    with screen.results():
        logging.info(f"The report of the quantization is {page}.")

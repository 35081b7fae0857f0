"""From text to tokens, sequences, micro-batches and forward passes through the pipeline.

All steps but the last are pure functions of lists; the forward passes are run by Megatron's own schedule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero

from nemo_modelopt_dropin.console import screen
from nemo_modelopt_dropin.preflight import chat_rows

from ... import _heldout
from ...errors import ModelOptConfigError
from . import sources

# Enough characters for a token in any language; the rest of a document would be tokenized for nothing.
_CHARACTERS_PER_TOKEN = 16
_STOCK_CHARACTERS_PER_TOKEN = 4
# Tokens in a micro-batch on the CPU: with more, attention scores exceed its caches, which takes 1/8 longer.
_CPU_TOKENS = 2048


def characters(seq_len: int, as_stock: bool = False) -> int:
    """Return the number of characters of a text that are tokenized for ``seq_len`` tokens."""
    return seq_len * (_STOCK_CHARACTERS_PER_TOKEN if as_stock else _CHARACTERS_PER_TOKEN)


def tokenize(
    rows: Iterable[str | list[int] | chat_rows.Chat],
    tokenizer: Any,
    seq_len: int | None,
    name: str = "calibration_dataset",
) -> list[list[int]]:
    """Return the first ``seq_len`` token ids of each row; rows without tokens are skipped.

    Args:
        rows: Texts, lists of token ids, or conversations.
        tokenizer: NeMo's tokenizer; texts are encoded in one call if it wraps a fast Hugging Face tokenizer.
        seq_len: The number of token ids to keep, None for all.
        name: The name of the rows in error messages.

    Raises:
        ModelOptConfigError: If a token id is not in the vocabulary, or the tokenizer of a conversation has no chat
            template.
    """
    rows = list(rows)
    encoded = iter(_encode([row for row in rows if isinstance(row, str)], tokenizer))
    size = getattr(tokenizer, "vocab_size", None)
    tokenized = []
    for row in rows:
        ids = list((next(encoded) if isinstance(row, str) else _ids(row, tokenizer, name))[:seq_len])
        if ids and isinstance(row, list) and isinstance(size, int) and not 0 <= min(ids) <= max(ids) < size:
            raise ModelOptConfigError(
                f"{name} holds the token id {max(ids) if max(ids) >= size else min(ids)}; the model's "
                f"vocabulary has {size}, numbered from 0."
            )
        tokenized.append(ids)
    return [ids for ids in tokenized if ids]


def _ids(row: list[int] | chat_rows.Chat, tokenizer: Any, name: str) -> list[int]:
    if not isinstance(row, chat_rows.Chat):
        return row
    try:
        return chat_rows.encode(row, tokenizer)
    except chat_rows.ChatError as error:
        raise ModelOptConfigError(f"{name}: {error}") from error


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each text, in one call if the tokenizer supports it."""
    from nemo.collections.common.tokenizers import AutoTokenizer

    inner: Any = getattr(tokenizer, "tokenizer", None)
    is_plain = isinstance(tokenizer, AutoTokenizer) and type(tokenizer).text_to_ids is AutoTokenizer.text_to_ids
    if not (texts and is_plain and getattr(inner, "is_fast", False)):
        return [list(tokenizer.text_to_ids(text)) for text in texts]
    # Truncation by the tokenizer is not used: it would stay enabled in the tokenizer and in the copy that is exported.
    return inner(texts, add_special_tokens=tokenizer.include_special_tokens, verbose=False)["input_ids"]


def pack(rows: list[list[int]], seq_len: int, separator: int) -> list[list[int]]:
    """Join the rows with ``separator`` between them and cut the result into sequences of ``seq_len`` tokens.

    No position is padding, so no padding enters the statistics. The last sequence may be shorter.
    """
    stream: list[int] = []
    for index, row in enumerate(rows):
        if index:
            stream.append(separator)
        stream.extend(row)
    return [stream[start : start + seq_len] for start in range(0, len(stream), seq_len)]


def share_of_rank(sequences: list, rank: int, ranks: int) -> list:
    """Return this rank's part of the sequences, or all of them if there are fewer sequences than ranks.

    A rank without data would have no amax, and the reduction over ranks would wait for it forever.
    """
    return sequences[rank::ranks] if len(sequences) >= ranks else sequences


def micro_batches(sequences: list[list[int]], batch_size: int) -> list[torch.Tensor]:
    """Return tensors `[b, s]` of at most ``batch_size`` sequences of equal length, longest first. All are used."""
    by_length: dict[int, list[list[int]]] = {}
    for sequence in sequences:
        by_length.setdefault(len(sequence), []).append(sequence)
    return [
        torch.tensor(group[start : start + batch_size])
        for _, group in sorted(by_length.items(), reverse=True)
        for start in range(0, len(group), batch_size)
    ]


def arrange(rows, seq_len: int, batch_size: int, tokenizer: Any, packed: bool, shard: bool) -> list[torch.Tensor]:
    """Return the micro-batches `[b, s]` of tokenized rows, for all ranks or for this one.

    Rows that are not packed are batched with rows of the same length only. Because attention is causal, the activations
    of a row are the same as with padding after it, and there are no activations of padding.
    """
    if not rows:
        return []
    sequences = pack(rows, seq_len, tokenizer.eos) if packed else rows
    if shard:
        sequences = share_of_rank(sequences, *data_parallel_position())
    return micro_batches(sequences, batch_size)


def iterator_getter(
    read: Callable[[], list], model: Any, seq_len: int, batch_size: int, packed: bool, shard: bool
) -> Callable[[], Iterator[torch.Tensor]]:
    """Return a function that returns an iterator over micro-batches `[b, s]` on the model's device.

    Args:
        read: Returns the rows; it is called once, when the first iterator is made.
        model: The ``llm.GPTModel``: its tokenizer and device are used.
        seq_len: Tokens in a sequence.
        batch_size: Sequences in a micro-batch; fewer on the CPU if ``shard`` is set and the sequences are long.
        packed: Join rows into full sequences.
        shard: Use this data-parallel rank's part only.
    """
    cache: list[torch.Tensor] = []
    if shard and str(model.device).startswith("cpu"):
        # Data that may be divided among ranks may also be divided into smaller micro-batches.
        batch_size = min(batch_size, max(1, _CPU_TOKENS // seq_len))

    def iterate():
        if not cache:
            rows = tokenize(read(), model.tokenizer, seq_len)
            cache.extend(arrange(rows, seq_len, batch_size, model.tokenizer, packed, shard))
        return iter([batch.to(model.device) for batch in cache])

    return iterate


def collect(batches: Iterable[list], name: Any, requested: int) -> list:
    """Return all rows as one list, and log a warning if there are fewer than requested.

    Args:
        batches: Lists of rows.
        name: The dataset, for the messages.
        requested: The number of rows that should calibrate.

    Raises:
        ModelOptConfigError: If there is no row.
    """
    rows = [row for batch in batches for row in batch]
    label = sources.label(name)
    if not rows:
        raise ModelOptConfigError(f"calibration_dataset={label!r} has no row with text.")
    if len(rows) < requested:
        logging.warning(
            f"calibration_dataset_size={requested}, but {label} has {len(rows)} rows with text: using these"
        )
    return rows


def split_rows(available: int, requested: int, evaluation: int) -> tuple[slice, slice, bool]:
    """Divide the rows into those that calibrate and those on which the models are compared.

    Args:
        available: The number of rows, at most ``requested + evaluation``.
        requested: Rows requested for calibration.
        evaluation: Rows requested for the comparison.

    Returns:
        The slices for calibration and comparison, and whether the rows of the comparison are held out. If there are
        more rows than requested, the comparison uses the additional rows. Otherwise one sixteenth is held out. With
        fewer than 16 rows, all of them calibrate and the comparison uses the same rows.
    """
    if evaluation <= 0:
        return slice(0, min(available, requested)), slice(0, 0), False
    if available > requested:
        return slice(0, requested), slice(requested, requested + evaluation), True
    withheld = min(available // 16, evaluation)
    if withheld:
        return slice(0, available - withheld), slice(available - withheld, available), True
    return slice(0, available), slice(0, min(available, evaluation)), False


def with_progress(items: Iterable, total: int | None, title: str) -> Iterator:
    """Return an iterator over ``items`` that advances a progress bar on rank zero."""
    return iter(screen.bar(items, total=total, desc=title, disable=not is_global_rank_zero()))


def forward_step(consume: Callable[[torch.Tensor], None] | None = None) -> Callable:
    """Return a forward step for Megatron's schedules that feeds token ids to the model.

    Args:
        consume: Called on the last pipeline stage with the output of each micro-batch.
    """

    def step(data_iterator, model):
        tokens = next(data_iterator)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        # Without a mask, Megatron's attention is causal.
        output = model(tokens, positions, None)

        def no_loss(tensor):
            if consume is not None:
                consume(tensor)
            # Where the output is: Megatron keeps the scale of the auxiliary losses of experts on that device.
            return torch.zeros(1, device=tensor.device if isinstance(tensor, torch.Tensor) else None), {}

        return output, no_loss

    return step


def run_forward(model, batches: list[torch.Tensor], consume=None, title: str = "Calibration") -> None:
    """Run micro-batches `[b, s]` through all pipeline stages, without gradients.

    Args:
        model: This rank's pipeline stage: a Megatron-Core model.
        batches: The micro-batches; all stages must pass the same number, with the same shapes.
        consume: See `forward_step`.
        title: The title of the progress bar.
    """
    progress = with_progress(range(len(batches)), len(batches), title)

    def ticking(run: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        return (batch for batch, _ in zip(run, progress, strict=False))

    _heldout.run_forward(model, batches, forward_step(consume), lambda batch: tuple(batch.shape), ticking)
    # Advance the progress bar past the last item, which closes it.
    next(progress, None)


def fixed_schedule(num_batches, seq_length, micro_batch_size, decoder_seq_length) -> dict[str, Any]:
    """Return Megatron's schedule, with the number and the sizes of the micro-batches for one call of it."""
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    return {
        "schedule": get_forward_backward_func(),
        "num_microbatches": num_batches,
        "seq_length": seq_length,
        "micro_batch_size": micro_batch_size,
        "decoder_seq_length": decoder_seq_length,
    }


def run_loader(model, get_dataloader: Callable[[], Iterator], fixed: dict[str, Any] | None) -> None:
    """Run the micro-batches of a data loader through the pipeline.

    Args:
        model: This rank's pipeline stage: a Megatron-Core model.
        get_dataloader: Returns an iterator over micro-batches `[b, s]`.
        fixed: What `fixed_schedule` returned, to make one call of it as stock does. None uses the number and sizes of
            the data, and skips the output layer unless it is quantized.
    """
    if fixed is None:
        with output_layer_skipped(model, unless_quantized=True):
            run_forward(model, list(get_dataloader()))
        return
    schedule, sizes = fixed["schedule"], {name: value for name, value in fixed.items() if name != "schedule"}
    schedule(model=model, data_iterator=get_dataloader(), forward_step_func=forward_step(), forward_only=True, **sizes)


@contextlib.contextmanager
def output_layer_skipped(model, unless_quantized: bool = False) -> Iterator[None]:
    """Make a Megatron-Core GPT or Mamba model return hidden states instead of logits within the context.

    The output layer takes about half of the time of a calibration pass and most of its memory, and is not calibrated
    unless it is quantized itself.

    Args:
        model: This rank's Megatron-Core model.
        unless_quantized: Keep an output layer that has an enabled quantizer.
    """
    skip = getattr(model, "post_process", False) is True and not getattr(model, "mtp_process", False)
    if skip and unless_quantized:
        quantizers = (m for n, m in model.output_layer.named_modules() if n.endswith("_quantizer"))
        skip = not any(getattr(quantizer, "is_enabled", True) for quantizer in quantizers)
    if skip:
        model.post_process = False
    try:
        yield
    finally:
        if skip:
            model.post_process = True


def data_parallel_position() -> tuple[int, int]:
    """Return this process's data-parallel rank and the number of ranks; (0, 1) if the data must not be divided.

    Expert-parallel ranks exchange tokens in every layer, so all of them need the same number of micro-batches.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized() or parallel_state.get_expert_model_parallel_world_size() > 1:
        return 0, 1
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

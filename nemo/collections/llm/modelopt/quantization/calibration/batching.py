"""Calibration: text -> tokens -> sequences -> microbatches -> forward passes through the pipeline.

All but the last step are pure functions of lists; the last one is Megatron's own schedule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero

from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo.collections.llm.modelopt.quantization.calibration import sources
from nemo_modelopt_dropin.console import screen
from nemo_modelopt_dropin.preflight import chat_rows

# Long enough for `seq_len` tokens of any language's text; the rest of a document would be tokenized in vain.
CHARACTERS_PER_TOKEN = 16
STOCK_CHARACTERS_PER_TOKEN = 4
# Of a microbatch on the CPU: attention's scores of more do not fit its caches, which costs an eighth of the time.
_CPU_TOKENS = 2048


def tokenize(
    rows: Iterable[str | list[int] | chat_rows.Chat],
    tokenizer: Any,
    seq_len: int | None,
    name: str = "calibration_dataset",
) -> list[list[int]]:
    """Return the first ``seq_len`` token ids of each row; rows without tokens are left out.

    Args:
        rows: Texts, lists of token ids, or conversations.
        tokenizer: NeMo's tokenizer; texts are encoded all at once if it wraps a fast one of Hugging Face.
        seq_len: Token ids to keep, None for all.
        name: What an error calls the rows.

    Raises:
        ModelOptConfigError: For a token id that is not in the vocabulary, or a conversation and a tokenizer without a
            chat template.
    """
    rows = list(rows)
    encoded = iter(_encode([row for row in rows if isinstance(row, str)], tokenizer))
    size = getattr(tokenizer, "vocab_size", None)
    found = []
    for row in rows:
        ids = list((next(encoded) if isinstance(row, str) else _ids(row, tokenizer, name))[:seq_len])
        if ids and isinstance(row, list) and isinstance(size, int) and not 0 <= min(ids) <= max(ids) < size:
            raise ModelOptConfigError(
                f"{name} holds the token id {max(ids) if max(ids) >= size else min(ids)}; the model's "
                f"vocabulary has {size}, numbered from 0."
            )
        found.append(ids)
    return [ids for ids in found if ids]


def _ids(row: list[int] | chat_rows.Chat, tokenizer: Any, name: str) -> list[int]:
    if not isinstance(row, chat_rows.Chat):
        return row
    try:
        return chat_rows.encode(row, tokenizer)
    except chat_rows.ChatError as error:
        raise ModelOptConfigError(f"{name}: {error}") from error


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each text, in one call where the tokenizer can."""
    from nemo.collections.common.tokenizers import AutoTokenizer

    inner: Any = getattr(tokenizer, "tokenizer", None)
    is_plain = isinstance(tokenizer, AutoTokenizer) and type(tokenizer).text_to_ids is AutoTokenizer.text_to_ids
    if not (texts and is_plain and getattr(inner, "is_fast", False)):
        return [list(tokenizer.text_to_ids(text)) for text in texts]
    # Not its truncation: that would stay switched on in the tokenizer, and in the copy that an export saves.
    return inner(texts, add_special_tokens=tokenizer.include_special_tokens, verbose=False)["input_ids"]


def pack(rows: list[list[int]], seq_len: int, separator: int) -> list[list[int]]:
    """Join rows with ``separator`` between them and cut the whole into sequences of ``seq_len``.

    No position is padding, so none enters the statistics. The last sequence may be shorter.
    """
    stream: list[int] = []
    for index, row in enumerate(rows):
        if index:
            stream.append(separator)
        stream.extend(row)
    return [stream[start : start + seq_len] for start in range(0, len(stream), seq_len)]


def share_of_rank(sequences: list, rank: int, ranks: int) -> list:
    """Return this rank's part of the sequences; with fewer sequences than ranks, every rank gets them all.

    A rank without data would have no amax, and the reduction over ranks would wait for it forever.
    """
    return sequences[rank::ranks] if len(sequences) >= ranks else sequences


def microbatches(sequences: list[list[int]], batch_size: int) -> list[torch.Tensor]:
    """Return tensors `[b, s]` of at most ``batch_size`` sequences of equal length, longest first; all are used."""
    by_length: dict[int, list[list[int]]] = {}
    for sequence in sequences:
        by_length.setdefault(len(sequence), []).append(sequence)
    return [
        torch.tensor(group[start : start + batch_size])
        for _, group in sorted(by_length.items(), reverse=True)
        for start in range(0, len(group), batch_size)
    ]


def arrange(rows, seq_len: int, batch_size: int, tokenizer: Any, packed: bool, shard: bool) -> list[torch.Tensor]:
    """Return the microbatches `[b, s]` of tokenized rows, of all ranks or of this one.

    Rows that are not packed meet others of the same length only. Attention looks back, so a row's activations are what
    they would be with padding behind it, and the padding's own never arise.
    """
    if not rows:
        return []
    sequences = pack(rows, seq_len, tokenizer.eos) if packed else rows
    if shard:
        sequences = share_of_rank(sequences, *data_parallel_position())
    return microbatches(sequences, batch_size)


def iterator_getter(
    read: Callable[[], list], model: Any, seq_len: int, batch_size: int, packed: bool, shard: bool
) -> Callable[[], Iterator[torch.Tensor]]:
    """Return a function that gives an iterator over microbatches `[b, s]` on the model's device.

    Args:
        read: Returns the rows; called once, when the first iterator is made.
        model: The ``llm.GPTModel``: its tokenizer and device are used.
        seq_len: See `arrange`, and so for the others.
        batch_size: Sequences in a microbatch, on the CPU fewer where the data may be divided and they are long.
        packed: Join rows into full sequences.
        shard: Give this data-parallel rank its part only.
    """
    cache: list[torch.Tensor] = []
    if shard and str(model.device).startswith("cpu"):
        # What may be divided over ranks may be divided over microbatches.
        batch_size = min(batch_size, max(1, _CPU_TOKENS // seq_len))

    def iterate():
        if not cache:
            rows = tokenize(read(), model.tokenizer, seq_len)
            cache.extend(arrange(rows, seq_len, batch_size, model.tokenizer, packed, shard))
        return iter([batch.to(model.device) for batch in cache])

    return iterate


def collect(batches: Iterable[list], name: Any, wanted: int) -> list:
    """Return all rows as one list, and say so where there are fewer than wanted.

    Raises:
        ModelOptConfigError: If there is none.
    """
    rows = [row for batch in batches for row in batch]
    label = sources.label(name)
    if not rows:
        raise ModelOptConfigError(f"calibration_dataset={label!r} has no row with text.")
    if len(rows) < wanted:
        logging.warning(f"calibration_dataset_size={wanted}, but {label} has {len(rows)} rows with text: using these")
    return rows


def split_rows(available: int, wanted: int, evaluation: int) -> tuple[slice, slice, bool]:
    """Divide rows into those that calibrate and those that compare.

    Args:
        available: Rows there are, at most ``wanted + evaluation``.
        wanted: Rows asked for calibration.
        evaluation: Rows asked for the comparison.

    Returns:
        The slices for calibration and comparison, and whether the comparison's are held out. Rows after those that
        calibrate are used first; without such, a sixteenth is withheld; with fewer than 16 rows all of them calibrate
        and the comparison runs on the same.
    """
    if evaluation <= 0:
        return slice(0, min(available, wanted)), slice(0, 0), False
    if available > wanted:
        return slice(0, wanted), slice(wanted, wanted + evaluation), True
    withheld = min(available // 16, evaluation)
    if withheld:
        return slice(0, available - withheld), slice(available - withheld, available), True
    return slice(0, available), slice(0, min(available, evaluation)), False


def same_shape_runs(batches: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield runs of consecutive microbatches of one shape: pipeline stages exchange tensors of a fixed shape."""
    run: list[torch.Tensor] = []
    for batch in batches:
        if run and run[-1].shape != batch.shape:
            yield run
            run = []
        run.append(batch)
    if run:
        yield run


def ticking(items: Iterable, total: int | None, title: str) -> Iterator:
    """Return an iterator over ``items`` that advances a progress bar on rank zero."""
    return iter(screen.bar(items, total=total, desc=title, disable=not is_global_rank_zero()))


def forward_step(consume: Callable[[torch.Tensor], None] | None = None) -> Callable:
    """Return a forward step for Megatron's schedules that feeds token ids and gives the last stage's output away.

    Args:
        consume: Called on the last pipeline stage with the output of each microbatch.
    """

    def step(data_iterator, model):
        tokens = next(data_iterator)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        # Without a mask every Megatron attention is causal by itself.
        output = model(tokens, positions, None)

        def no_loss(tensor):
            if consume is not None:
                consume(tensor)
            return torch.zeros(1), {}

        return output, no_loss

    return step


def run_forward(model, batches: list[torch.Tensor], consume=None, title: str = "Calibration") -> None:
    """Send microbatches `[b, s]` through all pipeline stages, without gradients.

    Args:
        model: This rank's stage: a Megatron-Core model.
        batches: Microbatches; every stage needs as many, of the same shapes.
        consume: See `forward_step`.
        title: Of the progress bar.
    """
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    schedule = get_forward_backward_func()
    progress = ticking(range(len(batches)), len(batches), title)
    for run in same_shape_runs(batches):
        rows, length = run[0].shape
        data = (batch for batch, _ in zip(run, progress, strict=False))
        with torch.no_grad():
            schedule(
                forward_step_func=forward_step(consume),
                data_iterator=data,
                model=model,
                num_microbatches=len(run),
                seq_length=length,
                micro_batch_size=rows,
                forward_only=True,
            )
    # The bar's iterator has one step left: past the last item.
    next(progress, None)


def run_loader(model, get_dataloader: Callable[[], Iterator], fixed: dict[str, Any] | None) -> None:
    """Run what a data loader has through the pipeline.

    Args:
        model: This rank's stage: a Megatron-Core model.
        get_dataloader: Returns an iterator over microbatches `[b, s]`.
        fixed: Megatron's schedule, and number and sizes of the microbatches for one call of it, the stock form; None
            takes them from the data and leaves out the output layer, unless it is quantized.
    """
    if fixed is None:
        with output_layer_skipped(model, unless_quantized=True):
            run_forward(model, list(get_dataloader()))
        return
    schedule, sizes = fixed["schedule"], {name: value for name, value in fixed.items() if name != "schedule"}
    schedule(model=model, data_iterator=get_dataloader(), forward_step_func=forward_step(), forward_only=True, **sizes)


@contextlib.contextmanager
def output_layer_skipped(model, unless_quantized: bool = False) -> Iterator[None]:
    """Let a Megatron-Core GPT or Mamba model return hidden states in place of logits, inside of the context.

    The output layer costs about half of a calibration pass and most of its memory, and collects nothing unless it is
    quantized itself.

    Args:
        model: This rank's Megatron-Core model.
        unless_quantized: Do not skip an output layer that has an enabled quantizer.
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
    """Return this process's data-parallel rank and their number; (0, 1) where data is not to be divided.

    Expert-parallel ranks exchange tokens in every layer, so they need equal numbers of microbatches: not divided.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized() or parallel_state.get_expert_model_parallel_world_size() > 1:
        return 0, 1
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

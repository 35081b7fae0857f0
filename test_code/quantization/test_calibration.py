"""From text to micro-batches: nothing is lost, nothing is padded, every rank gets its part."""

from __future__ import annotations

import json
from unittest.mock import MagicMock, patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

MODULE = "nemo.collections.llm.modelopt.quantization.quantizer"
rows_of_ids = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=20), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def calibration():
    from nemo.collections.llm.modelopt.quantization.calibration import batching

    return batching


@pytest.fixture(scope="module")
def quantization():
    from nemo.collections.llm.modelopt.quantization import quantizer

    return quantizer


def write(path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


class Letters:
    """A tokenizer of single letters."""

    eos = 0

    def text_to_ids(self, text):
        return [ord(letter) for letter in text]


def model():
    stand_in = MagicMock()
    stand_in.tokenizer = Letters()
    stand_in.device = torch.device("cpu")
    return stand_in


# --- texts ------------------------------------------------------------------------------------------------------------


def test_blank_rows_are_dropped_and_the_remainder_is_used(quantization, tmp_path):
    texts = ["one", "", "two", "   ", "three", "four", "five"]
    data = write(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    batches = list(quantization.get_calib_data_iter(data, batch_size=3, calib_size=100))
    assert [text for batch in batches for text in batch] == ["one", "two", "three", "four", "five"]


def test_only_the_rows_asked_for_are_read_and_texts_are_cut(quantization):
    batches = list(quantization.get_calib_data_iter(["abcdef"] * 9, batch_size=4, calib_size=5, max_sequence_length=3))
    assert batches == [["abc"] * 4, ["abc"]]


@pytest.mark.parametrize(
    ("name", "arguments", "column"),
    [
        ("wikitext", (("wikitext", "wikitext-103-v1"), {"split": "train"}), "text"),
        ("cnn_dailymail", (("cnn_dailymail",), {"name": "3.0.0", "split": "train"}), "article"),
    ],
)
def test_hub_names_are_those_of_stock(quantization, name, arguments, column):
    dataset = MagicMock()
    dataset.__len__.return_value = 4
    dataset.__getitem__.side_effect = lambda part: {column: [f"row {i}" for i in range(4)[part]]}
    with patch(f"{MODULE}.load_dataset", return_value=dataset) as load:
        batches = list(quantization.get_calib_data_iter(name, batch_size=2, calib_size=4))
    load.assert_called_once_with(*arguments[0], **arguments[1])
    assert batches == [["row 0", "row 1"], ["row 2", "row 3"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file.*cnn_dailymail"),
        ("{broken", "cannot be read"),
        ('{"content": "a"}', r'has no column "text"; its columns are \[\'content\'\]'),
    ],
    ids=["missing", "broken", "no column"],
)
def test_unusable_files_say_why(quantization, tmp_path, content, message):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ModelOptConfigError, match=message):
        list(quantization.get_calib_data_iter(str(path)))


def test_no_text_at_all_is_an_error(calibration):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    with pytest.raises(ModelOptConfigError, match="'data.jsonl' has no row with text"):
        calibration.collect([], "data.jsonl", 4)


# --- sequences --------------------------------------------------------------------------------------------------------


@given(rows=rows_of_ids, seq_len=st.integers(2, 9))
def test_packing_keeps_every_token_and_adds_only_separators(rows, seq_len):
    from nemo.collections.llm.modelopt.quantization.calibration import batching

    packed = batching.pack(rows, seq_len, separator=0)
    flat = [token for sequence in packed for token in sequence]
    assert [token for token in flat if token] == [token for row in rows for token in row]
    assert flat.count(0) == len(rows) - 1
    assert all(len(sequence) == seq_len for sequence in packed[:-1]) and 1 <= len(packed[-1]) <= seq_len


@given(rows=rows_of_ids, batch_size=st.integers(1, 5), seq_len=st.integers(2, 9))
def test_microbatches_lose_nothing(rows, batch_size, seq_len):
    from nemo.collections.llm.modelopt import _heldout
    from nemo.collections.llm.modelopt.quantization.calibration import batching

    sequences = batching.pack(rows, seq_len, separator=0)
    batches = batching.micro_batches(sequences, batch_size)
    assert sorted(row for batch in batches for row in batch.tolist()) == sorted(sequences)
    assert all(1 <= batch.shape[0] <= batch_size for batch in batches)
    runs = list(_heldout.same_shape_runs(batches, lambda batch: tuple(batch.shape)))
    assert [batch for run in runs for batch in run] == batches or all(
        torch.equal(a, b) for a, b in zip((b for run in runs for b in run), batches, strict=True)
    )
    assert all(len({batch.shape for batch in run}) == 1 for run in runs)


@given(count=st.integers(1, 40), ranks=st.integers(1, 8))
def test_shares_cover_all_sequences_and_no_rank_is_empty(count, ranks):
    from nemo.collections.llm.modelopt.quantization.calibration import batching

    shares = [batching.share_of_rank(list(range(count)), rank, ranks) for rank in range(ranks)]
    assert all(shares)
    assert set().union(*shares) == set(range(count))
    if count >= ranks:
        assert sum(map(len, shares)) == count


@given(available=st.integers(1, 200), wanted=st.integers(1, 200), evaluation=st.integers(0, 40))
def test_split_never_overlaps_when_held_out(available, wanted, evaluation):
    from nemo.collections.llm.modelopt.quantization.calibration import batching

    available = min(available, wanted + evaluation)
    used, compared, held_out = batching.split_rows(available, wanted, evaluation)
    rows = range(available)
    assert len(rows[used]) >= 1
    assert len(rows[used]) <= wanted
    if held_out:
        assert not set(rows[used]) & set(rows[compared]) and len(rows[compared]) >= 1
    else:
        assert len(rows[used]) == min(available, wanted)
    assert bool(rows[compared]) == bool(evaluation)


def test_number_of_microbatches_comes_from_the_data(quantization):
    # Stock used 512 // 64 for any data: 10 rows raised StopIteration.
    batches = list(quantization.create_data_iterator_getter(model(), ["abcdefgh"] * 10, 8, 64, 512, packed=False)())
    assert [tuple(batch.shape) for batch in batches] == [(10, 8)]


def test_without_packing_rows_of_one_length_run_together_and_none_is_padded(quantization):
    texts = ["ab", "abcdef", "cd", "abcd"]
    batches = quantization.create_data_iterator_getter(model(), texts, 4, 2, 4, packed=False)()
    assert [batch.tolist() for batch in batches] == [[[97, 98, 99, 100]] * 2, [[97, 98], [99, 100]]]


def test_packed_form_has_no_padding(quantization):
    batches = quantization.create_data_iterator_getter(model(), ["ab", "abcdef", "c"], 4, 2, 3)()
    # Each row contributes at most 4 tokens; rows are joined by the end-of-sequence token.
    assert [batch.tolist() for batch in batches] == [[[97, 98, 0, 97], [98, 99, 100, 0]], [[99]]]


def test_the_data_can_be_read_twice_and_is_tokenized_once(quantization):
    # AWQ runs the forward loop twice.
    stand_in = model()
    stand_in.tokenizer = MagicMock(eos=0)
    stand_in.tokenizer.text_to_ids.return_value = [1, 2, 3]
    get = quantization.create_data_iterator_getter(stand_in, ["x"] * 4, 3, 2, 4)
    first, second = list(get()), list(get())
    assert stand_in.tokenizer.text_to_ids.call_count == 4
    assert len(first) == len(second) > 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("shard", "rows"), [(True, [2, 2, 1]), (False, [5])], ids=["maxima", "searches"])
def test_long_sequences_run_a_few_at_a_time_on_the_cpu(quantization, shard, rows):
    # A search such as AWQ's measures a mean over micro-batches, so their size must be the requested one.
    texts = ["a" * 1024] * 5
    batches = list(quantization.create_data_iterator_getter(model(), texts, 1024, 5, 5, packed=False, shard=shard)())
    assert [tuple(batch.shape) for batch in batches] == [(count, 1024) for count in rows]


# --- forward ----------------------------------------------------------------------------------------------------------


def test_every_microbatch_is_forwarded_once_in_runs_of_one_shape(calibration):
    seen = []

    def schedule(*, forward_step_func, data_iterator, model, num_microbatches, seq_length, micro_batch_size, **_):
        for _ in range(num_microbatches):
            output, loss = forward_step_func(data_iterator, model)
            loss(output)
            seen.append((micro_batch_size, seq_length))

    outputs = []
    batches = [torch.ones(2, 4).long(), torch.ones(2, 4).long(), torch.ones(1, 4).long(), torch.ones(1, 2).long()]
    with patch("megatron.core.pipeline_parallel.schedules.get_forward_backward_func", return_value=schedule):
        calibration.run_forward(lambda tokens, positions, mask: tokens + positions, batches, outputs.append)
    assert seen == [(2, 4), (2, 4), (1, 4), (1, 2)]
    assert outputs[0].tolist() == [[1, 2, 3, 4]] * 2


def test_the_scale_of_experts_losses_stays_on_the_device_of_the_model(calibration, monkeypatch):
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    step = calibration.forward_step()
    output, loss = step(iter([torch.ones(1, 4).long()]), lambda *inputs: torch.zeros(4, 1, 8, device="meta"))
    # Megatron makes the scale where the loss is, and keeps it for the training that follows.
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=loss(output)[0].device))
    assert MoEAuxLossAutoScaler.main_loss_backward_scale.device == output.device


@pytest.mark.parametrize(("enabled", "skipped"), [(True, False), (False, True)])
def test_output_layer_is_skipped_unless_it_is_quantized(calibration, enabled, skipped):
    core = torch.nn.Module()
    core.post_process, core.output_layer = True, torch.nn.Module()
    core.output_layer.weight_quantizer = torch.nn.Identity()
    core.output_layer.weight_quantizer.is_enabled = enabled
    with calibration.output_layer_skipped(core, unless_quantized=True):
        assert core.post_process is not skipped
    assert core.post_process is True

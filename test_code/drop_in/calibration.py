"""Calibration data and the forward loop of the ``Quantizer``, and quant_cfg files, on stand-ins."""

from __future__ import annotations

import json
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, mock_open, patch

import pytest
import torch

from nemo.collections.llm.modelopt.quantization import quantizer
from nemo.collections.llm.modelopt.quantization.quantizer import QuantizationConfig, Quantizer, get_calib_data_iter
from nemo.collections.llm.modelopt.quantization.utils import load_quant_cfg, standardize_json_config

MODULE = "nemo.collections.llm.modelopt.quantization.quantizer"
SCHEDULE = "megatron.core.pipeline_parallel.schedules.get_forward_backward_func"


class Table:
    """What ``load_dataset`` returns, as far as it is read: a slice of rows, then a column."""

    def __init__(self, column, rows):
        self.column, self.rows = column, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, part):
        return {self.column: list(self.rows[part])}


@pytest.mark.drop_in
class TestCalibrationData:
    @pytest.mark.parametrize(
        ("name", "column", "positional", "keywords"),
        [
            ("wikitext", "text", ("wikitext", "wikitext-103-v1"), {"split": "train"}),
            ("cnn_dailymail", "article", ("cnn_dailymail",), {"name": "3.0.0", "split": "train"}),
            ("/data/own.json", "text", ("json",), {"data_files": "/data/own.json", "split": "train"}),
            ("own.jsonl", "text", ("json",), {"data_files": "own.jsonl", "split": "train"}),
        ],
    )
    def test_where_it_comes_from(self, name, column, positional, keywords):
        rows = [f"row {number}" for number in range(6)]
        with patch(f"{MODULE}.load_dataset", return_value=Table(column, rows)) as load:
            found = list(get_calib_data_iter(data=name, batch_size=2, calib_size=6))
        load.assert_called_once_with(*positional, **keywords)
        assert found == [rows[0:2], rows[2:4], rows[4:6]]

    def test_a_file_that_is_there_is_read_by_what_replaces_datasets(self, tmp_path):
        path = tmp_path / "own.json"
        path.write_text('{"text": "on disk"}')
        with patch(f"{MODULE}.load_dataset", return_value=Table("text", ["replaced"])) as load:
            assert list(get_calib_data_iter(str(path), batch_size=1, calib_size=1)) == [["replaced"]]
        load.assert_called_once_with("json", data_files=str(path), split="train")

    def test_the_default_is_cnn_dailymail(self):
        with patch(f"{MODULE}.load_dataset", return_value=Table("article", ["a"] * 1000)) as load:
            sizes = [len(batch) for batch in get_calib_data_iter()]
        assert load.call_args.args == ("cnn_dailymail",)
        assert sizes == [64] * 8

    @pytest.mark.parametrize("length", [1, 3, 512])
    def test_texts_are_cut(self, length):
        with patch(f"{MODULE}.load_dataset", return_value=Table("text", ["x" * 600, "yy"])):
            found = list(get_calib_data_iter("wikitext", batch_size=2, calib_size=2, max_sequence_length=length))
        assert found == [["x" * length, "yy"[:length]]]

    def test_no_more_than_asked_for(self):
        with patch(f"{MODULE}.load_dataset", return_value=Table("text", ["a", "b", "c", "d", "e", "f"])):
            assert list(get_calib_data_iter("wikitext", batch_size=2, calib_size=4)) == [["a", "b"], ["c", "d"]]

    def test_no_more_than_there_is(self):
        with patch(f"{MODULE}.load_dataset", return_value=Table("text", ["a", "b", "c", "d"])):
            assert list(get_calib_data_iter("wikitext", batch_size=2, calib_size=100)) == [["a", "b"], ["c", "d"]]

    def test_fewer_rows_than_a_batch(self):
        with patch(f"{MODULE}.load_dataset", return_value=Table("text", ["a", "b"])):
            assert list(get_calib_data_iter("wikitext", batch_size=8, calib_size=8)) == [["a", "b"]]

    def test_a_table_that_is_a_mock(self):
        table = MagicMock()
        table.__len__.return_value = 4
        table.__getitem__.return_value = {"text": ["one", "two"]}
        with patch(f"{MODULE}.load_dataset", return_value=table):
            assert list(get_calib_data_iter("wikitext", batch_size=2, calib_size=4)) == [["one", "two"]] * 2
        assert [call.args[0] for call in table.__getitem__.call_args_list] == [slice(0, 2), slice(2, 4)]

    def test_nothing_is_loaded_before_the_first_batch(self):
        with patch(f"{MODULE}.load_dataset", return_value=Table("text", ["a"])) as load:
            found = get_calib_data_iter("wikitext", batch_size=1, calib_size=1)
            load.assert_not_called()
            next(found)
            load.assert_called_once()


@pytest.mark.drop_in
class TestDataIterator:
    def model(self, ids=None):
        tokenizer = SimpleNamespace(text_to_ids=Mock(side_effect=ids or (lambda text: [len(text)] * 4)), eos=0)
        return SimpleNamespace(tokenizer=tokenizer, device="cpu")

    def test_the_data_is_asked_for_when_the_iterator_is_made(self):
        with patch(f"{MODULE}.get_calib_data_iter", return_value=iter([["abc", "de"]])) as read:
            getter = quantizer.create_data_iterator_getter(self.model(), "dummy", 4, 2, 2)
            read.assert_not_called()
            found = list(getter())
        read.assert_called_once_with(data="dummy", max_sequence_length=16, batch_size=2, calib_size=2)
        # Whether rows are packed is a documented difference.
        assert all(batch.dtype is torch.long and batch.dim() == 2 for batch in found)

    def test_it_is_an_iterator(self):
        with patch(f"{MODULE}.get_calib_data_iter", return_value=iter([["abcd"]])):
            found = quantizer.create_data_iterator_getter(self.model(), "dummy", 4, 1, 1)()
        assert next(found).tolist() == [[4, 4, 4, 4]]
        with pytest.raises(StopIteration):
            next(found)

    def test_long_rows_are_cut(self):
        with patch(f"{MODULE}.get_calib_data_iter", return_value=iter([["ab"]])):
            model = self.model(lambda text: list(range(10)))
            found = list(quantizer.create_data_iterator_getter(model, "dummy", 3, 1, 1)())
        assert found[0].tolist() == [[0, 1, 2]]

    def test_every_text_is_tokenized(self):
        with patch(f"{MODULE}.get_calib_data_iter", return_value=iter([["a", "b"], ["c", "d"]])):
            model = self.model()
            list(quantizer.create_data_iterator_getter(model, "dummy", 4, 2, 4)())
        assert [call.args for call in model.tokenizer.text_to_ids.call_args_list] == [("a",), ("b",), ("c",), ("d",)]


@pytest.mark.drop_in
class TestForwardLoop:
    @pytest.mark.parametrize(("size", "batch", "number"), [(512, 64, 8), (10, 4, 2), (64, 64, 1)])
    def test_what_it_is_made_of(self, size, batch, number):
        config = QuantizationConfig(
            calibration_dataset="dummy",
            calibration_dataset_size=size,
            calibration_batch_size=batch,
            calibration_seq_len=32,
        )
        owner, model = SimpleNamespace(quantization_config=config, create_megatron_forward_loop=Mock()), MagicMock()
        with patch(f"{MODULE}.create_data_iterator_getter") as getter:
            loop = Quantizer._get_forward_loop(owner, model)
        getter.assert_called_once_with(model, dataset="dummy", seq_len=32, batch_size=batch, calibration_size=size)
        owner.create_megatron_forward_loop.assert_called_once_with(
            getter.return_value, num_batches=number, seq_length=32, micro_batch_size=batch
        )
        assert loop is owner.create_megatron_forward_loop.return_value

    def test_bound(self):
        with patch("torch.cuda.is_available", return_value=True):
            built = Quantizer(QuantizationConfig(), SimpleNamespace(dtype="bf16", decoder_type="llama"))
        with (
            patch(f"{MODULE}.create_data_iterator_getter") as getter,
            patch.object(built, "create_megatron_forward_loop") as create,
        ):
            assert built._get_forward_loop(MagicMock()) is create.return_value
        create.assert_called_once_with(getter.return_value, num_batches=8, seq_length=128, micro_batch_size=64)

    def test_only_the_fields_that_are_read(self):
        config = SimpleNamespace(
            calibration_dataset="d", calibration_seq_len=4, calibration_batch_size=2, calibration_dataset_size=4
        )
        owner = SimpleNamespace(quantization_config=config, create_megatron_forward_loop=Mock())
        with patch(f"{MODULE}.create_data_iterator_getter"):
            Quantizer._get_forward_loop(owner, object())
        owner.create_megatron_forward_loop.assert_called_once()

    def test_the_schedule_is_megatrons(self):
        loader, model = Mock(), MagicMock()
        with patch(SCHEDULE) as schedule:
            loop = Quantizer.create_megatron_forward_loop(
                None, loader, num_batches=3, seq_length=8, micro_batch_size=2, decoder_seq_length=6
            )
        schedule.assert_called_once_with()
        loader.assert_not_called()
        assert loop(model) is None
        loader.assert_called_once_with()
        schedule.return_value.assert_called_once()
        keywords = dict(schedule.return_value.call_args.kwargs)
        assert callable(keywords.pop("forward_step_func"))
        assert keywords == {
            "data_iterator": loader.return_value,
            "model": model,
            "num_microbatches": 3,
            "seq_length": 8,
            "micro_batch_size": 2,
            "decoder_seq_length": 6,
            "forward_only": True,
        }

    def test_sizes_may_be_left_out(self):
        with patch(SCHEDULE) as schedule:
            Quantizer.create_megatron_forward_loop(None, Mock(), 1)(MagicMock())
        keywords = schedule.return_value.call_args.kwargs
        assert [keywords[name] for name in ("seq_length", "micro_batch_size", "decoder_seq_length")] == [None] * 3

    def test_each_run_asks_for_the_data_anew(self):
        loader = Mock()
        with patch(SCHEDULE):
            loop = Quantizer.create_megatron_forward_loop(None, loader, 1)
            loop(MagicMock())
            loop(MagicMock())
        assert loader.call_count == 2

    @pytest.mark.parametrize("shape", [(1, 4), (3, 5)])
    def test_a_step(self, shape):
        tokens, model = torch.arange(shape[0] * shape[1]).view(shape), MagicMock()
        with patch(SCHEDULE) as schedule:
            Quantizer.create_megatron_forward_loop(None, Mock(), 1)(model)
        step = schedule.return_value.call_args.kwargs["forward_step_func"]
        output, loss = step(iter([tokens]), model)
        assert output is model.return_value
        given, positions, mask = model.call_args.args
        assert given is tokens and mask is None
        assert positions.tolist() == [list(range(shape[1]))] * shape[0]
        value, report = loss(output)
        assert value.tolist() == [0.0] and report == {}


@pytest.mark.drop_in
class TestQuantCfgFiles:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({"block_sizes": {"-1": 16}}, {"block_sizes": {-1: 16}}),
            ({"block_sizes": {"-1": 16, "type": "dynamic"}}, {"block_sizes": {-1: 16, "type": "dynamic"}}),
            ({"num_bits": [4, 3]}, {"num_bits": (4, 3)}),
            ({"scale_bits": [4, 3]}, {"scale_bits": (4, 3)}),
            ({"num_bits": 8}, {"num_bits": 8}),
            ({"axis": [0]}, {"axis": [0]}),
            ({"a": {"num_bits": [2, 1]}}, {"a": {"num_bits": (2, 1)}}),
            ({"a": [{"num_bits": [4, 3]}, 1, "x"]}, {"a": [{"num_bits": (4, 3)}, 1, "x"]}),
            ({"block_sizes": {"-1": 32, "scale_bits": [8, 0]}}, {"block_sizes": {-1: 32, "scale_bits": (8, 0)}}),
            ({}, {}),
        ],
    )
    def test_standardized_in_place(self, given, expected):
        assert standardize_json_config(given) is None
        assert given == expected

    def test_loaded(self, tmp_path):
        path = tmp_path / "cfg.json"
        path.write_text(json.dumps({"quant_cfg": {"*": {"num_bits": [4, 3]}}, "algorithm": "max"}))
        assert load_quant_cfg(path) == {"quant_cfg": {"*": {"num_bits": (4, 3)}}, "algorithm": "max"}

    def test_loaded_from_a_mock(self):
        with patch("builtins.open", mock_open(read_data='{"quant_cfg": {}}')) as opened:
            assert load_quant_cfg("/fake/cfg.json") == {"quant_cfg": {}}
        assert opened.call_args.args[0] == "/fake/cfg.json"

    def test_a_missing_file(self):
        with pytest.raises(FileNotFoundError, match="no-such-file.json"):
            load_quant_cfg("/fake/no-such-file.json")

    def test_broken_json(self, tmp_path):
        path = tmp_path / "cfg.json"
        path.write_text("{")
        with pytest.raises(ValueError, match="line 1 column 2"):
            load_quant_cfg(path)

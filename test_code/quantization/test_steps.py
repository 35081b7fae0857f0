"""The steps of ``Quantizer.quantize`` on real models: each runs once, and replaced methods or functions are used."""

from __future__ import annotations

import contextlib
from unittest.mock import patch

import pytest

from test_code.support import jobs_quant, jobs_state

TEXTS = [f"the model number {number} reads a line of text" for number in range(30)]


@pytest.fixture(scope="module")
def work(ranks_factory, tmp_path_factory):
    """Return a folder with a trained checkpoint of a tiny llm.LlamaModel and a calibration file."""
    folder = tmp_path_factory.mktemp("steps")
    ranks_factory(1).run(jobs_quant.make_checkpoint, str(folder / "llama"), True)
    jobs_quant.corpus(folder / "text.jsonl")
    return folder


# --- what ranks execute ---


class Counting:
    """An iterable of texts that counts how often it is started and how many rows are taken from it."""

    def __init__(self, texts):
        self.texts, self.starts, self.taken = texts, 0, 0

    def __iter__(self):
        self.starts += 1
        for text in self.texts:
            self.taken += 1
            yield text


def reset_and_restore(checkpoint):
    from test_code.support import ranks

    ranks.reset()
    return jobs_state.restored(checkpoint)[0]


def read_once(checkpoint, data) -> dict:
    """Quantize with an iterable, a stream and a file; return how often and how far each was read, and the reports."""
    from nemo.collections.llm.modelopt.quantization import quantizer as q
    from nemo_modelopt_dropin.preflight import data_files

    counting, stream = Counting(TEXTS), Counting(TEXTS)
    found = {}
    for name, source in {"iterable": counting, "stream": iter(stream), "file": data}.items():
        quantizer = jobs_state.quantizer_for(
            "unused", calibration_dataset=source, comparison_size=4, comparison_tokens=4096
        )
        model = reset_and_restore(checkpoint)
        with (
            patch.object(q, "get_calib_data_iter", side_effect=q.get_calib_data_iter) as read,
            patch.object(data_files, "rows", side_effect=data_files.rows) as opened,
        ):
            quantizer._check_inputs()
            opened.reset_mock()
            quantizer.quantize(model)
        found[name] = {"calls": read.call_count, "opened": opened.call_count, "report": quantizer.report}
    found["iterable"]["counts"] = (counting.starts, counting.taken)
    found["stream"]["counts"] = (stream.starts, stream.taken)
    return found


def asked_once(checkpoint, data) -> dict[str, int]:
    """Quantize and return how often each method and function was called."""
    from nemo.collections.llm.modelopt.quantization import _quant_cfg
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    methods = ("_setup", "_get_decoder_type", "_get_quant_cfg", "_get_forward_loop", "create_megatron_forward_loop")
    functions = (
        "get_calib_data_iter",
        "get_modelopt_decoder_type",
        "unwrap_for_modelopt_operations",
        "quant_cfg_for",
    )
    quantizer = jobs_state.quantizer_for(data)
    model = reset_and_restore(checkpoint)
    counted = {}
    with contextlib.ExitStack() as stack:
        for name in methods:
            original = getattr(q.Quantizer, name)
            is_static = name == "_setup"
            keywords = {} if is_static else {"autospec": True}
            counted[name] = stack.enter_context(patch.object(q.Quantizer, name, side_effect=original, **keywords))
        for name in functions:
            counted[name] = stack.enter_context(patch.object(q, name, side_effect=getattr(q, name)))
        loaded = stack.enter_context(patch.object(_quant_cfg, "base_quant_cfg", side_effect=_quant_cfg.base_quant_cfg))
        quantizer.quantize(model)
    return {**{name: mock.call_count for name, mock in counted.items()}, "base_quant_cfg": loaded.call_count}


def overridden(checkpoint, data, out) -> dict:
    """Quantize and export with a subclass that overrides every stock method with stock's parameters."""
    import torch

    from nemo.collections.llm.modelopt import ExportConfig, QuantizationConfig, Quantizer

    seen: list[str] = []

    class Own(Quantizer):
        @staticmethod
        def _setup(model):
            seen.append("_setup")
            model.freeze()

        def _get_decoder_type(self, model, optional=False):
            seen.append("_get_decoder_type")
            return "gpt"

        @staticmethod
        def _generate_sample(model):
            seen.append("_generate_sample")

        def _get_forward_loop(self, model):
            seen.append("_get_forward_loop")
            batches = [torch.arange(3, 35).reshape(2, 16)]
            return self.create_megatron_forward_loop(
                lambda: iter(batches), num_batches=1, seq_length=16, micro_batch_size=2
            )

        def _get_quant_cfg(self, model):
            seen.append("_get_quant_cfg")
            return {"quant_cfg": {"*linear_fc1.input_quantizer": {"num_bits": 8}, "default": {"enable": False}}}

        def create_megatron_forward_loop(
            self, get_dataloader, num_batches, seq_length=None, micro_batch_size=None, decoder_seq_length=None
        ):
            seen.append("create_megatron_forward_loop")
            return super().create_megatron_forward_loop(get_dataloader, num_batches, seq_length, micro_batch_size)

        def _save_tokenizer(self, model, model_dir, export_dir, export_fmt):
            seen.append("_save_tokenizer")

        def export(self, model, model_dir, trainer=None):
            seen.append("export")
            super().export(model, model_dir, trainer)

    # The data set is out of reach: an own loop brings its own data.
    config = QuantizationConfig(algorithm="int8", calibration_dataset="cnn_dailymail", calibration_batch_size=2)
    quantizer = Own(config, ExportConfig(path=str(out), export_format="nemo", generate_sample=True))
    reset_and_restore(checkpoint)
    model, trainer = jobs_state.restored(checkpoint)
    quantizer.quantize(model)
    quantizer.export(model, str(checkpoint), trainer)
    return {"seen": seen, "amax": jobs_quant.amax_of(model), "report": quantizer.report}


def wrapped_loop(checkpoint, data) -> dict:
    """Quantize with a subclass that wraps the loop and takes our arguments along, and with patched functions."""
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    ran: list[str] = []

    class Own(q.Quantizer):
        def _get_forward_loop(self, model, **ours):
            loop = super()._get_forward_loop(model, **ours)

            def run(core):
                ran.append("loop")
                loop(core)

            return run

    config = q.QuantizationConfig(
        calibration_dataset=data, calibration_dataset_size=20, calibration_batch_size=4, calibration_seq_len=32
    )
    quantizer = Own(config, None)
    model = reset_and_restore(checkpoint)
    with (
        patch.object(q, "get_calib_data_iter", side_effect=lambda **_: iter([TEXTS[:8]])) as read,
        patch.object(q, "create_data_iterator_getter", side_effect=q.create_data_iterator_getter) as getter,
        patch.object(q, "get_modelopt_decoder_type", return_value="gpt") as decoder,
        patch.object(q, "is_global_rank_zero", return_value=False),
        patch.object(q.mtq, "print_quant_summary") as summary,
        patch.object(q.mtq, "quantize", side_effect=q.mtq.quantize) as insert,
        patch.object(q.mtq, "postprocess_amax", side_effect=q.mtq.postprocess_amax) as clamp,
        patch.object(q, "unwrap_for_modelopt_operations", side_effect=q.unwrap_for_modelopt_operations) as unwrap,
    ):
        quantizer.quantize(model)
    mocks = {
        "read": read, "getter": getter, "decoder": decoder, "summary": summary, "insert": insert, "clamp": clamp,
        "unwrap": unwrap,
    }  # fmt: skip
    datasets = [list(call.kwargs["dataset"]) for call in getter.call_args_list]
    counts = {name: mock.call_count for name, mock in mocks.items()}
    return {"ran": ran, "report": quantizer.report, "datasets": datasets, "counts": counts}


# --- tests ---


def test_the_calibration_data_is_read_once(ranks, work):
    found = ranks(1).run(read_once, str(work / "llama"), str(work / "text.jsonl"))[0]
    for name, one in found.items():
        assert one["calls"] == 1, name
        assert one["report"]["calibration_rows"] == 20 and one["report"]["held_out"], name
        assert one["report"]["evaluation_tokens"] > 0, name
    assert found["file"]["opened"] == 1
    # 20 rows calibrate and 4 compare; an iterable is started once, so a stream is enough.
    assert found["iterable"]["counts"] == (1, 24) and found["stream"]["counts"] == (1, 24)
    assert found["iterable"]["report"] == found["stream"]["report"]


def test_each_decision_is_made_once(ranks, work):
    found = ranks(1).run(asked_once, str(work / "llama"), str(work / "text.jsonl"))[0]
    # The name of the algorithm is looked up twice: for this model, and for the check of the export.
    assert found.pop("base_quant_cfg") == 2
    assert found == dict.fromkeys(found, 1)


def test_every_stock_method_can_be_overridden(ranks, work):
    found = ranks(1).run(overridden, str(work / "llama"), str(work / "text.jsonl"), str(work / "own"))[0]
    assert found["seen"] == [
        "_get_decoder_type",
        "_get_quant_cfg",
        "_setup",
        "_get_forward_loop",
        "create_megatron_forward_loop",
        "_generate_sample",
        "export",
        "_save_tokenizer",
    ]
    assert found["amax"] and all("linear_fc1.input_quantizer" in name for name in found["amax"])
    assert found["report"]["quantizers"] == {"weight": 0, "input": 4, "output": 0, "kv_cache": 0}
    assert "loss_before" not in found["report"]
    assert (work / "own" / "weights" / "modelopt_state").is_dir()


def test_what_is_replaced_takes_effect(ranks, work):
    found = ranks(1).run(wrapped_loop, str(work / "llama"), str(work / "text.jsonl"))[0]
    assert found["ran"] == ["loop"], "the loop of the subclass calibrated, on rows that were read already"
    assert found["report"]["calibration_rows"] == 8 and found["report"]["evaluation_tokens"] > 0
    assert found["datasets"] == [TEXTS[:1], TEXTS[:8]], "of fewer than 16 rows, all calibrate and some compare"
    assert found["counts"] == {
        "read": 1, "getter": 2, "decoder": 1, "summary": 0, "insert": 1, "clamp": 1, "unwrap": 1,
    }  # fmt: skip

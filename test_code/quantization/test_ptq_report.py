"""The quantization report: errors of layers, KL, sensitivity, sizes on disk, and the page."""

from __future__ import annotations

import json
import re

import pytest
import torch

from test_code.support import installed, jobs_quant, jobs_state

FP8 = {"algorithm": "fp8", "sensitivity_scan": True}
W4A8 = {"algorithm": "w4a8_awq", "awq_block_size": 16}
ERRORS = ("weight_sqnr_db", "activation_sqnr_db")


def report_of(checkpoint, data, tp=1, pp=1, **settings) -> dict:
    """Quantize and return the report."""
    quantizer = jobs_state.quantizer_for(data, **settings)
    model, _ = jobs_state.restored(checkpoint, tp, pp)
    quantizer.quantize(model)
    return quantizer.report


def reports(checkpoint, data, tp, pp, runs) -> list[dict]:
    """Return the report of each run, in groups of their own."""
    from test_code.support import ranks

    found = []
    for index, settings in enumerate(runs):
        if index:
            ranks.reset()
        found.append(report_of(checkpoint, data, tp, pp, **settings))
    return found


def in_chunks(checkpoint, data, tp, sizes) -> list[dict]:
    """Return the report of a quantization for each size of the logits that are processed at a time."""
    from unittest.mock import patch

    from nemo.collections.llm.modelopt.quantization import comparison
    from test_code.support import ranks

    found = []
    for size in sizes:
        ranks.reset()
        with patch.object(comparison, "_LOGITS_BYTES", size):
            found.append(report_of(checkpoint, data, tp, layer_errors=False))
    return found


def exported_report(checkpoint, data, out, report_path, fmt="nemo", **settings) -> dict:
    """Quantize, export with a report, and return what the quantizer holds."""
    export = {"path": str(out), "export_format": fmt, "report_path": str(report_path)}
    quantizer = jobs_state.quantizer_for(data, export=export, **settings)
    model, trainer = jobs_state.restored(checkpoint)
    quantizer.quantize(model)
    quantizer.export(model, str(checkpoint), trainer)
    return quantizer.report


def by_hand(checkpoint, data, layer: str, **settings) -> dict[str, float]:
    """Return errors of one layer and KL(original || quantized), computed from whole tensors and logits."""
    from nemo.collections.llm.modelopt.quantization import quantizer as q
    from nemo.collections.llm.modelopt.quantization.calibration import steps
    from test_code.support import tiny

    quantizer = jobs_state.quantizer_for(data, **{"layer_errors": False, **settings})
    original, _ = jobs_state.restored(checkpoint)
    rows = steps.read_rows(quantizer.quantization_config, tiny.core(original), None, q.get_calib_data_iter)
    batches = steps.comparison_batches(quantizer.quantization_config, original, rows, q.create_data_iterator_getter)
    core = tiny.core(original).eval()

    def logits(model):
        with torch.no_grad():
            outputs = [tiny.run(model, b) for b in batches]
        return torch.cat([out.double().flatten(0, 1) for out in outputs]).log_softmax(-1)

    before = logits(core)
    quantizer.quantize(original)
    module = core.get_submodule(layer)
    seen = []
    module.input_quantizer.register_forward_hook(lambda _, args, out: seen.append((args[0].double(), out.double())))
    after = logits(core)
    ratio = {}
    with torch.no_grad():
        pairs = {"weight": [(module.weight.double(), module.weight_quantizer(module.weight).double())]}
    pairs["activation"] = seen[: len(batches)][:4]
    for kind, values in pairs.items():
        signal = sum(float((x**2).sum()) for x, _ in values)
        noise = sum(float(((x - q) ** 2).sum()) for x, q in values)
        if noise:
            ratio[f"{kind}_sqnr_db"] = 10 * float(torch.tensor(signal / noise, dtype=torch.float64).log10())
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    own = quantizer.report["kl_to_original"]
    return {**ratio, "kl_to_original": kl, "batches": len(batches), "own kl_to_original": own}


@pytest.fixture(scope="module")
def work(ranks_factory, tmp_path_factory):
    """Return a folder with a trained checkpoint of a tiny llm.LlamaModel and a calibration file."""
    folder = tmp_path_factory.mktemp("report")
    ranks_factory(1).run(jobs_quant.make_checkpoint, str(folder / "llama"), True)
    jobs_quant.corpus(folder / "text.jsonl")
    return folder


def paths(work) -> tuple[str, str]:
    return str(work / "llama"), str(work / "text.jsonl")


@pytest.fixture(scope="module")
def one_rank(ranks_factory, work):
    runs = [FP8, W4A8, {"algorithm": "int4", "layer_errors": False}]
    return ranks_factory(1).run(reports, *paths(work), 1, 1, runs)[0]


def worst(row) -> float:
    return min(row[key] for key in ERRORS if key in row)


def test_every_layer_is_listed_worst_first(one_rank):
    fp8, w4a8, without = one_rank
    attentions = 4 if installed.KV_CACHE else 0
    for report in (fp8, w4a8):
        rows = report["layers"]
        assert len({row["layer"] for row in rows}) == len(rows) == 4 * 4 + attentions
        assert [worst(row) for row in rows] == sorted(worst(row) for row in rows)
        attention = [row for row in rows if row["layer"].endswith("core_attention")]
        assert len(attention) == attentions
        assert all("weight_sqnr_db" not in row and row["activation_sqnr_db"] > 20 for row in attention)
    linear = {row["layer"]: row for row in fp8["layers"] if "weight_format" in row}
    assert {row["weight_format"] for row in linear.values()} == {"fp8"}
    # Three bits of mantissa: relative errors up to 1/16, on average 1/40 or so, that is 32 dB.
    assert all(28 < row[key] < 36 for row in linear.values() for key in ERRORS)
    quantized = [row for row in w4a8["layers"] if "weight_format" in row]
    assert {row["weight_format"] for row in quantized} == {"int4/16 + fp8"}
    # Blocks of 16 in 15 steps: about 20 dB.
    assert all(15 < row["weight_sqnr_db"] < 25 for row in quantized)
    assert "layers" not in without and without["kl_to_original"] > fp8["kl_to_original"] > 0


def test_the_figures_are_those_of_the_definitions(ranks, work, one_rank):
    layer = "decoder.layers.1.mlp.linear_fc1"
    expected = ranks(1).run(by_hand, *paths(work), layer)[0]
    row = next(row for row in one_rank[0]["layers"] if row["layer"] == layer)
    for key in ERRORS:
        # Rounded to two digits; sums in fp32.
        assert row[key] == pytest.approx(expected[key], abs=0.02)
    # Differences of logits of about 1 in fp32 carry 1e-7, the divergence is 1e-4 or more.
    assert one_rank[0]["kl_to_original"] == pytest.approx(expected["kl_to_original"], rel=1e-2)


def test_a_quantized_output_layer_is_compared_with_the_original_one(ranks, work, tmp_path):
    number = {"num_bits": 4, "axis": 0, "enable": True}
    entries = {"default": {"enable": False}, "*output_layer.weight_quantizer": number}
    file = tmp_path / "output_layer.json"
    file.write_text(json.dumps({"quant_cfg": entries, "algorithm": "max"}))
    found = ranks(1).run(by_hand, *paths(work), "output_layer", algorithm=str(file))[0]
    # Nothing else is quantized: both models have the same hidden states.
    assert found["own kl_to_original"] > 1e-6
    assert found["own kl_to_original"] == pytest.approx(found["kl_to_original"], rel=1e-2)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (1, 1)], ids=["tp2", "pp2", "dp2"])
def test_layouts_report_as_one_rank_does(ranks, work, one_rank, tp, pp):
    for (report,) in ranks(2).run(reports, *paths(work), tp, pp, [FP8]):
        rows = {row["layer"]: row for row in report["layers"]}
        assert set(rows) == {row["layer"] for row in one_rank[0]["layers"]}
        for row in one_rank[0]["layers"]:
            for key in ERRORS:
                # Data-parallel ranks compare micro-batches of their own, so inputs differ; the weights are the same.
                limit = 1.0 if key.startswith("activation") else 0.02
                assert rows[row["layer"]].get(key) == pytest.approx(row[key], abs=limit) if key in row else True
        assert report["kl_to_original"] == pytest.approx(one_rank[0]["kl_to_original"], rel=0.02)
        key = "relative_output_error"
        ours, theirs = ({row["group"]: row[key] for row in found["sensitivity"]} for found in (report, one_rank[0]))
        # A value that rounds to the neighbouring FP8 number under TP moves the error slightly.
        assert ours == pytest.approx(theirs, rel=0.02)


def test_the_sensitivity_scan_quantizes_one_group_at_a_time(one_rank):
    rows = one_rank[0]["sensitivity"]
    groups = {f"decoder.layers.{layer}.{part}" for layer in range(4) for part in ("self_attention", "mlp")}
    assert {row["group"] for row in rows} == groups
    costs = [row["kl_to_original"] for row in rows]
    assert costs == sorted(costs, reverse=True) and costs[-1] > 0
    assert costs[0] < one_rank[0]["kl_to_original"] < 3 * sum(costs)
    assert all(row["relative_output_error"] < one_rank[0]["relative_output_error"] for row in rows)


def test_files_and_sizes(ranks, work):
    out, folder = work / "out", work / "out.report"
    settings = {"sensitivity_scan": True, "algorithm": "int8"}
    report = ranks(1).run(exported_report, *paths(work), str(out), str(folder), **settings)[0]
    assert {p.name for p in folder.iterdir()} == {".nemo-modelopt.json", "report.json", "report.html", "figures"}
    assert {p.name for p in (folder / "figures").iterdir()} == {"sqnr.png", "sensitivity.png"}
    assert {p.name for p in out.iterdir()} == {".nemo-modelopt.json", "weights", "context"}
    found = json.loads((folder / "report.json").read_text())
    assert {name: found[name] for name in report} == report and found["settings"]["algorithm"] == "int8"
    weights = sum(p.stat().st_size for p in (out / "weights").glob("*.distcp"))
    # Of a NeMo checkpoint the model's entries count: the original's optimizer (twice the weights) does not. The states
    # of the quantizers are 1 % of these small weights, and 13 % with modelopt from 0.44.
    assert report["disk_bytes_after"] == pytest.approx(weights, rel=0.1)
    assert report["disk_bytes_before"] == pytest.approx(report["disk_bytes_after"], rel=0.15)
    page = (folder / "report.html").read_text()
    for text in ("Quantization with int8", 'id="layers"', 'id="sensitivity"', report["layers"][0]["layer"], "on disk"):
        assert text in page
    assert not re.search(r'(?:src|href)="(?!data:)', page.partition("<script")[0]), (
        "the page asks the network for nothing"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"sensitivity_scan": True, "comparison_size": 0}, "sensitivity_scan=True compares on held-out rows")],
)
def test_a_scan_without_held_out_rows_raises_an_error(cpu_backend, settings, message):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    with pytest.raises(ModelOptConfigError, match=message):
        q.Quantizer(q.QuantizationConfig(calibration_dataset=["a text"], **settings), None)


def test_a_report_that_cannot_be_written_does_not_fail_the_export(tmp_path, caplog):
    from nemo.collections.llm.modelopt.quantization import comparison
    from nemo.collections.llm.modelopt.quantization.config import QuantizationConfig

    (tmp_path / "file").write_text("")
    comparison.write({"quantizers": {"weight": 1}}, QuantizationConfig(), tmp_path / "file" / "folder")
    comparison.write({"quantizers": {"weight": 1}}, QuantizationConfig(), tmp_path / "folder")
    assert "weight quantizers" in (tmp_path / "folder" / "report.html").read_text()


@pytest.mark.parametrize("tp", [1, 2])
def test_the_comparison_is_the_same_in_chunks_of_any_size(ranks, work, tp):
    # All logits, those of seven tokens, which does not divide a sequence, and of one token.
    token = 4 * 256 // tp
    whole, *parts = ranks(tp).run(
        in_chunks, str(work / "llama"), str(work / "text.jsonl"), tp, [2**30, 7 * token, token]
    )[0]
    figures = [name for name in whole if name.startswith(("loss", "kl", "relative", "evaluation"))]
    assert len(figures) == 5
    for part in parts:
        # fp32 logits, summed in fp64; the products of a chunk may be in another order. The KL is 1e-5.
        assert {name: part[name] for name in figures} == pytest.approx(
            {name: whole[name] for name in figures}, rel=1e-4, abs=1e-7
        )


@pytest.mark.parametrize(
    ("tokens", "calibrating", "layers", "rows"),
    # The last model is one with an output layer as large as its decoder.
    [
        (None, 512, 16, 32),
        (None, 32, 16, 8),
        (None, 2, 16, 1),
        (4096, 32, 16, 32),
        (1024, 512, 16, 8),
        (None, 32, 4, 4),
    ],
)
def test_the_comparison_takes_no_longer_than_the_calibration(tokens, calibrating, layers, rows):
    from types import SimpleNamespace

    from nemo.collections.llm.modelopt.quantization.calibration import steps

    config = SimpleNamespace(comparison_size=32, comparison_tokens=tokens, calibration_seq_len=128)
    sizes = SimpleNamespace(hidden_size=2048, ffn_hidden_size=8192, num_layers=layers)
    assert steps._compared_rows(config, SimpleNamespace(config=sizes, vocab_size=128256), calibrating) == rows

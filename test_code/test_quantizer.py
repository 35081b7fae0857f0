"""Quantizer.quantize: its contract on stand-ins, and its results on real models and layouts."""

from __future__ import annotations

from unittest.mock import MagicMock, patch

import modelopt.torch.quantization as mtq
import pytest
import torch

from test_code.drop_in.calibration import (  # noqa: F401
    TestCalibrationData,
    TestDataIterator,
    TestForwardLoop,
    TestQuantCfgFiles,
)
from test_code.drop_in.export import (  # noqa: F401
    TestExport,
    TestExportHfCheckpoint,
    TestGenerateSample,
    TestSaveTokenizer,
    TestUnwrap,
    TestValidate,
)
from test_code.drop_in.quantize import (  # noqa: F401
    TestConstants,
    TestConstructor,
    TestDecoderType,
    TestQuantCfg,
    TestQuantCfgOfFilesAndNamespaces,
    TestQuantize,
    TestQuantizeForReal,
    TestQuantizeOtherStandIns,
    TestSetup,
)
from test_code.support import installed, jobs_scales, tolerances
from test_code.support import jobs_quant as jobs

MODULE = "nemo.collections.llm.modelopt.quantization.quantizer"


@pytest.fixture
def quantization():
    from nemo.collections.llm.modelopt.quantization import quantizer

    return quantizer


@pytest.fixture
def gpu():
    with patch("torch.cuda.is_available", return_value=True):
        yield


def build(quantization, algorithm="fp8", decoder_type=None, generate_sample=False, **settings):
    return quantization.Quantizer(
        quantization.QuantizationConfig(algorithm=algorithm, **settings),
        quantization.ExportConfig(path="out", decoder_type=decoder_type, generate_sample=generate_sample),
    )


@pytest.fixture
def stand_in():
    model = MagicMock()
    model.tokenizer.vocab_size = 321
    return model


@pytest.fixture
def patched(gpu):
    with (
        patch(f"{MODULE}.mtq") as mtq,
        patch(f"{MODULE}.unwrap_for_modelopt_operations") as unwrap,
        patch(f"{MODULE}.is_global_rank_zero", return_value=True) as rank_zero,
    ):
        mtq.config.need_calibration.return_value = True
        yield mtq, unwrap, rank_zero


# --- on stand-ins -----------------------------------------------------------------------------------------------------


def test_no_algorithm_returns_the_model_unchanged(quantization, patched, stand_in):
    mtq, _, _ = patched
    assert build(quantization, None).quantize(stand_in) is stand_in
    mtq.quantize.assert_not_called()
    stand_in.freeze.assert_not_called()


def test_modelopt_gets_the_unwrapped_model_the_config_and_the_loop(quantization, patched, stand_in):
    mtq, unwrap, _ = patched
    loop = MagicMock()
    quantizer = build(quantization)
    with patch.object(quantizer, "_get_quant_cfg", return_value={"quant_cfg": {}, "algorithm": "max"}) as config:
        assert quantizer.quantize(stand_in, loop) is stand_in
    mtq.quantize.assert_called_once_with(unwrap.return_value, config.return_value, loop)
    assert stand_in.config.vocab_size == 321
    stand_in.freeze.assert_called_once_with()


@pytest.mark.parametrize(("needed", "calls"), [(True, 1), (False, 0)])
def test_a_loop_is_built_only_where_calibration_is_needed(quantization, patched, stand_in, needed, calls):
    mtq, _, _ = patched
    mtq.config.need_calibration.return_value = needed
    quantizer = build(quantization)
    with patch.object(quantizer, "_get_forward_loop") as build_loop:
        quantizer.quantize(stand_in)
    assert build_loop.call_count == calls
    assert mtq.quantize.call_args.args[2] is (build_loop.return_value if needed else None)


@pytest.mark.parametrize(("algorithm", "lowest"), [("fp8", 4.48), ("int8_sq", 1.27), ("int8", 0.0)])
def test_amax_of_inputs_is_clamped_for_gpt_decoders(quantization, patched, stand_in, algorithm, lowest):
    mtq, _, _ = patched
    build(quantization, algorithm, "gpt").quantize(stand_in, MagicMock())
    model, pattern, clamp = mtq.postprocess_amax.call_args.args
    assert model is mtq.quantize.return_value
    assert pattern == "*input_quantizer"
    amax = clamp(torch.tensor([0.0, 1e-3, 5.0, 400.0]))
    # fp32 holds 0.01 * 448 to seven digits.
    torch.testing.assert_close(amax, torch.tensor([lowest, max(lowest, 1e-3), 5.0, 400.0]))


@pytest.mark.parametrize("decoder_type", ["llama", "qwen"])
def test_amax_is_left_alone_for_other_decoders(quantization, patched, stand_in, decoder_type):
    mtq, _, _ = patched
    build(quantization, "fp8", decoder_type).quantize(stand_in, MagicMock())
    mtq.postprocess_amax.assert_not_called()


@pytest.mark.parametrize("is_zero", [True, False])
def test_summary_is_printed_on_rank_zero_only(quantization, patched, stand_in, is_zero):
    mtq, _, rank_zero = patched
    rank_zero.return_value = is_zero
    build(quantization).quantize(stand_in, MagicMock())
    assert mtq.print_quant_summary.called is is_zero


@pytest.mark.parametrize("wanted", [True, False])
def test_sample_is_generated_when_asked(quantization, patched, stand_in, wanted):
    quantizer = build(quantization, generate_sample=wanted)
    with patch.object(quantizer, "_generate_sample") as sample:
        quantizer.quantize(stand_in, MagicMock())
    assert sample.called is wanted


def test_stock_form_of_the_forward_loop_makes_one_call(quantization, gpu):
    loader, model = MagicMock(), MagicMock()
    with patch("megatron.core.pipeline_parallel.schedules.get_forward_backward_func") as get:
        build(quantization).create_megatron_forward_loop(loader, 3, seq_length=8, micro_batch_size=2)(model)
    schedule = get.return_value
    keywords = schedule.call_args.kwargs
    assert keywords["data_iterator"] is loader.return_value
    assert (keywords["num_microbatches"], keywords["seq_length"], keywords["micro_batch_size"]) == (3, 8, 2)
    assert keywords["forward_only"] is True and keywords["model"] is model


# --- validation -------------------------------------------------------------------------------------------------------


def test_without_gpu_and_cpu_backend_there_is_an_environment_error(quantization):
    with (
        patch("torch.cuda.is_available", return_value=False),
        patch("nemo_modelopt_dropin.cpu_backend.is_enabled", return_value=False),
        pytest.raises(EnvironmentError, match="GPU is required"),
    ):
        build(quantization)


@pytest.mark.parametrize("algorithm", ["MXINT8_DEFAULT_CFG", "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG"])
def test_cuda_kernels_are_demanded_at_construction(quantization, algorithm):
    if not hasattr(mtq, algorithm):
        pytest.skip("modelopt 0.37 has fewer presets")
    with (
        patch("torch.cuda.is_available", return_value=False),
        patch("nemo_modelopt_dropin.cpu_backend.is_enabled", return_value=True),
        pytest.raises(EnvironmentError, match=f"GPU is required.*{algorithm}"),
    ):
        build(quantization, algorithm)


@pytest.mark.parametrize(
    "algorithm", ["fp8", "int8", "int8_sq", "int4", "int4_awq", "w4a8_awq", "nvfp4", "mxfp8", None]
)
def test_the_other_algorithms_can_run_on_the_cpu(quantization, algorithm):
    with (
        patch("torch.cuda.is_available", return_value=False),
        patch("nemo_modelopt_dropin.cpu_backend.is_enabled", return_value=True),
    ):
        build(quantization, algorithm)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "fp88"}, "Unsupported quantization format: .*Did you mean 'fp8'"),
        ({"algorithm": "no/such/file.json"}, "Unsupported quantization format: .*existing JSON file"),
        ({"kv_cache_qformat": "int3"}, "Unsupported kv cache quantization format: .*'int3'.*fp8"),
        ({"sq_alpha": 1.5}, r"sq_alpha=1.5 must be a number, from 0.0 to 1.0"),
        ({"awq_block_size": -1}, "awq_block_size=-1 must be an integer, at least 0"),
        ({"calibration_dataset_size": 0}, "calibration_dataset_size=0 must be an integer, at least 1"),
        ({"calibration_batch_size": 2.5}, "calibration_batch_size=2.5 must be an integer"),
        ({"calibration_batch_size": "64"}, "calibration_batch_size='64' must be an integer"),
        ({"calibration_seq_len": 1}, "calibration_seq_len=1 must be an integer, at least 2"),
        ({"comparison_size": True}, "comparison_size=True must be an integer"),
    ],
)
def test_bad_quantization_settings_are_refused_at_construction(quantization, gpu, settings, message):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    with pytest.raises(ModelOptConfigError, match=message):
        build(quantization, **{"algorithm": "fp8", **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "fp64"}, "Unsupported export dtype: fp64. dtype='fp64'; allowed: .*bf16"),
        ({"export_format": "onnx"}, "Unsupported export format: onnx. export_format='onnx'.*trtllm"),
        ({"inference_tp": 0}, "inference_tp=0 must be an integer, at least 1"),
        (
            {"hf_layout": "compressed"},
            "hf_layout='compressed' is not supported; allowed: .*'auto', .*Did you mean 'compressed-tensors'",
        ),
        ({"max_shard_size": "5 apples"}, "max_shard_size 5 apples is not a size of a file; use .* such as '5GB'"),
        ({"max_shard_size": 5}, "max_shard_size 5 is not a size of a file"),
    ],
)
def test_bad_export_settings_are_refused_at_construction(quantization, gpu, settings, message):
    with pytest.raises(AssertionError, match=message):
        quantization.Quantizer(
            quantization.QuantizationConfig(), quantization.ExportConfig(**{"path": "out", **settings})
        )


@installed.formats_at_construction
def test_a_layout_that_cannot_hold_the_algorithm_is_refused_at_construction(quantization, gpu):
    message = "algorithm='w4a8_awq' cannot be exported with hf_layout='compressed-tensors': .* cannot hold W4A8_AWQ"
    with pytest.raises(AssertionError, match=message):
        quantization.Quantizer(
            quantization.QuantizationConfig(algorithm="w4a8_awq"),
            quantization.ExportConfig("out", export_format="hf", hf_layout="compressed-tensors"),
        )


def test_export_config_may_be_none_until_exporting(quantization, gpu):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    quantizer = quantization.Quantizer(quantization.QuantizationConfig(), None)
    assert quantizer.torch_dtype == torch.bfloat16
    with pytest.raises(ModelOptConfigError, match="export_config is None"):
        quantizer.export(MagicMock(), "somewhere")


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2))])
def test_other_models_get_a_clear_error(quantization, gpu, model):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    with pytest.raises(ModelOptConfigError, match=r"expects an llm.GPTModel.*not a (Linear|Sequential)"):
        build(quantization).quantize(model)


def test_decoder_type_that_cannot_be_told(quantization, gpu, stand_in):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    assert build(quantization)._get_decoder_type(stand_in, optional=True) is None
    with pytest.raises(ModelOptConfigError, match=r"provide the decoder type explicitly in the ExportConfig"):
        build(quantization)._get_decoder_type(stand_in)


# --- on real models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(ranks_factory, tmp_path_factory):
    """Return a folder with a trained checkpoint of a tiny llm.LlamaModel and a calibration file."""
    folder = tmp_path_factory.mktemp("quantizer")
    ranks_factory(1).run(jobs.make_checkpoint, str(folder / "llama"), True)
    jobs.corpus(folder / "text.jsonl")
    return folder


@pytest.fixture(scope="module")
def one_rank(ranks_factory, work):
    """Return what fp8 quantization gives on one rank."""
    return ranks_factory(1).run(jobs.quantize_loaded, str(work / "llama"), str(work / "text.jsonl"))[0]


def test_fp8_on_a_real_model(one_rank):
    report = one_rank["report"]
    assert one_rank["same"]
    # 4 linear layers in each of 4 layers, keys and values in each attention; the output layer is not quantized.
    assert report["quantizers"] == {"weight": 16, "input": 16, "output": 0, "kv_cache": 8 if installed.KV_CACHE else 0}
    assert report["held_out"] and report["evaluation_tokens"] > 50 and report["calibration_rows"] == 20
    # FP8 keeps 3 bits of mantissa: the outputs change by a few percent, the loss hardly.
    assert 0.0 < report["relative_output_error"] < 0.1
    assert abs(report["loss_after"] - report["loss_before"]) < 0.02
    # From 16 bits to 8, except for the embedding, the output layer and the norms.
    assert 0.5 * report["weight_bytes_before"] < report["weight_bytes_after"] < report["weight_bytes_before"]
    assert all(torch.isfinite(amax).all() and (amax > 0).all() for amax in one_rank["amax"].values())


@pytest.mark.parametrize(
    ("tp", "pp", "dp"), [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2)], ids=["tp2", "pp2", "dp2", "dp2tp2"]
)
def test_layouts_agree_with_one_rank(ranks, work, one_rank, tp, pp, dp):
    paths = (str(work / "llama"), str(work / "text.jsonl"))
    results = ranks(tp * pp * dp).run(jobs.quantize_loaded, *paths, tp, pp)
    merged = {name: amax for result in results for name, amax in result["amax"].items()}
    assert set(merged) == set(one_rank["amax"])
    for name, amax in one_rank["amax"].items():
        # Sums in another order under TP move fp32 activations by about 1e-6.
        torch.testing.assert_close(merged[name], amax, rtol=tolerances.of("amax"), atol=1e-7)
    for result in results:
        for key in ("loss_before", "loss_after", "relative_output_error"):
            # A value that rounds to the neighbouring FP8 number under TP moves the error slightly.
            assert result["report"][key] == pytest.approx(one_rank["report"][key], rel=1e-3)
        assert result["report"]["quantizers"] == one_rank["report"]["quantizers"]


@pytest.mark.parametrize(
    ("algorithm", "settings", "worst"),
    [
        ("int8", {}, 0.03),
        ("int8_sq", {}, 0.03),
        ("int4", {"enable_kv_cache": installed.KV_CACHE}, 0.3),
        ("int4_awq", {"awq_block_size": 16}, 0.3),
        ("w4a8_awq", {"awq_block_size": 16}, 0.3),
        # modelopt 0.37 has no such preset; test_quant_cfg.py checks the error.
        *([("INT8_WEIGHT_ONLY_CFG", {}, 0.03)] if hasattr(mtq, "INT8_WEIGHT_ONLY_CFG") else []),
    ],
)
def test_every_algorithm_runs_on_two_tensor_ranks(ranks, work, algorithm, settings, worst):
    # With the preset's blocks of 128, two ranks would split blocks of this model.
    name = jobs_scales.plain_int4(str(work / "int4.json")) if algorithm == "int4" else algorithm
    results = ranks(2).run(jobs.quantize_loaded, str(work / "llama"), str(work / "text.jsonl"), 2, 1, name, **settings)
    report = results[0]["report"]
    # Rounding to 8 or 4 bits: half a step of 1/127 or 1/7 of the largest value, averaged over a row.
    assert 0.0 < report["relative_output_error"] < worst
    assert report["quantizers"]["weight"] == 16
    assert report["quantizers"]["kv_cache"] == (0 if "int8" in algorithm.lower() or not installed.KV_CACHE else 8)


@pytest.mark.skipif(not installed.KV_CACHE, reason="modelopt 0.37 cannot keep these quantizers")
@pytest.mark.parametrize("enable", [True, None])
def test_the_cache_is_quantized_though_one_stage_has_no_attention(ranks, work, enable):
    paths = (str(work / "llama"), str(work / "text.jsonl"))
    settings = {"enable_kv_cache": enable, "comparison_size": 0, "first_stage_without_layers": True}
    results = ranks(2).run(jobs.quantize_loaded, *paths, pp=2, **settings)
    for one in results:
        assert one["report"]["quantizers"]["kv_cache"] == 4  # keys and values of the last stage's two layers


def test_smoothquant_alpha_changes_the_result(ranks, work):
    outcomes = [
        ranks(1).run(
            jobs.quantize_loaded, str(work / "llama"), str(work / "text.jsonl"), algorithm="int8_sq", sq_alpha=alpha
        )[0]["amax"]
        for alpha in (0.5, 1.0)
    ]
    name = "decoder.layers.0.mlp.linear_fc1.input_quantizer"
    assert not torch.allclose(outcomes[0][name], outcomes[1][name])


def test_a_quantized_model_is_quantized_anew_from_its_own_weights(ranks, work):
    paths = (str(work / "llama"), str(work / "text.jsonl"))
    direct, anew = (
        ranks(1).run(jobs.quantize_loaded, *paths, algorithm="int8", enable_kv_cache=False, before=before)[0]
        for before in (None, "fp8")
    )
    if not installed.KV_CACHE:
        assert "nvidia-modelopt 0.37.0 cannot quantize it again" in anew["error"]
        return
    assert anew["amax"].keys() == direct["amax"].keys()
    for name, amax in direct["amax"].items():
        torch.testing.assert_close(anew["amax"][name], amax, rtol=0, atol=0)
    for number in ("loss_before", "loss_after", "quantizers", "weight_bytes_after"):
        assert anew["report"][number] == direct["report"][number]


def test_scaled_weights_are_not_quantized_anew(ranks, work):
    paths = (str(work / "llama"), str(work / "text.jsonl"))
    found = ranks(2).run(jobs.quantize_loaded, *paths, tp=2, algorithm="fp8", before="int8_sq")
    assert all("scaled its weights (AWQ or SmoothQuant)" in one["error"] for one in found)


def test_without_comparison_no_rows_are_held_out(ranks, work):
    report = ranks(1).run(
        jobs.quantize_loaded, str(work / "llama"), str(work / "text.jsonl"), comparison_size=0, enable_kv_cache=False
    )[0]["report"]
    assert "loss_before" not in report and not report["held_out"]
    assert report["quantizers"]["kv_cache"] == 0


def test_rows_that_are_not_packed_are_measured_without_padding(ranks, work, one_rank):
    paths = (str(work / "llama"), str(work / "text.jsonl"))
    together, alone = (
        ranks(1).run(jobs.quantize_loaded, *paths, packed=False, calibration_batch_size=size)[0]["amax"]
        for size in (4, 1)
    )
    assert set(together) == set(one_rank["amax"])
    for name, amax in alone.items():
        # Products of other shapes sum in another order.
        torch.testing.assert_close(together[name], amax, rtol=tolerances.of("amax"), atol=1e-7)


def test_own_forward_loop_skips_the_comparison(ranks, work):
    result = ranks(1).run(jobs.quantize_with_loop, str(work / "llama"))[0]
    assert "loss_before" not in result["report"]
    assert result["report"]["quantizers"]["weight"] == 16
    assert any("no comparison" in line for line in result["log"])

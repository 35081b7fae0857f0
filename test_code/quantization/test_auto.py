"""Mixed precision: the same choice in every layout, resuming, saving and loading; patterns that match nothing."""

from __future__ import annotations

import json
from unittest.mock import patch

import pytest
import torch

from test_code.support import installed, jobs_auto, jobs_hf, jobs_quant, jobs_scales, jobs_state

# Formats that calibrate by a maximum, which is equal on the ranks of any layout.
PLAIN = {"auto_quantize_formats": ["int4", "fp8"], "enable_kv_cache": False}
# INT4's blocks of 128 inputs depend on the tensor-parallel shards; one scale per tensor is equal in any layout.
FP8 = {"auto_quantize_formats": ["fp8"], "auto_quantize_bits": 12.0, "enable_kv_cache": False}
needs_search = pytest.mark.skipif(not installed.AUTO, reason="refused on this modelopt: see test_old_modelopt")


@pytest.fixture(scope="module")
def work(ranks_factory, tmp_path_factory):
    """Return a folder with a trained checkpoint of a tiny llm.LlamaModel and a calibration file."""
    folder = tmp_path_factory.mktemp("auto")
    ranks_factory(1).run(jobs_quant.make_checkpoint, str(folder / "llama"), True)
    jobs_quant.corpus(folder / "text.jsonl")
    return folder


def search(ranks_factory, work, ranks, tp, pp, runs):
    paths = (str(work / "llama"), str(work / "text.jsonl"))
    return ranks_factory(ranks).run(jobs_auto.searches, *paths, tp, pp, runs, timeout=300)


@pytest.fixture(scope="module")
def one_rank(ranks_factory, work):
    """Return searches on one rank: the later ones resume from the file of the first, two request what is impossible."""
    state = {**PLAIN, "auto_quantize_checkpoint": str(work / "one.pth")}
    runs = [
        state,
        state,
        {**state, "auto_quantize_bits": 9.0},
        {**PLAIN, "auto_quantize_bits": 5.0},
        {**state, "auto_quantize_formats": ["int8", "fp8"], "auto_quantize_bits": 12.0},
        FP8,
    ]
    return search(ranks_factory, work, 1, 1, 1, runs)[0]


def bits_of(report, weights) -> float:
    widths = {"int4": 4, "fp8": 8, "none": 16}
    return sum(weights[name.split(".")[-1]] * widths[fmt] for name, fmt in report["formats"].items()) / sum(
        weights[name.split(".")[-1]] for name in report["formats"]
    )


@needs_search
def test_the_formats_take_the_bits_asked_for(one_rank):
    # Weights of a tiny layer: hidden 64, ffn 128 gated, 4 heads in 2 groups, vocabulary 256.
    weights = {"linear_qkv": 64 * 128, "linear_proj": 64 * 64, "linear_fc1": 64 * 256, "linear_fc2": 128 * 64}
    weights["output_layer"] = 64 * 256
    for result, bits in ((one_rank[0], 10.0), (one_rank[2], 9.0)):
        report = result["report"]
        assert len(report["formats"]) == 17 and report["formats"]["output_layer"] == "none"
        assert report["effective_bits"] == pytest.approx(bits_of(report, weights)) and bits_of(report, weights) <= bits
        used = [fmt for fmt in report["formats"].values() if fmt != "none"]
        assert report["quantizers"]["weight"] == len(used) and report["quantizers"]["input"] == used.count("fp8")
        assert report["relative_output_error"] < 0.1
    assert len(set(one_rank[0]["report"]["formats"].values())) == 3


@needs_search
def test_a_resumed_search_runs_no_data(one_rank, work):
    assert one_rank[0]["counts"]["_score"] > 0 and one_rank[0]["counts"]["_calibrate"] > 0
    for resumed in one_rank[1:3]:
        assert resumed["counts"] == {"_calibrate": 0, "_score": 0}
    assert one_rank[1]["report"]["formats"] == one_rank[0]["report"]["formats"]
    for name, amax in one_rank[0]["amax"].items():
        assert torch.equal(one_rank[1]["amax"][name], amax), name
    assert not list(work.glob("*.part"))


@needs_search
def test_bits_that_no_choice_reaches_are_refused_with_the_least(one_rank):
    # The output layer stays in 16 bits: (4 * 4 layers + 16 * output layer) / all.
    assert "auto_quantize_bits=5.0 cannot be reached on this model: at least 5.20" in one_rank[3]["error"]
    assert "output_layer" in one_rank[3]["error"]


@needs_search
def test_a_file_of_another_search_is_refused(one_rank):
    assert "belongs to a search with other formats; delete it" in one_rank[4]["error"]


@needs_search
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (1, 1)], ids=["tp2", "pp2", "dp2"])
def test_layouts_choose_as_one_rank_does(ranks, work, one_rank, tp, pp):
    expected = one_rank[5 if tp == 2 else 0]["report"]
    for result in search(ranks, work, 2, tp, pp, [FP8 if tp == 2 else PLAIN]):
        assert result[0]["report"]["formats"] == expected["formats"]
        assert result[0]["report"]["effective_bits"] == pytest.approx(expected["effective_bits"])
        assert len(set(expected["formats"].values())) > 1


@needs_search
def test_tensor_ranks_agree_and_resume_with_awq_and_kv_cache(ranks, work):
    # AWQ searches by shards, so its scores depend on TP. A resumed search calibrates it again, but does not score it.
    results = search(ranks, work, 2, 2, 1, [{"auto_quantize_checkpoint": str(work / "tp")}] * 2)
    reports = [run["report"] for result in results for run in result]
    assert all(report["formats"] == reports[0]["formats"] for report in reports)
    assert {"int4_awq", "fp8"} <= set(reports[0]["formats"].values()) and reports[0]["quantizers"]["kv_cache"] == 8
    assert results[0][0]["counts"]["_score"] > 0 and results[0][1]["counts"]["_score"] == 0
    assert (work / "tp" / "rank1.safetensors").is_file()


def test_a_planted_search_runs_no_code(tmp_path):
    from nemo.collections.llm.modelopt.quantization.insert import searcher

    torch.save({"identity": jobs_state.Planted(str(tmp_path / "ran"))}, tmp_path / "search.pth")
    state, problem = searcher._read_state(str(tmp_path / "search.pth"), {})
    assert state == {} and not (tmp_path / "ran").exists()
    assert "search.pth is a pickle" in problem and "Delete it to search again, or use another path." in problem


@needs_search
def test_the_checkpoint_reloads_in_another_layout(ranks, work):
    settings = {"auto_quantize_bits": 10.0, "awq_block_size": 16}
    seen = ranks(1).run(jobs_auto.ptq_of_dataset, str(work / "llama"), str(work / "out"), **settings)[0]
    assert seen["report"]["calibration_rows"] == 12 and set(seen["report"]["formats"].values()) >= {"int4_awq", "fp8"}
    for result in ranks(2).run(jobs_quant.restored_amax, str(work / "out"), 1, 2):
        assert result
        for name, amax in result.items():
            torch.testing.assert_close(amax, seen["amax"][name], rtol=0, atol=0)


# --- clamp and export ---


_INNER = {
    "linear_qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "linear_proj": ("self_attn.o",),
    "linear_fc1": ("mlp.gate", "mlp.up"),
    "linear_fc2": ("mlp.down",),
}


@needs_search
def test_a_mixed_model_of_a_gpt_decoder_is_clamped_by_the_format_of_each_layer(ranks, work):
    found = ranks(1).run(jobs_auto.clamped, str(work / "llama"), str(work / "text.jsonl"))[0]
    before, after = found["before"], found["after"]
    # The inputs of W4A8 are FP8 as well, but stock's clamp depends on the name of the algorithm.
    by_format = {"fp8": 4.48, "w4a8_awq": 0.0}
    raised, low = set(), set()
    for name, amax in before.items():
        fmt = found["formats"][name.removesuffix(".input_quantizer")]
        assert after[name] == pytest.approx(max(amax, by_format[fmt]), rel=1e-6)
        raised |= {fmt} if after[name] > amax else set()
        low |= {fmt} if amax < 4.48 else set()
    assert raised == {"fp8"} and low == set(by_format)


@needs_search
def test_layers_that_readers_fuse_share_a_format(ranks, work):
    """Q, k and v are one layer of Megatron, gate and up another; the experts of a layer are chosen together."""
    checkpoint, data = str(work / "moe"), str(work / "text.jsonl")
    ranks(1).run(jobs_scales.make_moe, checkpoint)
    settings = {"auto_quantize_formats": ["nvfp4", "fp8"], "enable_kv_cache": False, "auto_quantize_bits": 9.0}
    settings["auto_quantize_checkpoint"] = str(work / "moe-search")
    first, again = ranks(1).run(jobs_auto.searches, checkpoint, data, 1, 1, [settings, settings], timeout=300)[0]
    found = first["report"]["formats"]
    by_layer: dict[str, set[str]] = {}
    for name, chosen in found.items():
        if ".experts." in name:
            by_layer.setdefault(name.partition(".local_experts.")[0], set()).add(chosen)
    # 2 layers, each with 4 experts of 2 linear layers.
    assert len(by_layer) == 2 and all(len(formats) == 1 for formats in by_layer.values()), by_layer
    assert sum(".experts." in name for name in found) == 2 * 4 * 2
    assert len(set(found.values())) > 1
    kinds = {name.rpartition(".")[2] for name in found if ".layers." in name}
    assert kinds == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    assert again["report"]["formats"] == found and again["counts"] == {"_calibrate": 0, "_score": 0}


@needs_search
def test_experts_on_several_ranks_are_not_searched(monkeypatch, cpu_backend):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.insert import searcher

    monkeypatch.setattr(searcher.parallel_state, "model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(searcher.parallel_state, "get_expert_model_parallel_world_size", lambda: 2)
    with pytest.raises(ModelOptConfigError, match=r'algorithm="auto" needs expert parallel size 1, not 2'):
        searcher.check_supported()


@needs_search
@pytest.mark.parametrize("formats", [["fp8"], ["int4_awq"]])
def test_a_mixed_model_goes_to_hugging_face(ranks, work, formats):
    out = work / f"hf-{formats[0]}"
    bits = 12.0 if formats == ["fp8"] else 10.0
    settings = {"auto_quantize_formats": formats, "auto_quantize_bits": bits, "awq_block_size": 16}
    found = ranks(1).run(jobs_auto.auto_to_hf, str(work / "llama"), str(work / "text.jsonl"), str(out), **settings)[0]
    assert found["error"] == "" and set(found["formats"].values()) == {formats[0], "none"}
    jobs_hf.assert_same_logits(*found["logits"])
    excluded = json.loads((out / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    expected = {"lm_head"}
    for name in (n for n, fmt in found["formats"].items() if fmt == "none" and "layers" in n):
        layer, leaf = name.split(".")[2], name.rpartition(".")[2]
        expected |= {f"model.layers.{layer}.{inner}_proj" for inner in _INNER[leaf]}
    # The exclusions name the layers themselves: the name of a parent would also exclude its quantized layers.
    assert expected == set(excluded) and expected > {"lm_head"}
    assert json.loads((out / "config.json").read_text())["quantization_config"]["ignore"] == excluded


@installed.formats_at_construction
@needs_search
def test_formats_that_one_hugging_face_checkpoint_cannot_describe_are_refused_before_the_search(cpu_backend):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    def build(formats, fmt):
        config = q.QuantizationConfig(
            algorithm="auto", auto_quantize_bits=10, auto_quantize_formats=formats, calibration_dataset=["a text"]
        )
        return q.Quantizer(config, q.ExportConfig(path="out", export_format=fmt))

    with pytest.raises(ModelOptConfigError, match=r"auto_quantize_formats=\['w4a8_awq', 'fp8_wo'\].*together"):
        build(["w4a8_awq", "fp8_wo"], "hf")
    build(["int4_awq", "fp8"], "hf")
    build(["int4_awq", "fp8"], "nemo")
    build(["int8", "int8_sq"], "hf")


def test_old_modelopt_is_refused_at_construction(monkeypatch):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import quantizer as q
    from nemo.collections.llm.modelopt.quantization.insert import searcher

    if installed.AUTO:
        monkeypatch.setattr(searcher, "_Base", object)
    config = q.QuantizationConfig("auto", auto_quantize_bits=8)
    with (
        patch("torch.cuda.is_available", return_value=True),
        pytest.raises(ModelOptConfigError, match=r'algorithm="auto" needs nvidia-modelopt 0\.43'),
    ):
        q.Quantizer(config, None)


# --- bad settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, 'algorithm="auto" needs auto_quantize_bits'),
        ({"auto_quantize_bits": 17}, "auto_quantize_bits=17 must be a number, from 1 to 16"),
        ({"auto_quantize_bits": "5"}, "auto_quantize_bits='5' must be a number"),
        ({"auto_quantize_bits": 3.5}, "auto_quantize_bits=3.5 cannot be reached: .*'int4_awq' with 4 bits"),
        ({"auto_quantize_bits": 8, "auto_quantize_formats": []}, "must be a list of algorithms, at least one"),
        ({"auto_quantize_bits": 8, "auto_quantize_formats": "fp8"}, "auto_quantize_formats='fp8' must be a list"),
        ({"auto_quantize_bits": 8, "auto_quantize_formats": ["fp8", "fp8"]}, "names a format twice"),
        ({"auto_quantize_bits": 8, "auto_quantize_formats": ["fp9"]}, "auto_quantize_formats='fp9'.*mean 'fp8'"),
        (
            {"auto_quantize_bits": 8, "auto_quantize_formats": ["NVFP4_MLP_ONLY_CFG"]},
            "quantizes only layers with certain names",
        ),
        ({"algorithm": "fp8", "auto_quantize_bits": 8}, "auto_quantize_bits=8 needs algorithm=\"auto\", not 'fp8'"),
        (
            {"algorithm": "fp8", "auto_quantize_checkpoint": "x"},
            "auto_quantize_checkpoint='x' needs algorithm=\"auto\"",
        ),
    ],
)
def test_bad_settings_are_refused_at_construction(settings, message):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    config = q.QuantizationConfig(**{"algorithm": "auto", **settings})
    with patch("torch.cuda.is_available", return_value=True), pytest.raises(ModelOptConfigError, match=message):
        q.Quantizer(config, None)


def test_nemo_run_reads_the_settings_from_a_command_line():
    from nemo_run.cli.cli_parser import parse_cli_args

    from nemo.collections.llm.modelopt.quantization import quantizer as q

    line = "algorithm=auto auto_quantize_bits=6.5 auto_quantize_formats=['int4','fp8'] calibration_column=body"
    line += " calibration_shuffle_seed=3 auto_quantize_checkpoint=some/path enable_kv_cache=False"
    parsed = parse_cli_args(q.QuantizationConfig, line.split())
    assert (parsed.algorithm, parsed.auto_quantize_bits, parsed.auto_quantize_formats) == ("auto", 6.5, ["int4", "fp8"])
    assert (parsed.calibration_column, parsed.calibration_shuffle_seed, parsed.enable_kv_cache) == ("body", 3, False)


@needs_search
def test_formats_that_need_cuda_kernels_say_so_at_construction(cpu_backend):
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    config = q.QuantizationConfig("auto", auto_quantize_bits=9, auto_quantize_formats=["MXINT8_DEFAULT_CFG", "fp8"])
    with (
        patch("torch.cuda.is_available", return_value=False),
        patch("nemo_modelopt_dropin.cpu_backend.is_enabled", return_value=True),
        pytest.raises(EnvironmentError, match="GPU is required.*MXINT8_DEFAULT_CFG"),
    ):
        q.Quantizer(config, None)


# --- patterns ---------------------------------------------------------------------------------------------------------

INT8 = {"num_bits": 8, "axis": None}


@pytest.fixture(scope="module")
def network():
    """Return a small torch model: layers.0, layers.1 (Linear) and conv."""
    return torch.nn.ModuleDict(
        {
            "layers": torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]),
            "conv": torch.nn.Conv1d(1, 1, 1),
        }
    )


def quantized_by(network, quant_cfg):
    """Return a copy of the network with quantizers by that quant_cfg, uncalibrated."""
    import copy

    import modelopt.torch.quantization as mtq

    from nemo.collections.llm.modelopt.quantization import quant_cfg_entries
    from nemo.collections.llm.modelopt.quantization.insert import patterns

    native = quant_cfg_entries.native({"quant_cfg": quant_cfg, "algorithm": None}, "a test")
    with patterns.checked_here():
        return mtq.quantize(copy.deepcopy(network), native, None)


@pytest.mark.parametrize(
    ("quant_cfg", "from_file", "message"),
    [
        ({"*weight_quantizer": INT8}, True, None),
        ({"*layers.1*": INT8, "*layers.7*weight_quantizer": INT8}, True, r"layers.7.*nearest: .*layers\.\*\.weight_q"),
        ({"*weight_quantizer": INT8, "*wieght_quantizer": {"enable": False}}, True, "wieght_quantizer"),
        ({"*weight_quantizer": INT8, "*lm_head*": {"enable": False}}, True, None),
        ({"*weight_quantizer": INT8, "nn.BatchNorm1d": {"*": {"enable": False}}}, True, None),
        ({"nn.Conv1d": {"*weight_quantizer": INT8}}, True, None),
        ({"nn.Conv2d": {"*weight_quantizer": INT8}}, True, r"'nn\.Conv2d: \*weight_quantizer'"),
        ({"*weight_quantizer": INT8, "*[kv]_bmm_quantizer": INT8}, False, None),
        ({"*experts*weight_quantizer": INT8, "default": {"enable": False}}, False, r"\*experts\*weight_quantizer"),
    ],
)
def test_patterns(network, quant_cfg, from_file, message):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.insert import patterns

    model = quantized_by(network, quant_cfg)
    if message is None:
        patterns.check(model, {"quant_cfg": quant_cfg}, from_file)
        return
    with pytest.raises(ModelOptConfigError, match=f"match no quantizer of this model: .*{message}"):
        patterns.check(model, {"quant_cfg": quant_cfg}, from_file)


def test_weights_that_a_later_setting_leaves_unquantized(network):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.insert import patterns

    off = {"enable": False}
    quant_cfg = {"default": off, "*layers*weight_quantizer": INT8, "*layers*": off}
    with pytest.raises(ModelOptConfigError, match=r"quantizes no weight: \*layers\*weight_quantizer should"):
        patterns.check_weights(quantized_by(network, quant_cfg), {"quant_cfg": quant_cfg})
    for good in (
        {"default": off, "*layers*input_quantizer": INT8, "*layers*weight_quantizer": off},
        {"default": off, "*conv*": off, "*layers.1.weight_quantizer": INT8},
    ):
        patterns.check_weights(quantized_by(network, good), {"quant_cfg": good})


def test_patterns_of_a_file_on_pipeline_stages(ranks, work):
    def file(name, quant_cfg):
        (work / name).write_text(json.dumps({"quant_cfg": quant_cfg, "algorithm": "max"}))
        # Not a NeMo checkpoint, which cannot hold a quantized output layer with modelopt from 0.45.
        return {"algorithm": str(work / name), "comparison_size": 0, "export_format": "hf"}

    last_stage_only = {"*output_layer.weight_quantizer": INT8, "default": {"enable": False}}
    runs = [
        file("good.json", last_stage_only),
        file("bad.json", {**last_stage_only, "*linear_fc3.weight_quantizer": INT8}),
        file("none.json", {"*fc9*": INT8}),
        file("off.json", {**last_stage_only, "*output_layer*": {"enable": False}}),
    ]
    for result in ranks(2).run(jobs_auto.quantize_many, str(work / "llama"), str(work / "text.jsonl"), 1, 2, runs):
        assert result[0] == ""
        assert "'*linear_fc3.weight_quantizer' (nearest: ['decoder.layers.*.mlp.linear_fc" in result[1]
        assert result[2].startswith("ModelOptConfigError: quant_cfg patterns that match no quantizer")
        assert result[3].startswith("ModelOptConfigError: The quant_cfg quantizes no weight: *output_layer.weight_q")

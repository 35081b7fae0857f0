"""quant_cfg: presets do not change, options are applied, JSON files are read correctly."""

from __future__ import annotations

import copy
import json
from unittest.mock import MagicMock, patch

import modelopt.torch.quantization as mtq
import pytest


@pytest.fixture(autouse=True)
def gpu():
    with patch("torch.cuda.is_available", return_value=True):
        yield


def quant_cfg(algorithm, decoder_type="llama", **settings):
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    built = q.Quantizer(
        q.QuantizationConfig(algorithm=algorithm, **settings), q.ExportConfig(path="out", decoder_type=decoder_type)
    )
    return built._get_quant_cfg(MagicMock())


def entries(config):
    """Return the settings of a quant_cfg, in the form of the installed modelopt."""
    from nemo.collections.llm.modelopt.quantization import quant_cfg_entries

    return quant_cfg_entries.entries(config)


def left_as_before():
    """Return the names of the entries that keep embeddings and norms as they are, which every quant_cfg may have."""
    from nemo.collections.llm.modelopt.quantization import quant_cfg_entries

    return quant_cfg_entries.left_as_before()


def attributes(config, wildcard):
    """Return the attributes that the last entry with a wildcard sets, those of the first quantizer of a sequence."""
    return [entry for entry in entries(config) if entry.wildcard == wildcard][-1].steps[0]


def has_kv(config) -> bool:
    return any("bmm_quantizer" in entry.wildcard for entry in entries(config))


@pytest.mark.parametrize("algorithm", ["fp8", "int8", "int8_sq", "int4", "int4_awq", "w4a8_awq", "nvfp4", "block_fp8"])
@pytest.mark.parametrize("kv", [None, True, False])
def test_presets_of_modelopt_are_never_changed(algorithm, kv):
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    names = [name for name in dir(mtq) if name.endswith("_CFG")]
    before = copy.deepcopy({name: getattr(mtq, name) for name in names})
    ours = copy.deepcopy(q.QUANT_CFG_CHOICES)
    first = quant_cfg(algorithm, enable_kv_cache=kv, awq_block_size=32, sq_alpha=0.25)
    attributes(first, "*weight_quantizer")["num_bits"] = "changed"
    assert {name: getattr(mtq, name) for name in names} == before
    assert ours == q.QUANT_CFG_CHOICES
    assert not has_kv(quant_cfg(algorithm, enable_kv_cache=False))


def test_short_names_are_those_of_stock():
    from nemo.collections.llm.modelopt.quantization.quant_cfg_choices import get_quant_cfg_choices

    choices = get_quant_cfg_choices()
    assert list(choices)[:8] == ["int8", "int8_sq", "fp8", "block_fp8", "int4_awq", "w4a8_awq", "int4", "nvfp4"]
    assert choices["fp8"] == mtq.FP8_DEFAULT_CFG and choices["fp8"] is not mtq.FP8_DEFAULT_CFG


@pytest.mark.parametrize(
    ("algorithm", "decoder_type", "enable", "expected"),
    [
        ("fp8", "llama", None, True),
        ("fp8", "gpt", None, False),
        ("fp8", "gpt", True, True),
        ("int8_sq", "llama", None, False),
        ("int8_sq", "llama", True, True),
        ("INT8_WEIGHT_ONLY_CFG", "llama", None, False),
        ("int4_awq", "llama", False, False),
    ],
)
def test_kv_cache_option(algorithm, decoder_type, enable, expected):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    if algorithm.endswith("_CFG") and not hasattr(mtq, algorithm):
        with pytest.raises(ModelOptConfigError, match=f"Unsupported quantization format: .*algorithm='{algorithm}'"):
            quant_cfg(algorithm, decoder_type)
        return
    assert has_kv(quant_cfg(algorithm, decoder_type, enable_kv_cache=enable)) is expected


@pytest.mark.parametrize("kv_format", ["fp8", "nvfp4"])
def test_kv_cache_format(kv_format):
    found = attributes(quant_cfg("fp8", enable_kv_cache=True, kv_cache_qformat=kv_format), "*[kv]_bmm_quantizer")
    assert found["num_bits"] == {"fp8": (4, 3), "nvfp4": (2, 1)}[kv_format]


@pytest.mark.parametrize("algorithm", ["int4_awq", "w4a8_awq"])
@pytest.mark.parametrize(("size", "expected"), [(32, 32), (128, 128), (0, 128)])
def test_awq_block_size(algorithm, size, expected):
    found = attributes(quant_cfg(algorithm, awq_block_size=size), "*weight_quantizer")
    assert found["block_sizes"][-1] == expected


def test_awq_block_size_leaves_weight_only_int4_alone():
    ours = entries(quant_cfg("int4", awq_block_size=16))
    *found, vision = [entry for entry in ours if str(entry) not in left_as_before()]
    cache = [entry for entry in entries(mtq.FP8_KV_CFG) if not entry.is_default]
    preset = [entry for entry in entries(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG) if str(entry) not in left_as_before()]
    assert found == [*preset, *cache]
    assert str(vision) == "vision_projection.*" and vision.disables


@pytest.mark.parametrize("decoder_type", ["gemma", "mpt"])
def test_w4a8_searches_coarsely_on_some_decoders(decoder_type):
    assert quant_cfg("w4a8_awq", decoder_type)["algorithm"] == {"method": "awq_lite", "alpha_step": 1}
    assert quant_cfg("w4a8_awq", "llama")["algorithm"] == mtq.W4A8_AWQ_BETA_CFG["algorithm"]


@pytest.mark.parametrize("alpha", [0.5, 0.0, 1.0])
@pytest.mark.parametrize("decoder_type", ["llama", "gemma"])
def test_smoothquant_alpha(alpha, decoder_type):
    assert quant_cfg("int8_sq", decoder_type, sq_alpha=alpha)["algorithm"] == {"method": "smoothquant", "alpha": alpha}


# --- JSON files -------------------------------------------------------------------------------------------------------


def write(path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


AWQ = {
    "quant_cfg": {"*weight_quantizer": {"num_bits": 4, "block_sizes": {"-1": 64, "type": "static"}}},
    "algorithm": "awq_lite",
}
SQ = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}}, "algorithm": "smoothquant"}
FP8 = {"quant_cfg": {"*weight_quantizer": {"num_bits": [4, 3]}, "*[kv]_bmm_quantizer": {"num_bits": [4, 3]}}}


def test_json_is_taken_as_it_is_by_default(tmp_path):
    config = quant_cfg(write(tmp_path / "awq.json", AWQ))
    first, *others = entries(config)
    assert str(first) == "*weight_quantizer"
    assert all(entry.disables and str(entry) in left_as_before() for entry in others)  # modelopt from 0.44
    assert first.steps == ({"num_bits": 4, "block_sizes": {-1: 64, "type": "static"}},)
    assert config["algorithm"] == "awq_lite"


def test_options_reach_json_configs(tmp_path):
    config = quant_cfg(write(tmp_path / "awq.json", AWQ), awq_block_size=32, enable_kv_cache=True)
    assert attributes(config, "*weight_quantizer")["block_sizes"][-1] == 32
    assert has_kv(config)
    assert quant_cfg(write(tmp_path / "sq.json", SQ), sq_alpha=0.7)["algorithm"]["alpha"] == 0.7
    fixed = {**SQ, "algorithm": {"method": "smoothquant", "alpha": 0.9}}
    assert quant_cfg(write(tmp_path / "fixed.json", fixed))["algorithm"]["alpha"] == 0.9
    kv = write(tmp_path / "fp8.json", FP8)
    assert has_kv(quant_cfg(kv)) and not has_kv(quant_cfg(kv, enable_kv_cache=False))


def test_a_file_without_an_algorithm_is_calibrated_by_the_maximum(tmp_path, cpu_backend):
    from nemo.collections.llm.modelopt.quantization import quantizer as q
    from test_code.support import tiny

    config = q.QuantizationConfig(algorithm=write(tmp_path / "fp8.json", FP8), calibration_dataset=["a text"])
    built = q.Quantizer(config, None)
    with (
        patch.multiple(built, _calibrate=MagicMock(), _state=MagicMock(reuse=MagicMock(return_value=None))),
        patch.object(q.comparison, "log"),
        patch.object(q.mtq, "print_quant_summary"),
    ):
        built.quantize(tiny.model())
        assert built._calibrate.call_args.args[2].quant_cfg["algorithm"] == "max"


def test_a_preset_beats_a_file_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "fp8", AWQ)
    assert quant_cfg("fp8", enable_kv_cache=False)["algorithm"] == "max"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds a list, not an object"),
        ('{"algorithm": "max"}', 'has no object "quant_cfg".*algorithm'),
    ],
)
def test_bad_json_says_what_is_wrong(tmp_path, text, message):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ModelOptConfigError, match=message):
        quant_cfg(str(tmp_path / "bad.json"))


def test_json_is_standardized_at_every_depth():
    from nemo.collections.llm.modelopt.quantization.utils import standardize_json_config

    config = {
        "num_bits": [4, 3],
        "list": [{"block_sizes": {"-1": 16, "type": "dynamic", "scale_bits": [4, 3]}}, {"num_bits": 4}, 7],
    }
    standardize_json_config(config)
    assert config["num_bits"] == (4, 3)
    assert config["list"][0] == {"block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
    assert config["list"][1:] == [{"num_bits": 4}, 7]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("fp8", False), ("int8", False), ("int4_awq", False), ("block_fp8", False), ("nvfp4", False), ("mxfp8", False)],
)
def test_which_algorithms_need_cuda(name, expected):
    from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices

    assert choices.needs_cuda(choices.get_quant_cfg_choices()[name]) is expected
    # Blocks of integers, and FP4 with scales from the calibration, have no simulation.
    assert choices.needs_cuda(mtq.MXINT8_DEFAULT_CFG)
    for block in ({-1: 16, "type": "static", "scale_bits": (4, 3)}, {-1: 32, "type": "dynamic"}):
        weight = {"num_bits": (2, 1), "block_sizes": block}
        assert choices.needs_cuda({"quant_cfg": {"*weight_quantizer": weight}})


def test_our_quant_cfgs_quantize_the_weights_of_the_layers_that_presets_quantize():
    from nemo.collections.llm.modelopt.quantization import _quant_cfg_own
    from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices

    own = _quant_cfg_own.quant_cfgs(mtq)
    assert attributes(own["fp8_wo"], "*weight_quantizer") == {"num_bits": (4, 3), "axis": 0}
    assert attributes(own["w4a16_nvfp4"], "*weight_quantizer")["block_sizes"][-1] == 16
    presets = {"fp8_wo": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, "w4a16_nvfp4": mtq.NVFP4_DEFAULT_CFG}
    for name, preset in presets.items():
        names = ("weight_quantizer", "input_quantizer")
        for layer in ("decoder.layers.0.mlp.linear_fc1", "output_layer", "decoder.layers.1.mlp.router"):
            theirs = choices.enabled_quantizers(preset, layer, names)
            assert choices.enabled_quantizers(own[name], layer, names) == {
                kind: found for kind, found in theirs.items() if kind == "weight_quantizer"
            }
        assert own[name]["algorithm"] == "max"
        assert set(choices.enabled_quantizers(preset, "decoder.layers.0.mlp.linear_fc1", names)) == set(names)
    assert _quant_cfg_own.quant_cfgs(object()) == {}


@pytest.mark.parametrize("where", ["algorithm", "formats"])
def test_a_preset_that_the_installed_modelopt_lacks_raises_an_error_with_the_version(monkeypatch, where):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import _quant_cfg, quant_cfg_choices
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    monkeypatch.delattr(mtq, "INT8_WEIGHT_ONLY_CFG", raising=False)
    presets = quant_cfg_choices.get_quant_cfg_choices()
    assert "int8_wo" not in presets
    if where == "algorithm":
        config = q.QuantizationConfig(algorithm="int8_wo")
    else:
        config = q.QuantizationConfig("auto", auto_quantize_bits=10, auto_quantize_formats=["int8_wo", "fp8"])
    message = r"^Unsupported quantization format: int8_wo\..*INT8_WEIGHT_ONLY_CFG.*modelopt \d+\..* later version"
    with pytest.raises(ModelOptConfigError, match=message):
        _quant_cfg.planned_quant_cfgs(config, presets, q.load_quant_cfg)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [("max", True), ("smoothquant", True), (None, True), ("awq_lite", False), ({"method": "mse"}, False)],
)
def test_which_statistics_ranks_may_collect_apart(algorithm, expected):
    from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices

    assert choices.statistics_merge_over_ranks({"algorithm": algorithm}) is expected

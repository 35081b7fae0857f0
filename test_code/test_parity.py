"""Number for number against stock: the same seeds in ranks that run stock's subpackage, and in ranks that run ours.

Equal bit for bit where the operations are the same; where ours is reordered, to a tolerance with its reason. Where we
deviate on purpose the test shows both results.
"""

from __future__ import annotations

import json

import pytest
import torch

from test_code.support import installed, jobs_distill, jobs_parity, jobs_scales, tolerances
from test_code.support.ranks import RankError

JSON_CFG = {
    "quant_cfg": {
        "*weight_quantizer": {"num_bits": 8, "axis": 0},
        "*input_quantizer": {"num_bits": [4, 3], "axis": None},
        "*output_layer*": {"enable": False},
        "default": {"enable": False},
    },
    "algorithm": "max",
}
AWQ = {"awq_block_size": 16}
# alpha 1 is what modelopt takes where stock passes none.
CASES = {
    "fp8": {},
    "int8": {},
    "int8_sq": {"sq_alpha": 1.0},
    "int4_awq": AWQ,
    "w4a8_awq": AWQ,
}


@pytest.fixture(scope="module")
def both(ranks_factory, stock_ranks):
    """Run a job with ours and with stock, and return the two lists of results by rank."""

    def run(job, *args, **kwargs):
        return ranks_factory(4).run(job, *args, **kwargs), stock_ranks(4).run(job, *args, **kwargs)

    return run


def assert_same(ours: dict, stock: dict, **tolerance) -> int:
    """Compare tensors by name, bit for bit unless a tolerance is given, and return how many there are."""
    assert ours.keys() == stock.keys() and ours
    for name, value in stock.items():
        if tolerance:
            torch.testing.assert_close(ours[name], value, **tolerance)
        else:
            assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name
    return len(ours)


# --- quantization -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantization_cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    (folder / "own.json").write_text(json.dumps(JSON_CFG))
    plain = {"enable_kv_cache": False, "calibration_seq_len": 32}
    cases = {name: {"algorithm": name, **plain, **more} for name, more in CASES.items()}
    # In the preset's blocks of 128 two ranks would cut the rows of this model.
    cases["int4"] = {"algorithm": jobs_scales.plain_int4(str(folder / "int4.json")), **plain}
    cases["json"] = {"algorithm": str(folder / "own.json"), **plain}
    cases["own data"] = {
        "algorithm": "fp8",
        **plain,
        "calibration_dataset": jobs_parity.dataset(folder / "texts.jsonl"),
        "calibration_dataset_size": 10,
        "calibration_batch_size": 5,
        "packed": False,
        "comparison_size": 0,
    }
    return cases


@pytest.fixture(scope="module", params=[1, 2], ids=["TP=1", "TP=2"])
def quantized(request, both, quantization_cases):
    ours, stock = both(jobs_parity.quantized, request.param, quantization_cases)
    return list(zip(ours, stock, strict=True))[: request.param]


@installed.stock_quantizes
@pytest.mark.parametrize("case", [*CASES, "int4", "json", "own data"])
def test_quantizers_weights_and_outputs_equal_stock(quantized, case):
    for ours, stock in quantized:
        assert assert_same(ours[case]["state"], stock[case]["state"]) >= 4 * 4
        assert_same(ours[case]["weights"], stock[case]["weights"])
        assert torch.equal(ours[case]["output"], stock[case]["output"])
        assert ours[case]["kv_cache"] == stock[case]["kv_cache"] == 0


@installed.stock_quantizes
def test_smoothquant_deviates_by_its_alpha(both):
    """Stock never reads sq_alpha: it runs with modelopt's 1.0 although it documents 0.5."""
    cases = {alpha: {"algorithm": "int8_sq", "sq_alpha": alpha, "enable_kv_cache": False} for alpha in (0.5, 1.0)}
    ours, stock = (found[0] for found in both(jobs_parity.quantized, 1, cases))
    scales = [name for name in stock[0.5]["state"] if name.endswith("_pre_quant_scale")]
    assert scales
    for name in scales:
        assert torch.equal(stock[0.5]["state"][name], stock[1.0]["state"][name])
        assert torch.equal(ours[1.0]["state"][name], stock[1.0]["state"][name])
        assert not torch.equal(ours[0.5]["state"][name], ours[1.0]["state"][name])


@installed.stock_quantizes
def test_the_kv_cache_deviates_by_being_quantized(both):
    """Stock logs that KV-cache quantization is enabled, and makes no quantizer on Megatron's attention."""
    cases = {"kv": {"algorithm": "fp8", "enable_kv_cache": True}}
    if not installed.KV_CACHE:
        with pytest.raises(RankError, match=installed.KV_CACHE_REFUSAL):
            both(jobs_parity.quantized, 1, cases)
        return
    ours, stock = (found[0]["kv"] for found in both(jobs_parity.quantized, 1, cases))
    assert stock["kv_cache"] == 0
    # Keys and values of four layers.
    assert ours["kv_cache"] == 8
    common = {name: value for name, value in ours["state"].items() if "bmm_quantizer" not in name}
    assert_same(common, stock["state"])


# --- pruning ---

# On modelopt 0.43's grid, hidden sizes in steps of 256 and ffn sizes in steps of 512: stock ignores other targets.
WIDE = {"hidden_size": 512, "ffn_hidden_size": 1024, "num_attention_heads": 8, "num_query_groups": 4, "num_layers": 2}
REQUESTS = {
    "hidden": {"target_hidden_size": 256},
    "ffn": {"target_ffn_hidden_size": 512},
    "heads": {"target_num_attention_heads": 4, "target_num_query_groups": 4},
    "width": {"target_hidden_size": 256, "target_ffn_hidden_size": 512},
    "depth": {"target_num_layers": 2},
    "dropped layers": {"drop_layers": [2, 3]},
}


@pytest.mark.parametrize("case", REQUESTS)
def test_pruned_weights_equal_stock(both, ranks_factory, tmp_path, case):
    """Stock is helped over what stops it (modelopt 0.43, no Transformer Engine), and we read what it saves."""
    sizes = {} if case in ("depth", "dropped layers") else WIDE
    ours, stock = both(jobs_parity.pruned, str(tmp_path / "pruned"), REQUESTS[case], **sizes)
    assert ours[0][1] == stock[0][1]
    assert assert_same(ours[0][0], stock[0][0]) >= 15
    loaded, losses = ranks_factory(4).run(jobs_parity.pruned_weights, str(tmp_path / "pruned-stock"))[0]
    assert_same(loaded, stock[0][0])
    assert losses


@installed.stock_prunes
def test_pruning_deviates_by_running(stock_ranks):
    """Stock stops without Transformer Engine, and with modelopt 0.43, which needs the model out of NeMo's wrapper."""
    norms, *wrapper = stock_ranks(4).run(jobs_parity.pruning_errors, REQUESTS["depth"])[0]
    assert "RMSNorm" in norms and "not registered" in norms
    if installed.WRAPPED_PRUNE:
        assert wrapper == []
    else:
        assert len(wrapper) == 1 and "Input should be unwrapped MCore model" in wrapper[0]


# --- distillation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2])
def test_losses_and_gradients_equal_stock(both, tp):
    ours, stock = both(jobs_parity.losses_and_gradients, tp)
    # Ours sums the vocabulary in another order: a few units in the last place of fp32, on gradients of size 1.
    close = {"rtol": 2e-6, "atol": 2e-6}
    for mine, theirs in zip(ours[:tp], stock[:tp], strict=True):
        assert mine.keys() == theirs.keys() and len(mine) == 7
        for label, (value, sequence_parallel, gradient, projections) in theirs.items():
            torch.testing.assert_close(mine[label][0], value, **close)
            assert mine[label][1] == sequence_parallel
            torch.testing.assert_close(mine[label][2], gradient, **close)
            torch.testing.assert_close(mine[label][3], projections, **close)


def test_the_balancer_equals_stock(both):
    """Without a language-model loss stock ignores kd_loss_scale; ours applies it."""
    ours, stock = (found[0] for found in both(jobs_parity.balanced))
    assert ours.keys() == stock.keys() and len(ours) == 18
    for label, (values, gradients) in stock.items():
        if "skip=True" in label:
            scale = float(label.split("scale=")[1].split()[0])
            values["kd_loss"] *= scale
            gradients = [scale * gradient for gradient in gradients]
        # The scale is a quotient of two fp32 numbers on our side, of two doubles on stock's.
        assert {name: ours[label][0][name] for name in values} == pytest.approx(values, rel=1e-6), label
        assert ours[label][1] == pytest.approx(gradients, rel=1e-6), label


def test_pipeline_shapes_equal_stock(both):
    ours, stock = both(jobs_parity.pipeline_shapes)
    assert ours == stock
    found = stock[0]
    assert len(found) == 4 * 3 * 2 * 2 * 2
    assert len({str(shapes) for shapes in found.values()}) > 20


@pytest.fixture(scope="module")
def teacher_path(ranks_factory, tmp_path_factory):
    return ranks_factory(4).run(jobs_distill.teacher, str(tmp_path_factory.mktemp("teacher") / "checkpoint"))[0]


def test_six_steps_at_tp2_pp2_equal_stock(both, teacher_path, tmp_path):
    settings = tmp_path / "pair.yaml"
    settings.write_text("intermediate_layer_pairs: [[decoder.final_layernorm, decoder.final_layernorm]]\n")
    ours, stock = both(jobs_parity.trajectories, teacher_path, str(settings))
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine.keys() == theirs.keys() and len(mine) == 4
        for label, losses in theirs.items():
            assert len(losses) == 6
            # fp32 sums in another order, six optimizer steps on: 1e-5 of the loss.
            assert mine[label] == pytest.approx(losses, rel=tolerances.of("loss")), label

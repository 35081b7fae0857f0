"""AWQ's search runs once for each linear layer, and finds what modelopt finds with a search in every micro-batch."""

from __future__ import annotations

import contextlib
from collections import Counter
from unittest.mock import patch

import pytest
import torch

from test_code.support import installed, jobs_quant, jobs_scales, jobs_state, tiny

BLOCK = {"awq_block_size": 16, "calibration_batch_size": 2}


@pytest.fixture(scope="module")
def work(ranks_factory, tmp_path_factory):
    """Return a folder with checkpoints of a Llama and of a mixture of experts, and a calibration file."""
    folder = tmp_path_factory.mktemp("awq")
    ranks_factory(1).run(jobs_quant.make_checkpoint, str(folder / "dense"), True)
    ranks_factory(1).run(jobs_scales.make_moe, str(folder / "experts"))
    jobs_quant.corpus(folder / "text.jsonl")
    return folder


# --- what ranks execute ---


def searched(checkpoint, data, algorithm, tp=1, pp=1, per_micro_batch=False, **settings) -> dict:
    """Quantize by AWQ; return the scales and amax, and how often each weight was quantized during calibration.

    Args:
        checkpoint: The NeMo checkpoint.
        data: The calibration file.
        algorithm: "int4_awq" or "w4a8_awq".
        tp: Tensor-parallel ranks.
        pp: Pipeline stages.
        per_micro_batch: Run modelopt's search in every micro-batch.
        **settings: Of the QuantizationConfig.
    """
    from modelopt.torch.quantization.nn import TensorQuantizer

    from nemo.collections.llm.modelopt.quantization.calibration import awq_search
    from test_code.support import ranks, tiny

    ranks.reset()
    model, _ = jobs_state.restored(checkpoint, tp, pp)
    core, counts = tiny.core(model), Counter()

    def count(module, _):
        if isinstance(module, TensorQuantizer):
            counts[id(module)] += module.is_enabled

    quantizer = jobs_state.quantizer_for(data, algorithm, comparison_size=0, layer_errors=False, **BLOCK | settings)
    own = patch.object(awq_search, "one_batch_a_layer", lambda loop: loop)
    with own if per_micro_batch else contextlib.nullcontext():
        hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
        quantizer.quantize(model)
        hook.remove()
    names = {name: module for name, module in core.named_modules() if isinstance(module, TensorQuantizer)}
    scales = {
        f"{name}.{kind}": getattr(module, kind).clone()
        for name, module in names.items()
        for kind in ("_pre_quant_scale", "_amax")
        if getattr(module, kind, None) is not None
    }
    return {
        "scales": scales,
        "weights": {n: p.detach().clone() for n, p in core.named_parameters()},
        "quantizations": sum(counts[id(module)] for name, module in names.items() if "weight_quantizer" in name),
        "left": [name for name, module in core.named_modules() if hasattr(module, "awq_lite")],
    }


def pair(*args, **kwargs) -> tuple[dict, dict]:
    """Return what `searched` finds with our loop and with a search in every micro-batch."""
    return searched(*args, **kwargs), searched(*args, per_micro_batch=True, **kwargs)


# --- tests ---


CASES = {
    "many tokens": (1, {}, {}),
    "few tokens": (1, {}, {"calibration_seq_len": 8, "calibration_dataset_size": 4}),
    "rows of unequal length": (1, {}, {"packed": False}),
    "TP": (2, {"tp": 2}, {}),
    "PP with KV cache": (2, {"pp": 2}, {"enable_kv_cache": installed.KV_CACHE}),
    "DP": (2, {}, {}),
}
KINDS = [("dense", "int4_awq"), ("experts", "w4a8_awq"), ("dense", "w4a8_awq"), ("experts", "int4_awq")]


def combinations() -> list:
    """Return each case with each family and algorithm: any two of the three are together in a test that is not slow."""
    return [
        pytest.param(*CASES[case], *kind, id=f"{case}-{'-'.join(kind)}", marks=[pytest.mark.slow] * (n // 2 != i % 2))
        for i, case in enumerate(CASES)
        for n, kind in enumerate(KINDS)
    ]


@pytest.mark.parametrize(("world", "layout", "settings", "family", "algorithm"), combinations())
def test_the_scales_are_modelopts(ranks, work, algorithm, family, world, layout, settings):
    arguments = (str(work / family), str(work / "text.jsonl"), algorithm)
    for ours, theirs in ranks(world).run(pair, *arguments, **layout, **settings):
        assert any("_pre_quant_scale" in name for name in ours["scales"]) and not ours["left"]
        # The same candidate is chosen, and computed from the same statistics of the first pass.
        torch.testing.assert_close(ours["scales"], theirs["scales"], rtol=1e-6, atol=0)
        torch.testing.assert_close(ours["weights"], theirs["weights"], rtol=1e-6, atol=1e-9)
        assert ours["quantizations"] < theirs["quantizations"]


def test_weights_are_quantized_as_often_with_any_number_of_micro_batches(ranks, work):
    arguments = (str(work / "dense"), str(work / "text.jsonl"), "int4_awq")
    few, many = (ranks(1).run(searched, *arguments, calibration_batch_size=size)[0]["quantizations"] for size in (8, 1))
    # 16 linear layers: 11 candidates, and the calibration of the maximum before and after.
    assert few == many <= 16 * 14
    modelopt = ranks(1).run(searched, *arguments, calibration_batch_size=1, per_micro_batch=True)[0]["quantizations"]
    assert modelopt > 5 * many


@pytest.mark.skipif(not installed.AUTO, reason="this modelopt has no mixed precision: see test_auto")
def test_mixed_precision_searches_once_for_each_layer_too(ranks, work):
    arguments = (str(work / "dense"), str(work / "text.jsonl"), "auto")
    settings = {"calibration_batch_size": 1, "auto_quantize_bits": 8.0}
    ours, theirs = ranks(1).run(pair, *arguments, **settings)[0]
    torch.testing.assert_close(ours["scales"], theirs["scales"], rtol=1e-6, atol=0)
    # The scores of the formats still need each weight in every micro-batch.
    assert ours["quantizations"] < 0.6 * theirs["quantizations"]


def moments(width: int, rows: int) -> torch.Tensor:
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    return values.t() @ values / rows


@pytest.mark.parametrize(("width", "rows", "tolerance"), [(48, 400, 1e-5), (48, 5, 2e-4), (1, 1, 1e-5)])
def test_the_factor_has_the_second_moments(width, rows, tolerance):
    """Those of fewer inputs than features are singular; what is then added to the diagonal is far below the errors."""
    from nemo.collections.llm.modelopt.quantization.calibration import awq_search

    expected = moments(width, rows)
    factor = awq_search._factor(expected.clone())
    assert factor.dtype == torch.float32 and torch.equal(factor, factor.triu())
    assert torch.dist(factor.t() @ factor, expected) <= tolerance * expected.norm()


def test_the_diagonal_grows_until_the_moments_have_a_factor():
    from nemo.collections.llm.modelopt.quantization.calibration import awq_search

    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1e-3]))
    factor = awq_search._factor(indefinite.clone())
    # 1e-3 of the mean is too little, 1e-2 is enough: the last of the steps 1e-6, 1e-5, ...
    added = 1e-2 * indefinite.diagonal().mean()
    assert torch.allclose(factor.t() @ factor, indefinite + torch.eye(4) * added, atol=1e-6)


def test_the_factor_takes_one_copy_in_double_precision():
    from nemo.collections.llm.modelopt.quantization.calibration import awq_search

    given = moments(1024, 2000)
    # The rest are the diagonal and LAPACK's work space.
    assert tiny.peak_bytes(lambda: awq_search._factor(given)) < 1.05 * 2 * given.nbytes

"""Quantization of models on Transformer Engine's layers: the same scales and files as on local layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from test_code.support import jobs_quant, tolerances
from test_code.te_on_cpu import jobs

pytestmark = pytest.mark.te

AMAX = tolerances.of(tolerances.AMAX)


def tensors(folder) -> dict:
    """Return all tensors of a Hugging Face folder."""
    from safetensors.torch import load_file

    return {name: value for file in Path(folder).glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("algorithm", [pytest.param("fp8", marks=pytest.mark.main), "int8", "int8_wo", "int4_awq"])
def test_scales_and_files_equal_those_of_local_layers(ranks, llama, texts, tmp_path, algorithm):
    """Calibration runs TE's norms and attention on Megatron's linear layers; inputs agree, so do scales and codes."""
    seen = {}
    for name in jobs.SPECS:
        quant = {**texts, "awq_block_size": 16} if algorithm == "int4_awq" else texts
        seen[name] = ranks(1).run(jobs_quant.ptq, llama[0][name], str(tmp_path / name), algorithm, "hf", quant=quant)[
            0
        ]["amax"]
    # Sums in another order. Codes are rounded weights, which are equal to the last bit.
    assert seen["te"].keys() == seen["local"].keys() and seen["te"]
    for name, amax in seen["local"].items():
        assert ((seen["te"][name] - amax).abs() <= AMAX * amax.abs()).all(), name
    local, te = tensors(tmp_path / "local"), tensors(tmp_path / "te")
    assert te.keys() == local.keys()
    for name, value in local.items():
        assert te[name].dtype == value.dtype
        assert ((te[name].float() - value.float()).abs() <= AMAX * value.float().abs()).all(), name


@pytest.mark.parametrize("algorithm", ["fp8", pytest.param("int4_awq", marks=pytest.mark.main)])
def test_quantized_nemo_checkpoint_is_restored(ranks, llama, texts, tmp_path, algorithm):
    """A checkpoint that ptq wrote on TE's layers restores with its scales, and trains on."""
    quant = {**texts, "awq_block_size": 16} if algorithm == "int4_awq" else texts
    target = str(tmp_path / "quantized")
    written = ranks(1).run(jobs_quant.ptq, llama[0]["te"], target, algorithm, "nemo", quant=quant)[0]["amax"]
    read = ranks(1).run(jobs_quant.restored_amax, target)[0]
    assert read.keys() == written.keys() and all(read[name].equal(written[name]) for name in written)
    amax, losses = ranks(1).run(jobs_quant.load_with_restore, target)[0]
    assert amax.keys() == written.keys() and losses[0] == pytest.approx(losses[0])

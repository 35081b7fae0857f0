"""The inputs of a loaded layer are rounded as in memory, from the stored scales alone."""

from __future__ import annotations

import pytest
import torch

from test_code.quantization.layouts import modules
from test_code.support import installed

STATIC = ["FP8", "W8A8_SQ_PER_CHANNEL"]
PER_TOKEN = pytest.param("FP8_PER_CHANNEL_PER_TOKEN", marks=installed.fp8_zeros)


@pytest.mark.parametrize("name", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("algorithm", [*STATIC, PER_TOKEN, "W8A8_PER_CHANNEL_PER_TOKEN", "NVFP4", "MXFP8"])
def test_inputs_are_rounded_as_in_memory(algorithm, name, cpu_backend):
    from nemo.collections.llm.modelopt.quantization.export.layouts import LAYOUTS, inputs, layer

    module = modules.linear(algorithm, modules.weights(algorithm, 0))
    found = layer.read(module)
    found.codes = layer.codes_of(module, found)
    stored = LAYOUTS[name].tensors(found, torch.bfloat16)
    quantizer = inputs.input_quantizer(LAYOUTS[name].layer_of(algorithm, found.facts, stored))
    values = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    values[0, 0] = 0.0
    rounded = quantizer(values)
    torch.testing.assert_close(rounded, module.input_quantizer(values), rtol=1e-6, atol=0)
    assert not torch.equal(rounded, values)
    quantizer.disable_quant()
    assert torch.equal(quantizer(values), values)


@pytest.mark.parametrize("algorithm", ["FP8_WO", "FP8_PB_WO", "W8A16", "W4A16_AWQ", "W4A16_NVFP4"])
def test_inputs_of_formats_with_weights_only_are_not_rounded(algorithm):
    from nemo.collections.llm.modelopt.quantization.export.layouts import inputs, layer

    assert inputs.input_quantizer(layer.read(modules.linear(algorithm, modules.weights(algorithm, 0)))) is None

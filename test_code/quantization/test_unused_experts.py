"""Experts that no calibration token reaches are exported with a range for their inputs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from test_code.support import installed, jobs_quant
from test_code.support import jobs_scales as jobs

UNUSED = 3


NAME = "decoder.layers.{}.mlp.experts.local_experts.{}.{}.input_quantizer._amax"


def calibrated(ranks, tmp_path, algorithm: str) -> dict[str, torch.Tensor]:
    """Quantize and export a small MoE whose expert `UNUSED` gets no token; return what the model in memory holds."""
    more = {"calibration_dataset": str(tmp_path / "text.jsonl"), "calibration_dataset_size": 16, "awq_block_size": 16}
    target = str(tmp_path / f"hf-{algorithm}")
    return ranks(1).run(jobs.export_both, str(tmp_path / "moe"), target, algorithm, more, UNUSED)[0]


@pytest.mark.parametrize(
    "algorithm", ["fp8", "int8", *(pytest.param(one, marks=installed.since_0_43) for one in ("int4_awq", "w4a8_awq"))]
)
def test_an_unused_expert_gets_the_range_of_the_others(ranks, tmp_path, algorithm):
    ranks(1).run(jobs.make_moe, str(tmp_path / "moe"))
    jobs_quant.corpus(tmp_path / "text.jsonl")
    memory = calibrated(ranks, tmp_path, algorithm)
    # AWQ leaves the inputs of an unused expert unscaled: their range is that of the others before AWQ scales them.
    others = calibrated(ranks, tmp_path, "fp8") if algorithm == "w4a8_awq" else memory
    files = (tmp_path / f"hf-{algorithm}").glob("*.safetensors")
    stored = {name: value for file in files for name, value in load_file(file).items()}
    assert any(f"experts.{UNUSED}.down_proj.weight_scale" in name for name in stored)
    for layer in range(2):
        for leaf, parts in (("linear_fc1", ["gate_proj", "up_proj"]), ("linear_fc2", ["down_proj"])):
            if algorithm == "int4_awq":  # inputs are not quantized
                assert not any(NAME.format(layer, expert, leaf) in memory for expert in range(UNUSED))
                continue
            used = torch.stack([others[NAME.format(layer, expert, leaf)].max() for expert in range(UNUSED)])
            assert torch.equal(memory[NAME.format(layer, UNUSED, leaf)].max(), used.max())
            amax = [memory[NAME.format(layer, expert, leaf)].max() for expert in range(UNUSED + 1)]
            for part in parts:
                scales = [stored[f"model.layers.{layer}.mlp.experts.{n}.{part}.input_scale"] for n in range(UNUSED + 1)]
                # One division in fp32 separates scale and amax.
                torch.testing.assert_close(
                    torch.stack(scales) * amax[0], torch.stack(amax) * scales[0], rtol=1e-6, atol=0
                )

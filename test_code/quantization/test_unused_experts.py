"""Experts that no calibration token reaches are exported with a range for their inputs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from test_code.support import jobs_quant
from test_code.support import jobs_scales as jobs

UNUSED = 3


@pytest.mark.parametrize("algorithm", ["fp8", "int8", "int4_awq", "w4a8_awq"])
def test_an_unused_expert_gets_the_range_of_the_others(ranks, tmp_path, algorithm):
    ranks(1).run(jobs.make_moe, str(tmp_path / "moe"))
    jobs_quant.corpus(tmp_path / "text.jsonl")
    more = {"calibration_dataset": str(tmp_path / "text.jsonl"), "calibration_dataset_size": 16, "awq_block_size": 16}
    target = tmp_path / "hf"
    (memory,) = ranks(1).run(jobs.export_both, str(tmp_path / "moe"), str(target), algorithm, more, UNUSED)
    stored = {name: value for file in target.glob("*.safetensors") for name, value in load_file(file).items()}
    assert any(f"experts.{UNUSED}.down_proj.weight_scale" in name for name in stored)
    for layer in range(2):
        for leaf, parts in (("linear_fc1", ["gate_proj", "up_proj"]), ("linear_fc2", ["down_proj"])):
            name = f"decoder.layers.{layer}.mlp.experts.local_experts.{{}}.{leaf}.input_quantizer._amax"
            ranges = [memory.get(name.format(expert)) for expert in range(UNUSED)]
            if algorithm == "int4_awq":
                assert ranges == [None] * UNUSED  # inputs are not quantized
                continue
            assert torch.equal(memory[name.format(UNUSED)].max(), torch.stack([one.max() for one in ranges]).max())
            for part in parts:
                scales = [stored[f"model.layers.{layer}.mlp.experts.{n}.{part}.input_scale"] for n in range(UNUSED + 1)]
                assert torch.equal(scales[UNUSED], torch.stack(scales[:UNUSED]).max())

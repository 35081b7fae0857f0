"""Experts in INT8 get input scales for each token in the layout of compressed-tensors, because vLLM reads no others."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from test_code.support import jobs_hf, jobs_quant


def export(folder: str, layout: str) -> str:
    """Export a random Mixtral in INT8, verified in full; return the folder of the export."""
    checkpoint = jobs_hf.import_hf(jobs_hf.hf_model("mixtral", 0), folder)
    quant = {"calibration_dataset": jobs_quant.corpus(f"{folder}/text.jsonl"), "calibration_dataset_size": 16}
    jobs_quant.ptq(checkpoint, f"{folder}/out", "int8", "hf", quant=quant, export={"hf_layout": layout})
    return f"{folder}/out"


@pytest.mark.parametrize("layout", ["auto", "modelopt"])
def test_inputs_of_int8_experts(ranks, tmp_path, layout):
    ranks(1).run(export, str(tmp_path), layout)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    scaled = {name.removesuffix(".input_scale") for name in stored if name.endswith(".input_scale")}
    experts = {name.removesuffix(".weight_scale") for name in stored if "experts" in name and "weight_scale" in name}
    attention = {f"model.layers.{n}.self_attn.{part}_proj" for n in range(2) for part in "qkvo"}
    assert len(experts) == 2 * 4 * 3
    if layout == "modelopt":
        assert scaled == experts | attention
        return
    assert scaled == attention
    groups = {group["input_activations"]["strategy"]: group for group in section["config_groups"].values()}
    assert set(groups["token"]["targets"]) == experts and groups["token"]["input_activations"]["dynamic"] is True
    assert set(groups["tensor"]["targets"]) == attention
    assert section["format"] == groups["token"]["format"] == groups["tensor"]["format"] == "int-quantized"

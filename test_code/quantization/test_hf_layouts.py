"""Every format in every layout: calibrated, written and verified in full, against the model in memory."""

from __future__ import annotations

import json

import pytest

from nemo_modelopt_dropin.preflight import algorithms, readers
from test_code.support import installed, jobs_quant, jobs_scales

# Weights of 64 x 64 hold no block of 128 inputs.
ALGORITHMS = [
    name for name in algorithms.TABLE if name not in ("block_fp8", "int4") and algorithms.version_problem(name) is None
]
CASES = [
    (name, layout)
    for name in ALGORITHMS
    for layout in algorithms.HF_FORMATS[str(algorithms.get(name).hf_format)].layouts
]
QUANT = {"calibration_dataset_size": 8, "awq_block_size": 16}


@pytest.fixture(scope="module")
def source(ranks_factory, tmp_path_factory):
    """Make the checkpoint of a tiny Llama with bf16 weights and grouped queries, and calibration texts."""
    folder = tmp_path_factory.mktemp("layouts")
    data = jobs_quant.corpus(folder / "text.jsonl")
    return ranks_factory(1).run(jobs_scales.import_family, str(folder), "llama")[0], data


@pytest.mark.parametrize(("algorithm", "layout"), CASES)
def test_an_export_equals_the_model_in_memory(ranks, source, tmp_path, algorithm, layout):
    installed.need_preset(algorithm)
    checkpoint, data = source
    quant = {**QUANT, "calibration_dataset": data, "enable_kv_cache": False}
    export = {"hf_layout": layout, "verify": "full"}
    ranks(1).run(jobs_quant.ptq, checkpoint, str(tmp_path / "out"), algorithm, "hf", quant=quant, export=export)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == layout


@pytest.mark.skipif(not installed.AUTO, reason="refused on this modelopt: see test_old_modelopt")
@pytest.mark.parametrize(
    ("formats", "layout"),
    [(("nvfp4", "fp8"), readers.MODELOPT), (("int4_awq", "fp8"), readers.COMPRESSED_TENSORS)],
)
def test_a_mixture_equals_the_model_in_memory(ranks, source, tmp_path, formats, layout):
    checkpoint, data = source
    quant = {**QUANT, "calibration_dataset": data, "enable_kv_cache": False}
    quant |= {"auto_quantize_formats": list(formats), "auto_quantize_bits": 8.0 if "nvfp4" in formats else 10.0}
    paths, export = (checkpoint, str(tmp_path / "out")), {"hf_layout": "auto"}
    found = ranks(1).run(jobs_quant.ptq, *paths, "auto", "hf", quant=quant, export=export)[0]
    # Q, k and v share a format, and so do gate and up: they are one layer of Megatron each.
    chosen = set(found["report"]["formats"].values()) - {"none"}
    assert chosen == set(formats)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == layout

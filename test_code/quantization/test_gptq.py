"""GPTQ, which nvidia-modelopt has from 0.44: better than rounding, the same on every rank, and written as INT4."""

from __future__ import annotations

import json
import os

import pytest

from nemo_modelopt_dropin.preflight import algorithms
from test_code.support import jobs_quant, jobs_scales

pytestmark = pytest.mark.skipif(
    algorithms.version_problem("gptq") is not None, reason="other versions: `make test-compat` runs these"
)


@pytest.fixture(scope="module")
def source(ranks_factory, tmp_path_factory):
    """Make the checkpoint of a tiny Llama with bf16 weights, calibration texts, and a file for plain rounding."""
    folder = tmp_path_factory.mktemp("gptq")
    checkpoint = ranks_factory(1).run(jobs_scales.import_family, str(folder), "llama")[0]
    rounding = {"*weight_quantizer": {"num_bits": 4, "block_sizes": {"-1": 16}}, "*output_layer*": {"enable": False}}
    (folder / "rounding.json").write_text(
        json.dumps({"quant_cfg": {**rounding, "default": {"enable": False}}, "algorithm": "max"})
    )
    return checkpoint, jobs_quant.corpus(folder / "text.jsonl"), str(folder / "rounding.json")


def compare(checkpoint: str, data: str, names: list[str], tp: int = 1, pp: int = 1) -> list[dict]:
    """Quantize with each algorithm on all ranks; return its report and the sum of all weights afterwards."""
    from nemo.collections.llm.modelopt import (
        ExportConfig,
        QuantizationConfig,
        Quantizer,
        setup_trainer_and_restore_model_with_modelopt_spec,
    )
    from test_code.support import ranks

    found = []
    for number, name in enumerate(names):
        if number:
            ranks.reset()
        model, _ = setup_trainer_and_restore_model_with_modelopt_spec(
            checkpoint,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            devices=int(os.environ["WORLD_SIZE"]),
        )
        config = QuantizationConfig(
            algorithm=name,
            awq_block_size=16,
            calibration_dataset=data,
            calibration_dataset_size=32,
            calibration_batch_size=4,
            calibration_seq_len=32,
        )
        quantizer = Quantizer(config, ExportConfig(path="unused", export_format="nemo"))
        quantizer.quantize(model)
        weights = sum(float(weight.double().abs().sum()) for weight in model.parameters())
        found.append({"kl": quantizer.report["kl_to_original"], "weights": weights})
    return found


def test_gptq_is_nearer_to_the_original_than_rounding_and_awq(ranks, source):
    checkpoint, data, rounding = source
    plain, gptq, awq = ranks(1).run(compare, checkpoint, data, [rounding, "gptq", "int4_awq"])[0]
    assert gptq["kl"] < 0.7 * plain["kl"]
    assert gptq["kl"] < awq["kl"]


def test_data_parallel_ranks_hold_the_same_weights(ranks, source):
    checkpoint, data, _ = source
    first, second = ranks(2).run(compare, checkpoint, data, ["gptq"])
    assert first[0]["weights"] == second[0]["weights"]


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=["TP=2", "PP=2"])
def test_parallel_ranks_are_as_near_to_the_original(ranks, source, layout):
    checkpoint, data, rounding = source
    plain, alone = ranks(1).run(compare, checkpoint, data, [rounding, "gptq"])[0]
    results = ranks(2).run(compare, checkpoint, data, ["gptq"], **layout)
    kl = results[0][0]["kl"]
    if "pp" in layout:  # each layer sees the inputs that it sees on one rank
        assert kl == pytest.approx(alone["kl"], rel=1e-3)
    else:  # rows of the projections are split: each rank makes up for its own columns only
        assert kl < 0.8 * plain["kl"]


@pytest.mark.parametrize("unused", [None, 3])
def test_experts_are_written_as_they_are_in_memory(ranks, tmp_path, unused):
    """An expert that gets no token has nothing to make up for: it is rounded."""
    ranks(1).run(jobs_scales.make_moe, str(tmp_path / "moe"))
    jobs_quant.corpus(tmp_path / "text.jsonl")
    more = {"calibration_dataset": str(tmp_path / "text.jsonl"), "calibration_dataset_size": 16, "awq_block_size": 16}
    export = str(tmp_path / "moe"), str(tmp_path / "hf"), "gptq", more, unused
    memory = ranks(1).run(jobs_scales.export_both, *export)[0]
    experts = [name for name in memory if ".experts." in name and name.endswith("weight_quantizer._amax")]
    assert len(experts) == 2 * 2 * 4
    assert all(memory[name].isfinite().all() and memory[name].min() > 0 for name in experts)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3-tied"])
def test_the_files_equal_the_model_in_memory(ranks, source, tmp_path, family):
    checkpoint, data, _ = source
    if family != "llama":
        checkpoint = ranks(1).run(jobs_scales.import_family, str(tmp_path), family)[0]
    quant = {"calibration_dataset_size": 8, "awq_block_size": 16, "calibration_dataset": data}
    export = {"verify": "full", "hf_layout": "compressed-tensors"}
    ranks(1).run(jobs_quant.ptq, checkpoint, str(tmp_path / "out"), "gptq", "hf", quant=quant, export=export)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "compressed-tensors"

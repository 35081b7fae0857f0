"""Exports are correct and verified, or raise an error; failed exports leave nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from test_code.support import jobs_quant as jobs
from test_code.support.hf_folders import tensors_of
from test_code.support.jobs_hf import assert_same_logits


def export_error(nemo, hf) -> tuple[str, str]:
    """Export a quantized NeMo checkpoint with NeMo's function, which must fail; return the error."""
    try:
        export_with_nemo(nemo, hf)
    except Exception as error:
        return type(error).__name__, str(error)
    raise AssertionError("the export did not fail")


def plain_restore_and_generate(checkpoint) -> str:
    """Generate a sample from a quantized checkpoint with the Quantizer's function."""
    from nemo.utils import logging

    from nemo.collections.llm.modelopt import Quantizer, setup_trainer_and_restore_model_with_modelopt_spec

    model, _ = setup_trainer_and_restore_model_with_modelopt_spec(str(checkpoint))
    said: list[str] = []
    info = logging.info
    logging.info = lambda text, *a, **k: said.append(str(text))
    try:
        Quantizer._generate_sample(model)
    finally:
        logging.info = info
    return said[-1]


def export_with_nemo(checkpoint, target) -> str:
    """Export with NeMo's ``export_ckpt``, in fp32."""
    from nemo.lightning import io

    ours = {"dtype": torch.float32, "hf_layout": "modelopt"}
    return str(io.api.export_ckpt(Path(checkpoint), "hf", Path(target), modelopt_export_kwargs=ours))


@pytest.fixture(scope="module")
def work(ranks_factory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    ranks_factory(1).run(jobs.make_checkpoint, str(folder / "llama"), True)
    jobs.corpus(folder / "text.jsonl")
    return folder


def settings(work, **more):
    return {"calibration_dataset": str(work / "text.jsonl"), "calibration_dataset_size": 16, **more}


HF_ALGORITHMS = ["fp8", "int8", "int8_sq", "int4_awq", "w4a8_awq"]


# --- nemo -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["fp8", "int8_sq", "int4_awq"])
def test_nemo_checkpoint_of_two_tensor_ranks_reloads_anywhere(ranks, work, algorithm):
    target = work / f"nemo-{algorithm}"
    more = {"awq_block_size": 16} if "awq" in algorithm else {}
    written = ranks(2).run(jobs.ptq, str(work / "llama"), str(target), algorithm, "nemo", 2, 1, settings(work, **more))
    assert (target / "weights" / "modelopt_state").is_dir() and (target / "context").is_dir()
    same = ranks(2).run(jobs.restored_amax, str(target), 2, 1)
    for before, after in zip(written, same, strict=True):
        assert set(before["amax"]) == set(after)
        assert all(torch.equal(before["amax"][name], amax) for name, amax in after.items())
    one = ranks(1).run(jobs.restored_amax, str(target))[0]
    stages = ranks(2).run(jobs.restored_amax, str(target), 1, 2)
    merged = {**stages[0], **stages[1]}
    assert set(merged) == set(one) == set(same[0])
    assert all(torch.equal(merged[name], amax) for name, amax in one.items())


def test_a_quantized_checkpoint_generates(ranks, work):
    target = work / "nemo-generate"
    ranks(1).run(jobs.ptq, str(work / "llama"), str(target), quant=settings(work), export={"generate_sample": True})
    (said,) = ranks(1).run(plain_restore_and_generate, str(target))
    assert "Born in California, Soyer trained as a" in said


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(ranks_factory, work):
    """Return a function that returns the NeMo and the Hugging Face checkpoint of an algorithm, made on one rank."""
    done = {}

    def make(algorithm):
        if algorithm not in done:
            nemo, hf = work / f"one-nemo-{algorithm}", work / f"one-hf-{algorithm}"
            more = settings(work, awq_block_size=16)
            ranks_factory(1).run(jobs.ptq_twice, str(work / "llama"), str(nemo), str(hf), algorithm, more)
            done[algorithm] = nemo, hf
        return done[algorithm]

    return make


def assert_names_dtype(folder, dtype):
    """Without a dtype, readers use fp32; transformers writes `dtype`, and older readers use `torch_dtype`."""
    config = json.loads((folder / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == (dtype, dtype)


@pytest.mark.parametrize("algorithm", HF_ALGORITHMS)
def test_hf_checkpoint_gives_the_logits_of_the_quantized_model(ranks, exported, algorithm):
    nemo, hf = exported(algorithm)
    names = {p.name for p in hf.iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors"} <= names
    assert_names_dtype(hf, "bfloat16")
    assert len({p.stat().st_mode for p in hf.iterdir()}) == 1, "who may read one file may read all"
    assert_same_logits(*ranks(1).run(jobs.hf_logits, str(hf), str(nemo))[0])
    assert any(name.endswith("o_proj.pre_quant_scale") for name in tensors_of(hf)) is algorithm.endswith(
        ("_sq", "_awq")
    )


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)], ids=["tp2", "pp2"])
@pytest.mark.parametrize("algorithm", HF_ALGORITHMS)
def test_hf_files_are_the_same_in_every_layout(ranks, exported, tmp_path, algorithm, tp, pp):
    nemo, one = exported(algorithm)
    ranks(2).run(jobs.export_loaded, str(nemo), str(tmp_path / "hf"), tp, pp)
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {p.name for p in one.iterdir()}
    first, second = tensors_of(one), tensors_of(tmp_path / "hf")
    assert set(first) == set(second)
    # Nothing is recomputed, so scales and codes are equal.
    assert [name for name in first if not torch.equal(first[name].float(), second[name].float())] == []
    for name in ("config.json", "hf_quant_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_text() == (one / name).read_text()


@pytest.mark.parametrize("algorithm", HF_ALGORITHMS)
def test_hf_configuration_says_the_format(exported, algorithm):
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    from nemo.collections.llm.modelopt.quantization.export.layouts import modelopt

    _, hf = exported(algorithm)
    assert [path.name for path in hf.glob("*.safetensors*")] == ["model.safetensors"]
    stored = json.loads((hf / "hf_quant_config.json").read_text())
    names = {"fp8": "FP8", "int8": "W8A8_SQ_PER_CHANNEL", "int8_sq": "W8A8_SQ_PER_CHANNEL", "int4_awq": "W4A16_AWQ"}
    assert stored["quantization"]["quant_algo"] == names.get(algorithm, "W4A8_AWQ")
    assert stored["quantization"]["exclude_modules"] == ["lm_head"]
    section = json.loads((hf / "config.json").read_text())["quantization_config"]
    assert section["quant_algo"] == stored["quantization"]["quant_algo"] and section["ignore"] == ["lm_head"]
    if algorithm == "fp8":
        # modelopt's converter supports this one of our formats, and must make the same section.
        assert section == modelopt.config_section(stored) == convert_hf_quant_config_format(stored)


def test_calibrating_and_exporting_with_tensor_parallel(ranks, work, exported):
    _, one = exported("fp8")
    ranks(2).run(jobs.ptq, str(work / "llama"), str(work / "hf-tp"), "fp8", "hf", 2, 1, settings(work))
    first, second = tensors_of(one), tensors_of(work / "hf-tp")
    assert set(first) == set(second)
    for name, value in first.items():
        # A different order of sums changes the statistics of activations, but not weights and their scales.
        torch.testing.assert_close(
            second[name].float(), value.float(), rtol=1e-5 if "input_scale" in name else 0, atol=0
        )


def test_fp32_hf_checkpoint_through_nemos_export_is_exact(ranks, work, exported):
    nemo, _ = exported("fp8")
    hf = work / "exact-hf"
    assert ranks(1).run(export_with_nemo, str(nemo), str(hf)) == [str(hf)]
    assert_names_dtype(hf, "float32")
    assert_same_logits(*ranks(1).run(jobs.hf_logits, str(hf), str(nemo))[0])


def test_blocks_must_divide_the_inputs(ranks, work):
    (answer,) = ranks(1).run(
        jobs.ptq_error, str(work / "llama"), str(work / "hf-int4"), "int4", "hf", 1, 1, settings(work)
    )
    assert answer[0] == "ModelOptConfigError" and not (work / "hf-int4").exists()
    assert "blocks of 128 do not divide the 64 inputs of" in answer[1]


def test_blocks_must_divide_the_inputs_of_a_checkpoint_that_is_exported_later(ranks, work):
    """compress.py exports to NeMo's format first."""
    nemo, hf = work / "nemo-int4-128", work / "hf-int4-later"
    ranks(1).run(jobs.ptq, str(work / "llama"), str(nemo), "int4", "nemo", 1, 1, settings(work))
    (answer,) = ranks(1).run(export_error, str(nemo), str(hf))
    assert answer[0] == "ModelOptConfigError" and not hf.exists()
    assert "blocks of 128 do not divide the 64 inputs of" in answer[1]


def test_plain_model_is_written_when_there_is_no_algorithm(ranks, work):
    target = work / "plain"
    ranks(1).run(jobs.ptq, str(work / "llama"), str(target), None, "hf")
    # modelopt 0.37 writes this file for a model that is not quantized, too.
    assert not (target / "hf_quant_config.json").exists()
    assert_names_dtype(target, "bfloat16")
    loaded, expected = ranks(1).run(jobs.plain_logits, str(target), str(work / "llama"))[0]
    # bf16 weights have 8 bits of mantissa.
    assert float((loaded - expected).norm() / expected.norm()) < 0.02


def test_verification_reports_what_is_wrong(exported, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    from nemo.collections.llm.modelopt import _staging
    from nemo.collections.llm.modelopt.quantization.export import hf_files

    folder = tmp_path / "hf"
    shutil.copytree(exported("fp8")[1], folder)
    hf_files.verify(folder)
    prefix = "model.layers.1.mlp."
    file = folder / "model.safetensors"
    good = load_file(file)
    up = good[f"{prefix}up_proj.weight"]
    for change, message in [
        ({f"{prefix}up_proj.weight_scale": torch.tensor(float("nan"))}, "up_proj.weight_scale is not finite"),
        ({f"{prefix}up_proj.weight": torch.zeros(3, 3)}, r"up_proj.weight has shape \[3, 3\], not \[128, 64\]"),
        ({f"{prefix}up_proj.weight": up.float()}, "up_proj.weight has dtype torch.float32, but also a scale"),
        ({f"{prefix}up_proj.weight_scale": None}, "up_proj.weight_scale is missing for torch.float8_e4m3fn codes"),
        ({f"{prefix}extra.weight": torch.zeros(1)}, "extra.weight is unexpected"),
        ({f"{prefix}up_proj.weight": None}, "up_proj.weight is missing"),
    ]:
        tensors = {name: value for name, value in {**good, **change}.items() if value is not None}
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(_staging.ExportError, match=message):
            hf_files.verify(folder)


@pytest.mark.parametrize("algorithm", ["fp8", "int4_awq", "int8_sq"])
@pytest.mark.parametrize("leaf", ["weight_scale", "pre_quant_scale", "input_scale"])
def test_a_wrong_scale_is_found(exported, tmp_path, algorithm, leaf):
    import shutil

    from safetensors.torch import load_file, save_file

    from nemo.collections.llm.modelopt import _staging
    from nemo.collections.llm.modelopt.quantization.export import hf_contents, hf_verify

    folder = tmp_path / "hf"
    shutil.copytree(exported(algorithm)[1], folder)
    expected, contents = hf_verify.stored_logits(folder, 256), hf_contents.of_files(folder)
    assert hf_verify.compare(folder, expected, 1e-6) < 1e-6
    changed = 0
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(f".{leaf}")]:
            tensors[name] = torch.ones_like(tensors[name])
            changed += 1
        save_file(tensors, file, metadata={"format": "pt"})
    if not changed:
        assert (algorithm, leaf) in {("fp8", "pre_quant_scale"), ("int4_awq", "input_scale")}
        return
    if leaf != "pre_quant_scale":
        with pytest.raises(_staging.ExportError, match="Layer 0 of the checkpoint differs from the model in memory"):
            hf_contents.compare(contents, hf_contents.of_files(folder))
    if (algorithm, leaf) != ("fp8", "input_scale"):
        # The inputs of a trained model are near one, and FP8 rounds them with any scale.
        with pytest.raises(_staging.ExportError, match="logits differ from those of the model in memory"):
            hf_verify.compare(folder, expected, hf_verify.tolerance(torch.float32))


def test_a_checkpoint_is_loaded_for_comparison_without_random_weights(exported):
    """Drawing them takes longer than the comparison, and they would be in memory twice."""
    from nemo.collections.llm.modelopt.quantization.export import hf_files, hf_verify

    folder = exported("fp8")[1]
    before = torch.get_rng_state()
    model = hf_verify.load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    norm = "model.norm.weight"
    assert torch.equal(model.get_parameter(norm), dict(hf_files.read_tensors(folder))[norm].float())


def test_a_long_comparison_is_announced_and_takes_all_cores(exported, monkeypatch):
    from nemo.collections.llm.modelopt.quantization.export import hf_verify

    folder, said = exported("fp8")[1], []
    monkeypatch.setattr(hf_verify.logging, "info", said.append)
    hf_verify.announce(folder)
    assert said == [], "it takes a moment"
    monkeypatch.setattr(hf_verify, "_WORTH_TELLING", 0.0)
    monkeypatch.setattr(hf_verify, "_cores", lambda: 3)
    hf_verify.announce(folder)
    assert "parameters in fp32 on 3 cores of rank zero's CPU take about 1 min. The other ranks wait" in said[0]
    # 70 billion parameters in FP8.
    assert 300 < hf_verify.expected_seconds(70_000_000_000, 70_000_000_000) < 3600
    before = torch.get_num_threads()
    with hf_verify.all_cores():
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


# --- TensorRT-LLM -----------------------------------------------------------------------------------------------------


def test_trtllm_checkpoint(ranks, work):
    target = work / "trtllm"
    ranks(1).run(jobs.ptq, str(work / "llama"), str(target), "fp8", "trtllm", 1, 1, settings(work))
    assert {".nemo-modelopt.json", "config.json", "rank0.safetensors", "nemo_context"} == {
        p.name for p in target.iterdir()
    }

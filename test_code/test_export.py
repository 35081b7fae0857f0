"""Exports are right or refused, verified, and leave nothing behind when they fail."""

from __future__ import annotations

import json
from unittest.mock import MagicMock, patch

import pytest
import torch

from test_code import jobs_quant as jobs

MODULE = "nemo.collections.llm.modelopt.quantization.quantizer"


@pytest.fixture(scope="module")
def work(ranks_factory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    ranks_factory(1).run(jobs.make_checkpoint, str(folder / "llama"), True)
    jobs.corpus(folder / "text.jsonl")
    return folder


def settings(work, **more):
    return {"calibration_dataset": str(work / "text.jsonl"), "calibration_dataset_size": 16, **more}


# --- what can be exported ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["int8", "int8_sq", "int4", "int4_awq", "w4a8_awq"])
def test_hf_refuses_what_it_would_get_wrong(cpu_backend, algorithm):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import hf_auto
    from nemo.collections.llm.modelopt.quantization import quantizer as q
    from test_code import tiny

    message = f"algorithm='{algorithm}' cannot be exported.*hf.*nemo"
    with patch("torch.cuda.is_available", return_value=True):
        config = q.QuantizationConfig(algorithm=algorithm), q.ExportConfig(path="out", export_format="hf")
        if hf_auto.exists():
            # nemo-toolkit 2.5: of transformers' models these can be written, so the model decides, before calibration.
            quantizer = q.Quantizer(*config)
            with pytest.raises(ModelOptConfigError, match=message):
                quantizer.quantize(
                    tiny.model(), forward_loop=MagicMock(side_effect=AssertionError("calibration began"))
                )
        else:
            with pytest.raises(ModelOptConfigError, match=message):
                q.Quantizer(*config)
        for fmt in ("nemo", "trtllm"):
            q.Quantizer(q.QuantizationConfig(algorithm=algorithm), q.ExportConfig(path="out", export_format=fmt))


def test_hf_needs_a_model_with_an_exporter(cpu_backend):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import export
    from test_code import tiny

    model = tiny.model()
    export.check_model("nemo", model)
    with pytest.raises(ModelOptConfigError, match=r"no Hugging Face exporter for GPTModel.*llm.LlamaModel"):
        export.check_model("hf", model)


@pytest.mark.parametrize(
    ("name", "architecture"), [("LlamaModel", "LlamaForCausalLM"), ("GemmaModel", "GemmaForCausalLM")]
)
def test_architecture_is_known_before_calibrating(cpu_backend, name, architecture):
    from nemo.collections import llm
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import export

    model = object.__new__(getattr(llm, name))
    assert export.hf_architecture(model) == architecture
    if name == "GemmaModel":
        with pytest.raises(ModelOptConfigError, match="cannot write a quantized GemmaForCausalLM.*LlamaForCausalLM"):
            export.check_model("hf", model)


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
    (said,) = ranks(1).run(jobs.plain_restore_and_generate, str(target))
    assert "Born in California, Soyer trained as a" in said


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2])
def test_fp8_hf_checkpoint_gives_the_logits_of_the_quantized_model(ranks, work, stages):
    hf, nemo = work / f"hf-{stages}", work / f"nemo-{stages}"
    for target, fmt in ((hf, "hf"), (nemo, "nemo")):
        ranks(stages).run(jobs.ptq, str(work / "llama"), str(target), "fp8", fmt, 1, stages, settings(work))
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= {p.name for p in hf.iterdir()}
    theirs, ours = ranks(1).run(jobs.hf_logits, str(hf), str(nemo))[0]
    # The checkpoint is in bf16 (8 bits of mantissa), so some weights round to the neighbouring FP8 value.
    assert float((theirs - ours).norm() / ours.norm()) < 0.03


def test_fp32_hf_checkpoint_through_nemos_export_is_exact(ranks, work):
    nemo, hf = work / "exact-nemo", work / "exact-hf"
    ranks(1).run(jobs.ptq, str(work / "llama"), str(nemo), quant=settings(work))
    assert ranks(1).run(jobs.export_with_nemo, str(nemo), str(hf)) == [str(hf)]
    theirs, ours = ranks(1).run(jobs.hf_logits, str(hf), str(nemo))[0]
    # fp32 on both sides: what is left is the order of sums.
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_plain_model_is_written_when_there_is_no_algorithm(ranks, work):
    target = work / "plain"
    ranks(1).run(jobs.ptq, str(work / "llama"), str(target), None, "hf")
    loaded, expected = ranks(1).run(jobs.plain_logits, str(target), str(work / "llama"))[0]
    # bf16 weights have 8 bits of mantissa.
    assert float((loaded - expected).norm() / expected.norm()) < 0.02


def test_hf_with_tensor_parallel_is_refused_before_calibrating(ranks, work):
    for kind, text, left in ranks(2).run(
        jobs.ptq_error, str(work / "llama"), str(work / "hf-tp"), "fp8", "hf", 2, 1, settings(work)
    ):
        assert kind == "ModelOptConfigError" and "tensor parallel size 1, not 2" in text
        assert not left


def test_export_of_nemo_falls_back_for_plain_models():
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    with (
        patch(f"{MODULE}.load_connector_from_trainer_ckpt") as load,
        patch(f"{MODULE}.unwrap_for_modelopt_operations"),
        patch(f"{MODULE}.mto.ModeloptStateManager.is_converted", return_value=False),
    ):
        load.return_value.nemo_load.return_value = (MagicMock(), None)
        assert q.export_hf_checkpoint("model", "out") is None


def test_converted_models_are_checked_by_their_quantizers():
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import export

    linear = torch.nn.Linear(2, 2)
    linear.weight_quantizer, linear.input_quantizer = torch.nn.Identity(), torch.nn.Identity()
    linear.weight_quantizer.num_bits, linear.weight_quantizer.is_enabled = (4, 3), True
    export.check_converted(linear)
    linear.input_quantizer.pre_quant_scale = torch.ones(2)
    with pytest.raises(ModelOptConfigError, match="pre_quant_scale"):
        export.check_converted(linear)
    linear.input_quantizer.pre_quant_scale = None
    linear.weight_quantizer.num_bits = 8
    with pytest.raises(ModelOptConfigError, match="INT8"):
        export.check_converted(linear)


def test_verification_finds_what_is_wrong(ranks, work, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    from nemo.collections.llm.modelopt.quantization import export

    if not (work / "hf-1").exists():
        ranks(1).run(jobs.ptq, str(work / "llama"), str(work / "hf-1"), "fp8", "hf", 1, 1, settings(work))
    folder = tmp_path / "hf"
    shutil.copytree(work / "hf-1", folder)
    export.verify_hf(folder)
    prefix = "model.layers.1.mlp."
    # Which of the files holds the layer differs between versions of modelopt.
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index[f"{prefix}up_proj.weight"]
    good = load_file(file)
    for change, message in [
        ({f"{prefix}up_proj.weight_scale": torch.tensor(float("nan"))}, "up_proj.weight_scale is not finite"),
        ({f"{prefix}up_proj.weight": torch.zeros(3, 3)}, r"up_proj.weight has shape \[3, 3\], not \[128, 64\]"),
        ({f"{prefix}extra.weight": torch.zeros(1)}, "extra.weight is unexpected"),
        ({f"{prefix}up_proj.weight": None}, "up_proj.weight is missing"),
    ]:
        tensors = {name: value for name, value in {**good, **change}.items() if value is not None}
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(export.ExportError, match=message):
            export.verify_hf(folder)


# --- TensorRT-LLM and the staging -------------------------------------------------------------------------------------


def test_trtllm_checkpoint(ranks, work):
    target = work / "trtllm"
    ranks(1).run(jobs.ptq, str(work / "llama"), str(target), "fp8", "trtllm", 1, 1, settings(work))
    assert {"config.json", "rank0.safetensors", "nemo_context"} == {p.name for p in target.iterdir()}


@pytest.mark.parametrize("written", [["config.json"], ["config.json", "rank0.safetensors"]])
def test_incomplete_trtllm_checkpoint_is_seen(tmp_path, written):
    from nemo.collections.llm.modelopt.quantization.quantizer import Quantizer

    for name in written:
        (tmp_path / name).touch()
    assert Quantizer._validate_quantized_checkpoint(tmp_path, 1) is (len(written) == 2)
    assert Quantizer._validate_quantized_checkpoint(tmp_path, 2) is False


def test_staging_appears_only_when_it_ends_well(tmp_path):
    from nemo.collections.llm.modelopt.quantization import export

    target = tmp_path / "deep" / "out"
    with pytest.raises(OSError, match="disk full"), export.staged(target) as folder:
        folder.mkdir()
        (folder / "half").touch()
        raise OSError("disk full")
    assert list(target.parent.iterdir()) == []
    with export.staged(target) as folder:
        folder.mkdir()
        (folder / "file").write_text("first")
        assert not target.exists()
    (target / "mine").write_text("stays")
    with export.staged(target) as folder:
        folder.mkdir()
        (folder / "file").write_text("second")
        (folder / "sub").mkdir()
    assert sorted(p.name for p in target.iterdir()) == ["file", "mine", "sub"]
    assert (target / "file").read_text() == "second"
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_a_failing_rank_takes_the_export_of_all_away(ranks, tmp_path):
    answers = ranks(2).run(jobs.stage_on_two_ranks, str(tmp_path / "out"))
    assert "ExportError" in answers[0] and "failed on another rank" in answers[0]
    assert answers[1] == "OSError: disk full"
    assert list(tmp_path.iterdir()) == []


def test_trainer_is_needed_for_nemo():
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    with patch("torch.cuda.is_available", return_value=True):
        quantizer = q.Quantizer(q.QuantizationConfig(), q.ExportConfig(path="out", export_format="nemo"))
    with pytest.raises(AssertionError, match="Trainer required for NeMo export"):
        quantizer.export(MagicMock(), "model")

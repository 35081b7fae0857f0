"""Exports are correct and verified, or raise an error; failed exports leave nothing behind."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from unittest.mock import MagicMock, patch

import pytest
import torch

from test_code.support import jobs_quant as jobs
from test_code.support.jobs_hf import assert_same_logits

MODULE = "nemo.collections.llm.modelopt.quantization.quantizer"


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

    return str(
        io.api.export_ckpt(Path(checkpoint), "hf", Path(target), modelopt_export_kwargs={"dtype": torch.float32})
    )


def stage_on_two_ranks(target) -> str:
    """Fail on rank 1 while all ranks export; return the class of the error of this rank."""
    from nemo.collections.llm.modelopt import _staging
    from test_code.support import tiny

    tiny.init_parallel()
    try:
        with _staging.staged(Path(target), "test") as folder:
            folder.mkdir(exist_ok=True)
            if torch.distributed.get_rank() == 1:
                raise OSError("disk full")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


@pytest.fixture(scope="module")
def work(ranks_factory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    ranks_factory(1).run(jobs.make_checkpoint, str(folder / "llama"), True)
    jobs.corpus(folder / "text.jsonl")
    return folder


def settings(work, **more):
    return {"calibration_dataset": str(work / "text.jsonl"), "calibration_dataset_size": 16, **more}


# --- what can be exported ---------------------------------------------------------------------------------------------


HF_ALGORITHMS = ["fp8", "int8", "int8_sq", "int4_awq", "w4a8_awq"]


@pytest.mark.parametrize(
    "algorithm", ["block_fp8", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "NVFP4_AWQ_LITE_CFG", "MXFP8_DEFAULT_CFG"]
)
def test_hf_raises_an_error_for_what_it_cannot_write(cpu_backend, algorithm):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import quantizer as q
    from nemo.collections.llm.modelopt.quantization import transformers_models
    from test_code.support import tiny

    message = f"algorithm='{algorithm}' cannot be exported.*hf.*nemo"
    with patch("torch.cuda.is_available", return_value=True):
        config = q.QuantizationConfig(algorithm=algorithm), q.ExportConfig(path="out", export_format="hf")
        if transformers_models.exists():
            # With nemo-toolkit 2.5, these can be exported from transformers models, so the error depends on the model.
            quantizer = q.Quantizer(*config)
            never = MagicMock(side_effect=AssertionError("calibration began"))
            with pytest.raises(ModelOptConfigError, match=message):
                quantizer.quantize(tiny.model(), forward_loop=never)
        else:
            with pytest.raises(ModelOptConfigError, match=message):
                q.Quantizer(*config)
        for fmt in ("nemo", "trtllm"):
            q.Quantizer(q.QuantizationConfig(algorithm=algorithm), q.ExportConfig(path="out", export_format=fmt))


@pytest.mark.parametrize("algorithm", [*HF_ALGORITHMS, "int4", "nvfp4", "INT8_WEIGHT_ONLY_CFG", None])
def test_hf_takes_the_algorithms_it_can_write(algorithm):
    import modelopt.torch.quantization as mtq

    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    # modelopt 0.37 has fewer presets, and an unknown name raises an error.
    unknown = str(algorithm).endswith("_CFG") and not hasattr(mtq, algorithm)
    refusal = pytest.raises(ModelOptConfigError, match=f"Unsupported quantization format: {algorithm}")
    with patch("torch.cuda.is_available", return_value=True), refusal if unknown else contextlib.nullcontext():
        q.Quantizer(q.QuantizationConfig(algorithm=algorithm), q.ExportConfig(path="out", export_format="hf"))


def test_hf_needs_a_model_with_an_exporter(cpu_backend):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.export import support
    from test_code.support import tiny

    model = tiny.model()
    support.check_architecture("nemo", model)
    with pytest.raises(ModelOptConfigError, match=r"no Hugging Face exporter for GPTModel.*llm.LlamaModel"):
        support.check_architecture("hf", model)


@pytest.mark.parametrize(
    ("name", "architecture"), [("LlamaModel", "LlamaForCausalLM"), ("GemmaModel", "GemmaForCausalLM")]
)
def test_architecture_is_known_before_calibrating(cpu_backend, name, architecture):
    from nemo.collections import llm
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.export import support

    model = object.__new__(getattr(llm, name))
    assert support.hf_architecture(model) == architecture
    if name == "GemmaModel":
        with pytest.raises(ModelOptConfigError, match="cannot write a quantized GemmaForCausalLM.*LlamaForCausalLM"):
            support.check_architecture("hf", model)


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


def tensors_of(folder):
    from nemo.collections.llm.modelopt.quantization.export import hf_files

    return dict(hf_files.read_tensors(folder))


@pytest.mark.parametrize("algorithm", HF_ALGORITHMS)
def test_hf_checkpoint_gives_the_logits_of_the_quantized_model(ranks, exported, algorithm):
    nemo, hf = exported(algorithm)
    names = {p.name for p in hf.iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json"} <= names
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

    from nemo.collections.llm.modelopt.quantization.export import hf_encoding

    _, hf = exported(algorithm)
    assert sorted(path.name for path in hf.glob("*.safetensors")) == [
        f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)
    ]
    stored = json.loads((hf / "hf_quant_config.json").read_text())
    names = {"fp8": "FP8", "int8": "W8A8_SQ_PER_CHANNEL", "int8_sq": "W8A8_SQ_PER_CHANNEL", "int4_awq": "W4A16_AWQ"}
    assert stored["quantization"]["quant_algo"] == names.get(algorithm, "W4A8_AWQ")
    assert stored["quantization"]["exclude_modules"] == ["lm_head"]
    section = json.loads((hf / "config.json").read_text())["quantization_config"]
    assert section["quant_algo"] == stored["quantization"]["quant_algo"] and section["ignore"] == ["lm_head"]
    if algorithm == "fp8":
        # modelopt's converter supports this one of our formats, and must make the same section.
        assert section == hf_encoding.config_section(stored) == convert_hf_quant_config_format(stored)


def test_one_state_of_all_layers_is_cut_as_later_versions_of_modelopt_do():
    from nemo.collections.llm.modelopt.quantization.export import hf_writer

    names = [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.mlp.experts.7.w.weight",
    ]
    state = {name: torch.ones(1) for name in [*names, "model.layers.11.a.weight"]}
    cut = {number: sorted(part) for number, part in hf_writer.by_layer(state, 12).items()}
    assert cut == {
        1: sorted([names[0], names[3]]),
        12: ["lm_head.weight", "model.layers.11.a.weight", "model.norm.weight"],
    }


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


@pytest.mark.parametrize("kind", ["mixture-of-experts", "Mamba"])
def test_hf_with_tensor_parallel_raises_an_error_if_parts_cannot_be_joined(kind):
    from types import SimpleNamespace

    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.export import support

    config = SimpleNamespace(num_moe_experts=8) if kind[0] == "m" else SimpleNamespace(mamba_stack_spec=object())
    support.check_layout("hf", config, 1)
    support.check_layout("nemo", config, 2)
    with pytest.raises(ModelOptConfigError, match=f"{kind} model needs tensor parallel size 1, not 2"):
        support.check_layout("hf", config, 2)


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
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.export import support

    def linear(**weight):
        layer = torch.nn.Linear(2, 2)
        layer.weight_quantizer = TensorQuantizer(QuantizerAttributeConfig(**weight))
        layer.input_quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=(4, 3)))
        return layer

    support.check_converted(linear(num_bits=(4, 3)))
    message = r"axis=0, .* quantized inputs cannot be written; .*readers: FP8 \(vLLM, .*W4A8_AWQ \(no known server\)"
    with pytest.raises(ModelOptConfigError, match=message):
        support.check_converted(linear(num_bits=(4, 3), axis=0))
    with pytest.raises(ModelOptConfigError, match="all layers must have the same format"):
        support.check_converted(torch.nn.Sequential(linear(num_bits=(4, 3)), linear(num_bits=8, axis=0)))


def test_verification_reports_what_is_wrong(exported, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    from nemo.collections.llm.modelopt import _staging
    from nemo.collections.llm.modelopt.quantization.export import hf_files

    folder = tmp_path / "hf"
    shutil.copytree(exported("fp8")[1], folder)
    hf_files.verify(folder)
    prefix = "model.layers.1.mlp."
    # Which of the files holds the layer differs between versions of modelopt.
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index[f"{prefix}up_proj.weight"]
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


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_are_those_of_the_fake_quantizer(bits):
    from nemo.collections.llm.modelopt.quantization.export import hf_encoding

    algorithm, maxbound = {1: ("FP8", 448), 2: ("W8A16", 127), 4: ("W4A16_AWQ", 7)}[bits]
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    amax = {1: weight.abs().amax(), 2: weight.abs().amax(1, keepdim=True)}.get(bits)
    scale = (weight.view(6, 4, 8).abs().amax(-1) if amax is None else amax) / maxbound
    stored = hf_encoding.encode(algorithm, weight, scale)
    assert stored.shape[0] == (3 if bits == 4 else 6) and stored.element_size() == 1
    back = hf_encoding.decode(algorithm, {"weight": stored, "weight_scale": scale})
    step = hf_encoding._per_element(scale, 32)
    # The bound is half a step: FP8 E4M3 has 3 bits of mantissa, so half a step is 1/16 of the value.
    allowed = weight.abs() / 16 + step / 512 if bits == 1 else step.expand(6, 32) / 2
    assert bool(((back - weight).abs() <= allowed * (1 + 1e-5)).all())
    assert torch.equal(hf_encoding.encode(algorithm, back, scale), stored)


# --- TensorRT-LLM and the staging -------------------------------------------------------------------------------------


def test_trtllm_checkpoint(ranks, work):
    target = work / "trtllm"
    ranks(1).run(jobs.ptq, str(work / "llama"), str(target), "fp8", "trtllm", 1, 1, settings(work))
    assert {".nemo-modelopt.json", "config.json", "rank0.safetensors", "nemo_context"} == {
        p.name for p in target.iterdir()
    }


@pytest.mark.parametrize("written", [["config.json"], ["config.json", "rank0.safetensors"]])
def test_incomplete_trtllm_checkpoint_is_reported(tmp_path, written):
    from nemo.collections.llm.modelopt.quantization.quantizer import Quantizer

    for name in written:
        (tmp_path / name).touch()
    assert Quantizer._validate_quantized_checkpoint(tmp_path, 1) is (len(written) == 2)
    assert Quantizer._validate_quantized_checkpoint(tmp_path, 2) is False


def test_staging_appears_only_when_it_ends_well(tmp_path):
    from nemo.collections.llm.modelopt import _staging

    target = tmp_path / "deep" / "out"
    with pytest.raises(OSError, match="disk full"), _staging.staged(target, "test") as folder:
        folder.mkdir()
        (folder / "half").touch()
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []
    with _staging.staged(target, "test") as folder:
        folder.mkdir()
        (folder / "file").write_text("first")
        assert not target.exists()
    (target / "mine").write_text("stays")
    with _staging.staged(target, "test") as folder:
        folder.mkdir()
        (folder / "file").write_text("second")
        (folder / "sub").mkdir()
    assert sorted(p.name for p in target.iterdir()) == [".nemo-modelopt.json", "file", "mine", "sub"]
    assert (target / "file").read_text() == "second"
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_a_failing_rank_takes_the_export_of_all_away(ranks, tmp_path):
    answers = ranks(2).run(stage_on_two_ranks, str(tmp_path / "out"))
    assert "ExportError" in answers[0] and "failed on another rank" in answers[0]
    assert answers[1] == "OSError: disk full"
    assert list(tmp_path.iterdir()) == []


def test_trainer_is_needed_for_nemo():
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    with patch("torch.cuda.is_available", return_value=True):
        quantizer = q.Quantizer(q.QuantizationConfig(), q.ExportConfig(path="out", export_format="nemo"))
    with pytest.raises(AssertionError, match="Trainer required for NeMo export"):
        quantizer.export(MagicMock(), "model")


def test_what_is_not_quantized_is_compared_as_it_is_written(cpu_backend):
    import types

    from nemo.collections.llm.modelopt.quantization.export import hf_verify

    torch.manual_seed(0)
    plain, quantized = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    quantized.weight_quantizer = types.SimpleNamespace(is_enabled=True)
    model = torch.nn.Sequential(plain, quantized)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with hf_verify.rounded(model, torch.bfloat16):
        for name, value in model.named_parameters():
            expected = before[name] if name == "1.weight" else before[name].bfloat16().float()
            assert torch.equal(value, expected), name
        assert not torch.equal(plain.weight, before["0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_the_config_names_the_tokens_that_the_model_was_imported_with(tmp_path, cpu_backend):
    """NeMo's exporters take them from the tokenizer, but the imported generation config is more precise."""
    from types import SimpleNamespace

    from transformers import GenerationConfig

    from nemo.collections.llm.modelopt.quantization.export import hf_describe

    own = GenerationConfig(bos_token_id=1, eos_token_id=[2, 7])
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 9, "bos_token_id": 0, "pad_token_id": 3}))
    hf_describe.write_generation_config(SimpleNamespace(config=SimpleNamespace(generation_config=own)), tmp_path)
    config, generation = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("config", "generation_config"))
    assert config == {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 3}
    assert generation["eos_token_id"] == [2, 7]

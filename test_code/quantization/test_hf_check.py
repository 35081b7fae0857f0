"""The check of a Hugging Face export accepts every right file and refuses every wrong one."""

from __future__ import annotations

import pytest
import torch

from test_code.support import jobs_hf


@pytest.mark.parametrize("algorithm", ["fp8", "int8", "int4_awq", "w4a8_awq"])
def test_whatever_is_wrong_is_found(ranks, tmp_path, algorithm):
    (found,) = ranks(1).run(jobs_hf.check_corrupted, str(tmp_path), algorithm)
    assert found.pop("nothing") == ""
    absent = {name for name, message in found.items() if message == "does not apply"}
    scales = {"one second scale", "one input scale", "one scale of the inputs"}
    assert (
        scales - absent
        == {
            "fp8": {"one input scale"},
            "int8": {"one input scale"},
            "int4_awq": {"one scale of the inputs"},
            "w4a8_awq": scales,
        }[algorithm]
    )
    # What is quantized is compared number by number, the rest by what comes out.
    by_number = {"one code", "one weight scale", "one second scale", "one input scale"}
    for name in set(found) - absent:
        expected = (
            "layer 1 does not hold what the model in memory does" if name in by_number else "logits are not those"
        )
        assert expected in found[name], name


def check_families(pool, folder, seeds: list[int]) -> None:
    for family in jobs_hf.FAMILIES:
        (found,) = pool.run(jobs_hf.export_random, family, seeds, str(folder), timeout=60 + 60.0 * len(seeds))
        assert len(found) == len(seeds) * len(jobs_hf.ALGORITHMS)
        # A refusal is text.
        assert {case: error for case, error in found.items() if not isinstance(error, float) or error > 1e-5} == {}


def test_random_models_of_each_family_are_exported(ranks, tmp_path):
    check_families(ranks(1), tmp_path, [0, 1])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_random_models_of_each_family_are_exported(ranks, tmp_path):
    check_families(ranks(1), tmp_path, list(range(30)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("FP8 codes", lambda t: t.view(torch.uint8).fill_(0x7F), r"up_proj\.weight is not finite"),
        ("weight_scale", lambda t: t.fill_(0.0), r"up_proj\.weight_scale is not positive"),
        ("weight_scale", lambda t: t.fill_(-1.0), r"up_proj\.weight_scale is not positive"),
        ("input_scale", lambda t: t.fill_(float("inf")), r"up_proj\.input_scale is not finite"),
    ],
)
def test_files_with_impossible_values_are_refused(tmp_path, name, change, message):
    """Both levels of the check look at the files this way."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from nemo.collections.llm.modelopt.quantization.export import hf_files, support

    model = jobs_hf.hf_model("llama", 0, num_hidden_layers=1)
    assert isinstance(model.config, LlamaConfig)
    model.config.save_pretrained(tmp_path)
    tensors = dict(model.state_dict())
    prefix = "model.layers.0.mlp.up_proj."
    tensors[f"{prefix}weight"] = tensors[f"{prefix}weight"].to(torch.float8_e4m3fn)
    tensors |= {f"{prefix}weight_scale": torch.tensor(0.5), f"{prefix}input_scale": torch.tensor(0.5)}
    save_file(tensors, tmp_path / "model.safetensors")
    hf_files.verify(tmp_path)
    change(tensors[prefix + ("weight" if name == "FP8 codes" else name)])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(support.ExportError, match=message):
        hf_files.verify(tmp_path)


def test_a_model_without_finite_logits_is_named_as_the_fault(tmp_path):
    from nemo.collections.llm.modelopt.quantization.export import hf_verify, support

    logits = torch.zeros(1, 2, 4)
    broken = hf_verify.Logits(logits, logits * float("nan"))
    with pytest.raises(support.ExportError, match="logits of the quantized model in memory are not finite"):
        hf_verify.compare(tmp_path, broken, 1e-4)

"""The verification of a Hugging Face export accepts correct files and reports wrong ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from test_code.support import jobs_hf, jobs_quant, jobs_state, ranks, tiny

FAMILIES = ("llama", "llama-tied", "qwen2", "qwen3")


def check_corrupted(folder, algorithm: str) -> dict[str, str]:
    """Export a random Qwen2 and corrupt copies of the files; return the error of the full check for each corruption.

    The names are those of `CORRUPTIONS`, and "nothing" for the unchanged files.
    """
    from nemo.collections.llm.modelopt import _staging
    from nemo.collections.llm.modelopt.quantization.export import hf_verify

    data = jobs_quant.corpus(Path(folder) / "text.jsonl")
    # Keys and queries must have the same size, so that q and k can be swapped.
    checkpoint = jobs_hf.import_hf(jobs_hf.hf_model("qwen2", 0, num_key_value_heads=4), folder)
    ranks.reset()
    target = Path(folder) / "hf"
    settings = {"algorithm": algorithm, "enable_kv_cache": False}
    quantizer = jobs_state.quantizer_for(
        data, export={"path": str(target), "export_format": "hf", "hf_layout": "modelopt"}, **settings
    )
    model, trainer = jobs_state.restored(checkpoint)
    quantizer.quantize(model)
    quantizer.export(model, checkpoint, trainer)
    found = {}
    for name in ("nothing", *CORRUPTIONS):
        spoiled = Path(folder) / "spoiled"
        shutil.copytree(target, spoiled)
        if name != "nothing" and not spoil(spoiled, CORRUPTIONS[name]):
            found[name] = "does not apply"
        else:
            try:
                hf_verify.check_logits(tiny.core(model), spoiled, torch.bfloat16)
                found[name] = ""
            except _staging.ExportError as error:
                found[name] = str(error)
        shutil.rmtree(spoiled)
    return found


def spoil(folder, change) -> bool:
    """Change the tensors of a checkpoint's files; return whether any tensor was changed.

    Args:
        folder: The checkpoint.
        change: Changes a dictionary of tensors by name in place; returns whether it did.
    """
    from safetensors.torch import load_file, save_file

    changed = False
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors = load_file(file)
        if change(tensors):
            changed = True
            save_file(tensors, file, metadata={"format": "pt"})
    return changed


def _scaled(suffix: str, layer: int = 1, factor: float = 1.01):
    """Return a change of one scale, or one of its elements, of one matrix."""

    def change(tensors) -> bool:
        for name in [n for n in tensors if f"layers.{layer}." in n and n.endswith(suffix)]:
            value = tensors[name].clone()
            value.view(-1)[0] *= factor
            tensors[name] = value
            return True
        return False

    return change


def _one_code(tensors) -> bool:
    """Change one code of one matrix by the smallest amount."""
    name = "model.layers.1.mlp.up_proj.weight"
    if name not in tensors:
        return False
    codes = tensors[name].clone()
    codes.view(torch.uint8)[3, 5] ^= 1
    tensors[name] = codes
    return True


def _swapped(tensors) -> bool:
    """Swap the queries and the keys of one layer."""
    names = [name for name in tensors if "layers.0.self_attn.q_proj." in name]
    for name in names:
        other = name.replace("q_proj", "k_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]
    return bool(names)


def _set(suffix: str, value: float, layer: int = 1):
    """Return a change that fills one tensor."""

    def change(tensors) -> bool:
        names = [name for name in tensors if f"layers.{layer}." in name and name.endswith(suffix)]
        for name in names[:1]:
            tensors[name] = torch.full_like(tensors[name], value)
        return bool(names)

    return change


CORRUPTIONS = {
    "one code": _one_code,
    "one weight scale": _scaled("o_proj.weight_scale"),
    "one second scale": _scaled("o_proj.weight_scale_2"),
    "one input scale": _scaled("o_proj.input_scale"),
    "one scale of the inputs": _scaled("o_proj.pre_quant_scale", factor=1.1),
    "q and k swapped": _swapped,
    "a norm without what was folded into it": _set("input_layernorm.weight", 1.0),
    "one element of a norm": _scaled("post_attention_layernorm.weight", factor=1.1),
    "a bias lost": _set("q_proj.bias", 0.0),
}


@pytest.mark.parametrize("algorithm", ["fp8", "int8", "int4_awq", "w4a8_awq"])
def test_every_corruption_is_reported(ranks, tmp_path, algorithm):
    (found,) = ranks(1).run(check_corrupted, str(tmp_path), algorithm)
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
    # Quantized weights are compared number by number, all others by the logits.
    by_number = {"one code", "one weight scale", "one second scale", "one input scale"}
    for name in set(found) - absent:
        expected = "Layer 1 of the checkpoint differs" if name in by_number else "logits differ from those"
        assert expected in found[name], name


def check_families(pool, folder, seeds: list[int]) -> None:
    for family in FAMILIES:
        (found,) = pool.run(jobs_hf.export_random, family, seeds, str(folder), timeout=60 + 60.0 * len(seeds))
        assert len(found) == len(seeds) * len(jobs_hf.ALGORITHMS)
        # An error is a string.
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
def test_files_with_impossible_values_raise_an_error(tmp_path, name, change, message):
    """Both levels of verification check the files in this way."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from nemo.collections.llm.modelopt import _staging
    from nemo.collections.llm.modelopt.quantization.export import hf_files

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
    with pytest.raises(_staging.ExportError, match=message):
        hf_files.verify(tmp_path)


def test_a_model_without_finite_logits_is_named_as_the_fault(tmp_path):
    from nemo.collections.llm.modelopt import _staging
    from nemo.collections.llm.modelopt.quantization.export import hf_verify

    logits = torch.zeros(1, 2, 4)
    broken = hf_verify.Logits(logits, logits * float("nan"))
    with pytest.raises(_staging.ExportError, match="logits of the quantized model in memory are not finite"):
        hf_verify.compare(tmp_path, broken, 1e-4)

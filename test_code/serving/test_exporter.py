"""Folders in modelopt's layout have the names, dtypes and shapes that modelopt's own exporter writes.

modelopt quantizes the same model of ``transformers`` here, and its ``export_hf_checkpoint`` writes it.
"""

from __future__ import annotations

import fnmatch
import json

import pytest

from nemo_modelopt_dropin.preflight import algorithms, readers
from test_code.serving import cells
from test_code.support import installed, jobs_serving
from test_code.support.hf_folders import tensors_of

FAMILIES = ("llama", "qwen2-tied", "mixtral")
# Our algorithm, and what modelopt's exporter cannot do on a CPU.
EXPORTABLE = ("fp8", "fp8_pc_pt", "block_fp8", "int8", "int8_sq", "int8_wo", "int4_awq", "w4a8_awq", "nvfp4", "mxfp8")
UNABLE = {("mixtral", "w4a8_awq"): "modelopt's calibration raises an error (amax of another shape)"}

# Tensors that one of both folders has, or that differ: (algorithm, family, name, reason); patterns of `fnmatch`.
DIFFERENT = [
    ("*_sq", "*", "*.pre_quant_scale", "ours multiplies those of q, k, v, gate and up into the norms before them"),
    ("*_awq", "mixtral", "*.pre_quant_scale", "ours multiplies those of experts into the norm before them"),
    ("*", "qwen2-tied", "lm_head.weight", "ours leaves out a tied output layer, which transformers drops, too"),
]
# Entries of `quantization_config` that differ: (algorithm, entry, reason).
CONFIGURED = [
    ("*", "config_groups", "a summary for other tools; readers of modelopt's layout use `quant_algo`"),
    ("*", "group_size", "modelopt has it in hf_quant_config.json only; readers of config.json need it"),
    ("*", "has_zero_point", "modelopt has it in hf_quant_config.json only; readers of config.json need it"),
    ("*", "pre_quant_scale", "modelopt has it in hf_quant_config.json only; readers of config.json need it"),
]


def described(folder) -> dict[str, tuple]:
    """Return dtype and shape of each tensor of a folder."""
    return {name: (str(value.dtype), tuple(value.shape)) for name, value in tensors_of(folder).items()}


def section(folder) -> dict:
    """Return ``quantization_config``, with linear layers only among those in 16 bits."""
    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {**content, "ignore": linear(content["ignore"])}


def separate(folder) -> dict:
    """Return the content of ``hf_quant_config.json``, without entries that are None; as `section` does."""
    content = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    content = {**content, "exclude_modules": linear(content["exclude_modules"])}
    return {key: value for key, value in content.items() if value is not None}


def linear(names: list[str]) -> list[str]:
    """Return names without the embedding, which modelopt lists from 0.45, since it could quantize it there."""
    return [name for name in names if name != "model.embed_tokens"]


def excused(table, algorithm, *keys) -> bool:
    """Return whether a table of differences names one."""
    return any(
        all(fnmatch.fnmatch(key, pattern) for key, pattern in zip((algorithm, *keys), row[:-1], strict=True))
        for row in table
    )


PAIRS = [
    (family, name)
    for name in EXPORTABLE
    for family in FAMILIES
    if (family, name) not in UNABLE and cells.writable(name, readers.MODELOPT)
]


@installed.since_0_43
@pytest.mark.parametrize(("family", "algorithm"), PAIRS)
def test_files_are_those_of_modelopts_exporter(ranks, made, exported, tmp_path, family, algorithm):
    folder, _, _ = made(family)
    ours, _ = exported(family, algorithm, readers.MODELOPT, draws=0)
    preset = algorithms.get(algorithm).preset
    ranks(1).run(jobs_serving.modelopts_own, str(folder / "original"), str(tmp_path / "theirs"), preset)
    found, expected = described(ours), described(tmp_path / "theirs")
    different = {name: (found.get(name), expected.get(name)) for name in found.keys() | expected.keys()}
    assert {
        name: both
        for name, both in different.items()
        if both[0] != both[1] and not excused(DIFFERENT, algorithm, family, name)
    } == {}
    entries = section(ours), section(tmp_path / "theirs")
    different = {key: (entries[0].get(key), entries[1].get(key)) for key in entries[0] | entries[1]}
    assert {
        key: both for key, both in different.items() if both[0] != both[1] and not excused(CONFIGURED, algorithm, key)
    } == {}
    assert separate(ours) == separate(tmp_path / "theirs")

"""The table of algorithms: everything else is made from it, and it agrees with modelopt's presets."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_modelopt_dropin.errors import ModelOptConfigError
from nemo_modelopt_dropin.preflight import algorithms
from test_code.support import installed

DOCS = Path(__file__).parents[2] / "docs"

# Adds an entry before anything else is imported, and prints what the commands, the checks and the documentation make
# of it.
_WITH_ONE_MORE = """
from nemo_modelopt_dropin.preflight import algorithms, readers
algorithms.HF_FORMATS["W3A16"] = algorithms.HfFormat()
readers.TABLE["W3A16", readers.MODELOPT] = {
    name: readers.Cell(readers.RUN if name == "vLLM" else readers.REFUSED) for name in readers.READERS
}
algorithms.TABLE["int3"] = algorithms.Algorithm(
    "INT8_WEIGHT_ONLY_CFG", "INT3 by block of 64", "none", 3.25, "W3A16", block=64, needs_cuda=True, remark="new"
)

from nemo_modelopt_cli import ptq
from nemo_modelopt_cli.compress import settings
from nemo_modelopt_dropin.preflight import model_checks, model_sizes

assert ptq.algorithm("int3") == "int3"
assert "gptq, int3, a preset" in " ".join(ptq.parser().format_help().split())
assert not settings.unknown("algorithm", ["int3"], settings.ALGORITHMS)
quantization = settings.Quantization(algorithm="int3", formats=("hf",))
assert quantization.problems() == []
assert quantization.block() == 64

shape = model_sizes.Shape("tiny", 2, 96, 192, 4, 4, 24, 100)
found = model_checks.block_problems(shape, 1, quantization.block())
assert len(found) == 2 and "blocks of 64" in found[0], found
assert model_sizes.quantized_bytes(shape, algorithms.get("int3").bits) == (
    shape.linear_parameters * 3.25 / 8 + 2 * (shape.parameters - shape.linear_parameters)
)
assert algorithms.needs_cuda("int3") and not algorithms.needs_cuda("nvfp4")
assert "| `int3` | INT3 by block of 64 | none | vLLM | new; needs CUDA kernels |" in algorithms.markdown()
"""


def test_one_entry_is_enough_for_the_commands_and_checks():
    subprocess.run([sys.executable, "-c", _WITH_ONE_MORE], check=True, timeout=120)


@installed.since_0_43
def test_one_entry_is_enough_for_presets(monkeypatch, cpu_backend):
    from nemo.collections.llm.modelopt.quantization import quant_cfg_choices

    entry = algorithms.Algorithm("INT8_WEIGHT_ONLY_CFG", "INT3", "none", 3, "W3A16")
    monkeypatch.setitem(algorithms.TABLE, "int3", entry)
    assert quant_cfg_choices.get_quant_cfg_choices()["int3"] == quant_cfg_choices.get_modelopt_presets()[entry.preset]


@pytest.mark.parametrize(
    ("page", "name", "table"),
    [("quantize.md", "algorithms", algorithms.markdown), ("load-exports.md", "readers", algorithms.readers_markdown)],
)
def test_the_documentation_has_the_table(page, name, table):
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name}: begin.*?-->\n(.*?)<!-- {name}: end -->", text, re.DOTALL)
    assert found, f"{page} has no table between its markers"
    assert found[1].strip() == table().strip(), (
        "print the tables with: python -m nemo_modelopt_dropin.preflight.algorithms"
    )


@pytest.mark.parametrize("lookup", [algorithms.get, algorithms.weight_bits])
def test_a_missing_entry_raises_an_error(lookup):
    with pytest.raises(ModelOptConfigError, match=r"algorithm='fp7'.*allowed: \['int8'.*Did you mean 'fp8'\?"):
        lookup("fp7")


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("fp8", 8),
        ("int4_awq", 4.125),
        ("nvfp4", 4.5),
        ("mxfp8", 8.25),
        ("no_quant", 16),
        ("FP8_DEFAULT_CFG", 8),
        ("MXFP8_CFG", None),
    ],
)
def test_bits(name, bits):
    assert algorithms.weight_bits(name) == bits


def test_a_file_has_no_bits_of_its_own(tmp_path):
    (tmp_path / "own").write_text("{}")
    assert algorithms.weight_bits(str(tmp_path / "own")) is None


@pytest.mark.parametrize(
    ("name", "block"), [("fp8", None), ("nvfp4", None), ("int4", 128), ("int4_awq", 32), ("w4a8_awq", 32), ("x", None)]
)
def test_blocks(name, block):
    assert algorithms.block_size(name, 32) == block
    assert algorithms.has_block_setting(name) is (block == 32)


def test_the_presets_that_need_cuda_are_those_that_the_cpu_backend_does_not_simulate(cpu_backend):
    from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices

    for name, quant_cfg in choices.get_modelopt_presets().items():
        assert choices.needs_cuda(quant_cfg) is algorithms.needs_cuda(name), name


@pytest.mark.parametrize(
    "installed, expected",
    [("0.43.0", "gptq needs nvidia-modelopt 0.44 or later, and 0.43.0 is installed"), ("0.44.0rc1", None)],
)
def test_a_method_of_a_later_modelopt_is_refused_with_both_versions(installed, expected):
    assert algorithms.version_problem("gptq", installed) == expected
    assert algorithms.version_problem("fp8", installed) is None


@pytest.mark.parametrize("name", algorithms.TABLE)
def test_the_table_agrees_with_modelopts_presets(cpu_backend, name):
    import modelopt.torch.quantization as mtq

    from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices
    from nemo.collections.llm.modelopt.quantization.export.layouts import layer

    entry = algorithms.get(name)
    # modelopt 0.37 has fewer presets, and no method of 0.44.
    if algorithms.version_problem(name) or (entry.preset is not None and not hasattr(mtq, entry.preset)):
        assert name not in choices.get_quant_cfg_choices()
        return
    quant_cfg = choices.get_quant_cfg_choices()[name]
    settings = list(choices.quantizer_settings(quant_cfg))
    weight = [attributes for pattern, attributes in settings if "weight_quantizer" in pattern]
    has_input = any("input_quantizer" in pattern for pattern, _ in settings)
    scaled = choices.is_awq(quant_cfg) or choices.is_smoothquant(quant_cfg)
    assert choices.needs_cuda(quant_cfg) is entry.needs_cuda
    assert choices.bits_of(weight[0]["num_bits"]) == int(entry.bits)
    assert has_input is (entry.activations != "none")
    if entry.block is not None:
        assert weight[0]["block_sizes"][-1] == entry.block
    assert layer.algorithm_of(weight, has_input, scaled) == entry.hf_format

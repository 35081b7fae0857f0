"""Checks of a quant_cfg file by modelopt's definitions: every preset passes, misspelt fields are named."""

from __future__ import annotations

import json
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest

from test_code.support import command_lines

GOOD = {"*weight_quantizer": {"num_bits": 8, "axis": 0}, "default": {"enable": False}}
BY_CLASS = {"*weight_quantizer": {"num_bits": 8}, "nn.LayerNorm": {"*": {"enable": False}}}
IN_TURN = {"*weight_quantizer": [{"num_bits": 4, "block_sizes": {"-1": 128}}, {"num_bits": [4, 3]}]}


def read(path: Path, content) -> dict:
    """Return the quant_cfg of a file, as the Quantizer's constructor reads it."""
    from nemo.collections.llm.modelopt.quantization import _quant_cfg, utils

    path.write_text(json.dumps(content))
    return _quant_cfg.base_quant_cfg(str(path), {}, utils.load_quant_cfg)[0]


@pytest.mark.parametrize("name", sorted(mtq.config.choices))
def test_every_preset_passes(cpu_backend, name):
    from nemo.collections.llm.modelopt.quantization import _quant_cfg_check

    _quant_cfg_check.check(getattr(mtq, name), name)


@pytest.mark.parametrize(
    ("patterns", "algorithm"),
    [
        (GOOD, "max"),
        (GOOD, None),
        (BY_CLASS, {"method": "smoothquant", "alpha": 0.3}),
        (IN_TURN, {"method": "awq_lite", "alpha_step": 0.5}),
        (GOOD, ["max", {"method": "awq_clip"}]),
    ],
)
def test_files_that_modelopt_takes_pass(cpu_backend, tmp_path, patterns, algorithm):
    read(tmp_path / "q.json", {"quant_cfg": patterns, "algorithm": algorithm})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"quant_cfg": {"*": {"num_bit": 8}}}, r"q.json: '\*': unknown field 'num_bit'; .* Did you mean 'num_bits'\?"),
        ({"quant_cfg": {"*": {"axis": "x"}}}, r"q.json: '\*': axis='x' is not valid: "),
        ({"quant_cfg": {"*": {"num_bits": 8, "block_sizes": 128}}}, r"q.json: '\*': block_sizes=128 is not valid"),
        ({"quant_cfg": {"nn.Linear": {"*": {"enabel": False}}}}, r"'nn.Linear': '\*': unknown field 'enabel'"),
        ({"quant_cfg": {"*": [{"num_bits": 8}, {"axes": 0}]}}, r"unknown field 'axes'"),
        ({"quant_cfg": {"*": 8}}, r"q.json: '\*' is 8; expected attributes of a quantizer"),
        ({"quant_cfg": {"*": None}}, r"q.json: '\*' is None; expected attributes of a quantizer"),
        ({"quant_cfg": GOOD, "algoritm": "max"}, r"unknown field 'algoritm'; .* Did you mean 'algorithm'\?"),
        ({"quant_cfg": GOOD, "algorithm": "awq_light"}, r"unknown \"algorithm\" 'awq_light'; .* mean 'awq_lite'\?"),
        ({"quant_cfg": GOOD, "algorithm": {"alpha": 1}}, r'"algorithm" has no "method"; its fields are'),
        ({"quant_cfg": GOOD, "algorithm": {"method": "awq_lite", "alpha_stepp": 1}}, r"unknown field 'alpha_stepp'"),
        ({"quant_cfg": GOOD, "algorithm": {"method": "smoothquant", "alpha": "x"}}, r"alpha='x' is not valid"),
        ({"quant_cfg": GOOD, "algorithm": 3}, r"unknown \"algorithm\" 3"),
    ],
)
def test_what_is_wrong_is_named_before_a_model_is_loaded(cpu_backend, tmp_path, content, message):
    from nemo.collections.llm.modelopt import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.quantizer import QuantizationConfig, Quantizer

    (tmp_path / "q.json").write_text(json.dumps(content))
    with pytest.raises(ModelOptConfigError, match=message):
        Quantizer(QuantizationConfig(str(tmp_path / "q.json"), calibration_dataset=["a"]), None)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "--algorithm q.json is not valid JSON"),
        ("[1]", '--algorithm q.json must hold an object "quant_cfg"'),
        ('{"quant_cfg": 3}', '--algorithm q.json must hold an object "quant_cfg"'),
        (json.dumps({"quant_cfg": GOOD, "algoritm": "max"}), "unknown field 'algoritm'; did you mean algorithm?"),
        (json.dumps({"quant_cfg": GOOD}), None),
    ],
)
def test_the_script_checks_the_form_before_nemo_is_imported(tmp_path, monkeypatch, capsys, text, problem):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.json").write_text(text)
    command = [*command_lines.RUNS["ptq"].split(), "-algo", "q.json"]
    if problem is None:
        command_lines.script_of("ptq").resolve(command)
        return
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of("ptq").resolve(command)
    assert problem in capsys.readouterr().err

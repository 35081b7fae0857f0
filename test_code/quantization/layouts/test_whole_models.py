"""Whole models are written in every format and layout, and their files agree with the model in memory."""

from __future__ import annotations

import pytest

from nemo_modelopt_dropin.fit import files
from nemo_modelopt_dropin.fit.formats import Format
from nemo_modelopt_dropin.preflight import model_sizes
from test_code.support import installed, jobs_layouts

ALGORITHMS = ["fp8", "fp8_pc_pt", "fp8_wo", "block_fp8", "int8", "int8_wo", "int4", "nvfp4", "w4a16_nvfp4", "mxfp8"]
# modelopt has no name for this format.
LACKING = {("fp8_wo", "modelopt")}
CASES = [(a, layout) for a in ALGORITHMS for layout in ("modelopt", "compressed-tensors") if (a, layout) not in LACKING]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of all checkpoints."""
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def written(ranks_factory, folder):
    """The relative errors of the logits by algorithm and layout."""
    algorithms = [name for name in ALGORITHMS if installed.has_preset(name)]
    return ranks_factory(1).run(jobs_layouts.write_all, str(folder), algorithms, timeout=500.0)[0]


@pytest.mark.parametrize(("algorithm", "layout"), CASES)
def test_files_agree_with_the_model_in_memory(written, algorithm, layout):
    installed.need_preset(algorithm)
    found = written[algorithm, layout]
    assert not isinstance(found, str), found
    assert found <= 1e-4


@pytest.mark.parametrize(("algorithm", "layout"), CASES)
def test_bytes_of_the_weights_equal_the_formula(written, folder, algorithm, layout):
    installed.need_preset(algorithm)
    assert not isinstance(written[algorithm, layout], str)
    shape, found = model_sizes.read(folder / "nemo"), Format(algorithm, algorithm)
    weights = folder / f"{algorithm}-{layout}" / "model.safetensors"
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    assert weights.stat().st_size - header == files.weight_bytes(shape, found, layout)
    # The header is estimated from usual names; it is most of the error for a model as small as this.
    assert files.header_bytes(shape, found, layout) == pytest.approx(header, rel=0.1)
    whole = files.weight_bytes(shape, found, layout) + files.header_bytes(shape, found, layout)
    assert whole == pytest.approx(weights.stat().st_size, rel=0.01)

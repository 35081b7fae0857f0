"""Whole models are written in every format and layout, and their files agree with the model in memory."""

from __future__ import annotations

import pytest

from test_code.support import jobs_layouts

ALGORITHMS = ["fp8", "fp8_pc_pt", "fp8_wo", "block_fp8", "int8", "int8_wo", "int4", "nvfp4", "w4a16_nvfp4", "mxfp8"]
# modelopt has no name for this format.
LACKING = {("fp8_wo", "modelopt")}
CASES = [(a, layout) for a in ALGORITHMS for layout in ("modelopt", "compressed-tensors") if (a, layout) not in LACKING]


@pytest.fixture(scope="module")
def written(ranks_factory, tmp_path_factory):
    """The relative errors of the logits by algorithm and layout."""
    return ranks_factory(1).run(
        jobs_layouts.write_all, str(tmp_path_factory.mktemp("layouts")), ALGORITHMS, timeout=500.0
    )[0]


@pytest.mark.parametrize(("algorithm", "layout"), CASES)
def test_files_agree_with_the_model_in_memory(written, algorithm, layout):
    found = written[algorithm, layout]
    assert not isinstance(found, str), found
    assert found <= 1e-4

"""Quantized checkpoints of one version of modelopt in another: the same numbers, or an error with both versions."""

from __future__ import annotations

import re

import pytest
import torch

from test_code.across_versions import conftest, jobs

pytestmark = pytest.mark.across

VERSIONS = list(conftest.ROWS)
NEW = ["0.43", "0.44", "0.47"]
PAIRS = [(writer, reader) for writer in VERSIONS for reader in NEW if writer != reader] + [(conftest.OLDEST, "0.37")]


def assert_same(found: dict, expected: dict) -> None:
    assert found["amax"].keys() == expected["amax"].keys() and expected["amax"]
    for name, value in expected["amax"].items():
        assert torch.equal(found["amax"][name], value), name
    # The same kernels of the same PyTorch on one CPU: every bit is the same.
    assert torch.equal(found["logits"], expected["logits"])


@pytest.mark.parametrize("kind", conftest.KINDS)
@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_a_checkpoint_is_the_same_model_in_another_version(written, read, writer, reader, kind):
    found = read[reader][writer, kind]
    assert not isinstance(found, str), found
    assert_same(found, written[writer][kind][1])


@pytest.mark.parametrize("kind", conftest.KINDS)
@pytest.mark.parametrize("writer", NEW)
def test_a_version_that_cannot_read_it_says_so(read, writer, kind):
    found = read["0.37"][writer, kind]
    cache = r"holds KV-cache quantizers, which modelopt 0\.37\.0 would lose: install modelopt 0\.43"
    keys = rf"was written with modelopt {re.escape(writer)}\.0, and modelopt 0\.37\.0 cannot restore it: .*keys"
    assert isinstance(found, str) and re.search(cache if kind == "fp8" else keys, found), found


@pytest.mark.parametrize("kind", ["int8_sq", "w4a8_awq", "experts"])
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}])
@pytest.mark.parametrize(("writer", "reader"), [("0.37", "0.43"), ("0.43", "0.47"), ("0.47", "0.43")])
def test_at_another_layout(run, written, writer, reader, layout, kind):
    path, expected = written[writer][kind]
    found = run(reader, [("restored", {"path": path, **layout})], ranks=2)[0]
    # Sums over ranks are added in another order.
    assert torch.allclose(found["logits"], expected["logits"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["fp8", "int4_awq", "experts"])
@pytest.mark.parametrize(("writer", "reader"), [("0.37", "0.43"), ("0.43", "0.47"), ("0.47", "0.43")])
def test_it_is_exported_to_the_same_files(run, written, tmp_path, writer, reader, kind):
    path = written[writer][kind][0]
    own, other = (
        run(version, [("exported", {"path": path, "target": str(tmp_path / version)})])[0]
        for version in (writer, reader)
    )
    # 0.37 quantizes no KV cache.
    assert own.keys() == other.keys() and len(own) > 10
    for name, value in own.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(("writer", "reader"), [("0.37", "0.43"), ("0.43", "0.47"), ("0.47", "0.43")])
def test_training_goes_on_and_saves_in_the_installed_form(run, written, tmp_path, writer, reader):
    target = str(tmp_path / "trained")
    path, expected = written[writer]["tiny"]
    restored = ("restored", {"path": target})
    losses, found = run(reader, [("trained_on", {"path": path, "target": target}), restored])
    assert len(losses) == 3 and all(0 < loss < 6 for loss in losses)
    # Weights are trained, and the scales of the calibration stay.
    assert found["amax"].keys() == expected["amax"].keys()
    assert not torch.equal(found["logits"], expected["logits"])
    # modelopt's own functions alone read it.
    assert_same(run(reader, [("restored", {"path": target, "by_ours": False})])[0], found)


@pytest.mark.parametrize("first, second", [("0.37", "0.43"), ("0.43", "0.47"), ("0.47", "0.43")])
def test_a_calibrated_state_of_another_version_says_both(run, sources, tmp_path, first, second):
    folder, source = str(tmp_path / "state"), sources["llama-3.2"]
    run(first, [("state_saved", {"source": source, "folder": folder, "algorithm": "int8"})])
    found = run(second, [("state_loaded", {"source": source, "folder": folder, "algorithm": "int8"})])[0]
    versions = rf"nvidia-modelopt was '{re.escape(first)}\.0', now '{re.escape(second)}\.0'"
    assert found.startswith(jobs.ERROR) and re.search(versions, found), found


@pytest.mark.parametrize("first, second", [("0.43", "0.47"), ("0.47", "0.43")])
def test_a_stored_search_of_another_version_says_so(run, sources, tmp_path, first, second):
    calls = [("searched", {"source": sources["llama-3.2"], "folder": str(tmp_path / "search")})]
    assert run(first, calls) == [None]
    found = run(second, calls)[0]
    assert found.startswith(jobs.ERROR) and f"{first}.0, and {second}.0 is installed" in found, found

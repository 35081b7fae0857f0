"""Which device, collectives, layer spec and tests a machine with GPUs selects, on GPUs that are simulated."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from test_code.support import devices, tolerances

ROOT = Path(__file__).resolve().parents[2]
# Folders of which all tests show what only a CPU can, and a file that needs a GPU.
OF_CPU, OF_GPU = ("test_code/cpu_backend/", "test_code/fake_gpu/"), "test_code/end_to_end/test_gpu.py"

PROBE = """
import os

from test_code.support import devices


def test_two(ranks):
    devices.need(2)


def test_four(ranks):
    devices.need(4)


def test_nine(ranks):
    ranks(9).run(os.getpid)


def test_three_by_a_command():
    devices.command("ptq", ["--dry-run"], ranks=3)
"""


@pytest.mark.parametrize(
    ("environment", "gpus", "has_te", "expected"),
    [
        ({}, 0, False, "the CPU, gloo, local layer spec"),
        ({}, 0, True, "the CPU, gloo, local layer spec"),
        ({"TEST_SPEC": "te"}, 0, True, "the CPU, gloo, te layer spec"),
        ({}, 1, True, "1 GPU, nccl, te layer spec"),
        ({}, 8, False, "8 GPUs, nccl, local layer spec"),
        ({"TEST_SPEC": "local"}, 8, True, "8 GPUs, nccl, local layer spec"),
        ({"TEST_DEVICE": "cpu"}, 8, True, "the CPU, gloo, local layer spec"),
        ({"TEST_DEVICE": "cuda"}, 2, True, "2 GPUs, nccl, te layer spec"),
        ({"TEST_DEVICE": "", "TEST_SPEC": ""}, 2, True, "2 GPUs, nccl, te layer spec"),
    ],
)
def test_device_collectives_and_spec(environment, gpus, has_te, expected):
    machine = devices.choose(environment, gpus, has_te)
    assert str(machine) == expected
    on_gpus = "GPU" in expected
    assert (machine.accelerator, machine.start_method) == (("gpu", "spawn") if on_gpus else ("cpu", "forkserver"))
    assert machine.too_few(2) is None if not on_gpus or machine.gpus > 1 else "2 ranks, 1 GPU" in machine.too_few(2)


@pytest.mark.parametrize(
    ("environment", "gpus", "message"),
    [
        ({"TEST_DEVICE": "gpu"}, 1, "TEST_DEVICE is 'cpu' or 'cuda', got 'gpu'"),
        ({"TEST_DEVICE": "cuda"}, 0, "TEST_DEVICE=cuda, but torch finds no GPU"),
        ({"TEST_SPEC": "megatron"}, 0, "TEST_SPEC is 'te' or 'local', got 'megatron'"),
        ({"TEST_SPEC": "te"}, 1, "TEST_SPEC=te, but Transformer Engine cannot be imported"),
    ],
)
def test_what_is_not_there_is_an_error(environment, gpus, message):
    with pytest.raises(devices.DeviceError, match=message):
        devices.choose(environment, gpus, has_te=False)


def test_gpus_are_hidden_only_if_asked_for():
    for wanted, expected in (("cpu", ""), ("cuda", "0,1"), (None, "0,1")):
        environment = {"CUDA_VISIBLE_DEVICES": "0,1"} | ({"TEST_DEVICE": wanted} if wanted else {})
        devices.prepare(environment)
        assert environment["CUDA_VISIBLE_DEVICES"] == expected
        assert environment["NVIDIA_TF32_OVERRIDE"] == "0", "fp32 would have 11 bits"


def test_every_quantity_has_a_bound_for_each_device_and_dtype():
    kinds = {(device, dtype) for _, device, dtype in tolerances.TOLERANCES}
    assert kinds == {(d, t) for d in (devices.CPU, devices.CUDA) for t in (tolerances.FP32, tolerances.BF16)}
    for what in (tolerances.LOSS, tolerances.WEIGHT, tolerances.AMAX, tolerances.LOGITS):
        bounds = {kind: tolerances.TOLERANCES[(what, *kind)] for kind in kinds}
        assert bounds["cpu", "fp32"] < bounds["cuda", "fp32"] < bounds["cuda", "bf16"]


def _pytest(commands, gpus: int, *arguments: str, **variables: str) -> str:
    """Run pytest on simulated GPUs, in a process that has NeMo imported already, and return what it prints."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TEST_", "PYTEST_"))}
    environment = {**kept, "SIMULATED_GPUS": str(gpus), **variables}
    command = [Path(pytest.__file__).with_name("__main__.py"), "-p", "test_code.support.simulated_gpus", "-q"]
    # Assertions are not rewritten, because the process has imported what would be rewritten.
    command += ["-p", "no:cacheprovider", "--assert=plain"]
    found = commands.run([*command, *arguments], environment, cwd=ROOT)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return found.stdout


def _files(output: str) -> set[str]:
    return {line.partition("::")[0] for line in output.splitlines() if "::" in line}


def test_the_suites_collection_selects_cuda(commands):
    found = _pytest(commands, 2, "--collect-only", "test_code")
    files = _files(found)
    assert "ran on 2 GPUs, nccl, local layer spec" in found
    assert OF_GPU in files and "test_code/test_parity.py" in files
    assert not [file for file in files if file.startswith(OF_CPU)]
    count = int(re.search(r"^(\d+) tests deselected, marked cpu", found, re.MULTILINE)[1])
    assert count > 50 and "marked gpu" not in found


def test_the_cpu_can_be_forced_on_a_machine_with_gpus(commands):
    places = ["test_code/cpu_backend", "test_code/end_to_end", "test_code/fake_gpu"]
    found = _pytest(commands, 8, "--collect-only", *places, TEST_DEVICE="cpu")
    files = _files(found)
    assert "ran on the CPU, gloo, local layer spec" in found
    assert OF_GPU not in files and all(any(file.startswith(folder) for file in files) for folder in OF_CPU)
    assert re.search(r"^\d+ tests deselected, marked gpu: they need a GPU", found, re.MULTILINE)


@pytest.mark.parametrize(("gpus", "skipped"), [(1, 4), (2, 3), (8, 1)])
def test_jobs_of_more_ranks_than_gpus_are_skipped_and_counted(commands, tmp_path, gpus, skipped):
    (tmp_path / "test_probe.py").write_text(PROBE)
    arguments = ["-p", "test_code.conftest", "--rootdir", str(tmp_path), "-o", "addopts=", str(tmp_path)]
    found = _pytest(commands, gpus, *arguments)
    passed = f"{4 - skipped} passed, " if skipped < 4 else ""
    assert f"{passed}{skipped} skipped" in found
    assert f"{skipped} tests skipped: needs more GPUs than there are ({gpus})" in found

"""Choose where the tests run: device, collectives, number of ranks and layer spec. No other module of the tests does.

On a machine with GPUs, ranks use CUDA and NCCL, one rank for each GPU; elsewhere they use the CPU backend and gloo.
Two environment variables change this:

- ``TEST_DEVICE=cpu`` hides the GPUs from this process and from all that it starts; ``TEST_DEVICE=cuda`` fails if there
  are none.
- ``TEST_SPEC=te`` builds models from Transformer Engine's layers (TE), ``TEST_SPEC=local`` from Megatron's own. By
  default it is ``te`` on GPUs if TE is installed. On the CPU, TE needs the path of `test_code.te_on_cpu`.

Importing this module costs nothing: torch is imported when a question needs it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEVICE_VARIABLE, SPEC_VARIABLE = "TEST_DEVICE", "TEST_SPEC"
CPU, CUDA = "cpu", "cuda"
LOCAL, TE = "local", "te"
SPECS = {LOCAL: "local_layer_spec", TE: "transformer_engine_layer_spec"}
# The beginning of the reason why a test is skipped, by which the closing lines count such tests.
TOO_FEW = "needs more GPUs than there are"

# What makes fp32 on GPUs comparable with the CPU. They are read when CUDA or a library starts.
_CUDA_ENVIRONMENT = {
    # TE multiplies fp32 matrices in TF32, with 11 bits, and takes no setting; cuBLAS reads this one.
    "NVIDIA_TF32_OVERRIDE": "0",
    # cuBLAS repeats its sums in the same order; torch's deterministic mode needs it.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    # Megatron's overlap of tensor parallelism needs one queue.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Otherwise torch starts CUDA to see whether there is a GPU, and processes that are forked then cannot use it.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


class DeviceError(RuntimeError):
    """The environment asks for a device or a layer spec that this machine does not have."""


@dataclass(frozen=True)
class Machine:
    """Where the tests run.

    Attributes:
        device: ``cpu`` or ``cuda``.
        gpus: number of GPUs, 0 on the CPU.
        spec: ``local`` or ``te``.
    """

    device: str
    gpus: int
    spec: str

    @property
    def on_gpus(self) -> bool:
        return self.device == CUDA

    @property
    def backend(self) -> str:
        """Return the backend of ``torch.distributed``."""
        return "nccl" if self.on_gpus else "gloo"

    @property
    def accelerator(self) -> str:
        """Return Lightning's name of the device."""
        return "gpu" if self.on_gpus else "cpu"

    @property
    def start_method(self) -> str:
        """Return how ranks start: CUDA does not work in processes that were forked from one that has used it."""
        return "spawn" if self.on_gpus else "forkserver"

    def too_few(self, ranks: int) -> str | None:
        """Return why a job cannot run on this many ranks, or None."""
        if not self.on_gpus or ranks <= self.gpus:
            return None
        return f"{TOO_FEW}: {ranks} ranks, {self.gpus} GPU{'s' * (self.gpus > 1)}"

    def __str__(self) -> str:
        place = f"{self.gpus} GPU{'s' * (self.gpus > 1)}" if self.on_gpus else "the CPU"
        return f"{place}, {self.backend}, {self.spec} layer spec"


def choose(environment: Mapping[str, str], gpus: int, has_te: bool) -> Machine:
    """Return where the tests run.

    Args:
        environment: the environment variables.
        gpus: number of GPUs that torch can use.
        has_te: whether Transformer Engine can be imported.

    Raises:
        DeviceError: If a variable has an unknown value or names what is not there.
    """
    device = environment.get(DEVICE_VARIABLE) or (CUDA if gpus else CPU)
    if device not in (CPU, CUDA):
        raise DeviceError(f"{DEVICE_VARIABLE} is 'cpu' or 'cuda', got {device!r}")
    if device == CUDA and not gpus:
        raise DeviceError(f"{DEVICE_VARIABLE}=cuda, but torch finds no GPU; unset it or use a build of torch for CUDA")
    spec = environment.get(SPEC_VARIABLE) or (TE if device == CUDA and has_te else LOCAL)
    if spec not in SPECS:
        raise DeviceError(f"{SPEC_VARIABLE} is 'te' or 'local', got {spec!r}")
    if spec == TE and not has_te:
        raise DeviceError(
            f"{SPEC_VARIABLE}=te, but Transformer Engine cannot be imported; install it, or use `make test-te`"
        )
    return Machine(device, gpus if device == CUDA else 0, spec)


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Hide the GPUs if the environment asks for the CPU, and set what CUDA reads when it starts.

    Call it before CUDA is used. Processes that are started later inherit the variables.
    """
    if environment.get(DEVICE_VARIABLE) == CPU:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    for name, value in _CUDA_ENVIRONMENT.items():
        environment.setdefault(name, value)


@functools.cache
def machine() -> Machine:
    """Return where this process and its ranks run."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return choose(os.environ, gpus, importlib.util.find_spec("transformer_engine") is not None)


def device():
    """Return the device for tensors that a job passes to a model."""
    import torch

    return torch.device(machine().device)


def place(*tensors):
    """Return tensors on the device of the models; on the CPU they are the same objects.

    Args:
        *tensors: tensors of any shape, or None.

    Returns:
        One tensor, or a list of several.
    """
    moved = [None if tensor is None else tensor.to(device()) for tensor in tensors]
    return moved[0] if len(moved) == 1 else moved


def on_host(value: Any) -> Any:
    """Return tensors on the CPU, to compare them with those of the CPU; containers are copied, the rest is kept."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().cpu() if value.is_cuda else value
    if isinstance(value, dict):
        return type(value)({key: on_host(one) for key, one in value.items()})
    if type(value) in (list, tuple, set):
        return type(value)(map(on_host, value))
    return value


def layer_spec(name: str | None = None):
    """Return NeMo's layer spec for a name of `SPECS`, by default for the one that the tests use."""
    from nemo.collections.llm.gpt.model import base

    return getattr(base, SPECS[name or machine().spec])


def start_rank(rank: int) -> None:
    """Set a rank up before NeMo is imported: the CPU backend, or a GPU of its own and operations that repeat."""
    if not machine().on_gpus:
        from nemo_modelopt_dropin import cpu_backend

        cpu_backend.enable()
        return
    import warnings

    import torch

    hold_gpu(rank)
    # Tests compare a resumed run with one in one go. Where torch has no deterministic kernel it warns and continues.
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")


def hold_gpu(number: int) -> None:
    """Make a GPU the current one of this rank."""
    if machine().on_gpus:
        import torch

        torch.cuda.set_device(number)


def release() -> None:
    """Wait for the GPU and return its unused memory, between two jobs of a rank."""
    if machine().on_gpus:
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def other_device(item: Any) -> str | None:
    """Return the marker, ``cpu`` or ``gpu``, of a test that the device of the tests cannot run, or None."""
    name = "cpu" if machine().on_gpus else "gpu"
    return name if hasattr(item, "get_closest_marker") and item.get_closest_marker(name) else None


def select(items: Sequence[Any]) -> tuple[list, list]:
    """Return the tests that run on the device of the tests, and the others."""
    return [item for item in items if not other_device(item)], [item for item in items if other_device(item)]


def closing_lines(skipped: Sequence[str], deselected: Sequence[str | None]) -> list[str]:
    """Return the lines that end a test run: where it ran, and how many tests that leaves out.

    Args:
        skipped: the reasons of skipped tests.
        deselected: the result of `other_device` for each deselected test.
    """
    lines = [f"ran on {machine()}"]
    for marker, what in (("cpu", "show something that only a CPU can"), ("gpu", "need a GPU")):
        if count := sum(name == marker for name in deselected):
            lines.append(f"{count} tests deselected, marked {marker}: they {what}")
    if count := sum(TOO_FEW in reason for reason in skipped):
        lines.append(f"{count} tests skipped: {TOO_FEW} ({machine().gpus})")
    return lines


def command(script: str | Path, arguments: Sequence[Any] = (), ranks: int = 1) -> list[str]:
    """Return the command line that runs a script of ours on the device of the tests.

    On the CPU a script starts its ranks itself; on GPUs torchrun starts them. Skips the test if there are too few GPUs.

    Args:
        script: a path, or the name of a script.
        arguments: arguments of the script, without ``--cpu`` and ``--devices``.
        ranks: number of ranks.
    """
    need(ranks)
    path = str(script) if str(script).endswith(".py") else str(_ROOT / "scripts" / f"{script}.py")
    words = [path, *map(str, arguments), *flags(ranks)]
    if ranks > 1 and machine().on_gpus:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *words]
    return [sys.executable, *words]


def flags(ranks: int = 1) -> list[str]:
    """Return the flags of a script of ours for the device and the ranks: none on one GPU."""
    found = [] if machine().on_gpus else ["--cpu"]
    return found + (["--devices", str(ranks)] if ranks > 1 else [])


def need(ranks: int) -> None:
    """Skip the test if it needs more ranks than there are GPUs."""
    reason = machine().too_few(ranks)
    if reason:
        import pytest

        pytest.skip(reason)


_ROOT = Path(__file__).resolve().parents[2]

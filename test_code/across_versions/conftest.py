"""Fixtures of the tests across versions: processes on other versions, and what each of them has written."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from test_code.across_versions import jobs

ROOT = Path(__file__).resolve().parents[2]
# By modelopt: the row of scripts/test_compat.py, None for the default. The first has an older NeMo and Megatron, too,
# which read no checkpoints of later ones.
OLDEST = "0.37-nemo-2.5"
ROWS = {
    OLDEST: "nemo-2.5.3-modelopt-0.37.0",
    "0.37": "modelopt-0.37.0",
    "0.43": None,
    "0.44": "modelopt-0.44.0",
    "0.47": "modelopt-0.47.0",
}
# What is quantized: family and algorithm.
KINDS = {
    "fp8": ("llama-3.2", "fp8"),
    "int8_sq": ("llama-3.2", "int8_sq"),
    "int4_awq": ("llama-3.2", "int4_awq"),
    "w4a8_awq": ("llama-3.2", "w4a8_awq"),
    "nvfp4": ("llama-3.2", "nvfp4"),
    "mixture": ("llama-3.2", jobs.ATTENTION_AND_MLP),
    "experts": ("mixtral", "int4_awq"),
    "tiny": ("tiny", "int8_sq"),
}
# modelopt 0.37 cannot read a KV cache's quantizers, so its readers get checkpoints without them.
NO_CACHE = {"enable_kv_cache": False}


def _script():
    spec = importlib.util.spec_from_file_location("test_compat_script", ROOT / "scripts" / "test_compat.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Callable[..., list]:
    """Return a function that runs calls of `jobs` on a version, in one process or on ``ranks`` of them."""
    script, folder = _script(), tmp_path_factory.mktemp("calls")

    def run(version: str, calls: list[tuple[str, dict[str, Any]]], ranks: int = 1) -> list:
        row = ROWS[version]
        path = script.install(row) if row else ROOT
        env = {**script.environment(path, os.environ), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        number = len(list(folder.glob("*.calls")))
        given, answers = folder / f"{version}-{number}.calls", folder / f"{version}-{number}.answers"
        given.write_bytes(pickle.dumps(calls))
        launch = ["torch.distributed.run", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
        command = [sys.executable, "-m", *launch, jobs.__name__, str(given), str(answers)]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{version}: {done.stdout[-3000:]}{done.stderr[-6000:]}"
        return pickle.loads(answers.read_bytes())

    return run


def _side_by_side(function: Callable[[str], Any], versions: list[str]) -> dict[str, Any]:
    """Call a function with each version, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(versions, pool.map(function, versions), strict=True))


@pytest.fixture(scope="session")
def sources(run, tmp_path_factory) -> dict[str, str]:
    """Return the checkpoint of each family, written on the oldest versions."""
    families = sorted({family for family, _ in KINDS.values()})
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in families}
    calls = [("imported", {"family": name, "folder": folder}) for name, folder in folders.items()]
    return dict(zip(families, run(OLDEST, calls), strict=True))


@pytest.fixture(scope="session")
def written(run, sources, tmp_path_factory) -> dict[str, dict[str, tuple[str, dict]]]:
    """Return by version and kind the checkpoint that a version wrote, and what it is in that version."""
    folder = tmp_path_factory.mktemp("written")

    def write(version: str) -> dict[str, tuple[str, dict]]:
        targets = {kind: str(folder / f"{kind}-{version}") for kind in KINDS}
        calls = []
        for kind, (family, algorithm) in KINDS.items():
            cache = {} if kind == "fp8" else NO_CACHE
            calls.append(
                ("quantized", {"source": sources[family], "target": targets[kind], "algorithm": algorithm, **cache})
            )
        return {kind: (targets[kind], answer) for kind, answer in zip(KINDS, run(version, calls), strict=True)}

    return _side_by_side(write, list(ROWS))


@pytest.fixture(scope="session")
def read(run, written) -> dict[str, dict[tuple[str, str], Any]]:
    """Return by version what it reads of the others' checkpoints, by writer and kind."""

    def read(version: str) -> dict[tuple[str, str], Any]:
        wanted = [(writer, kind) for writer in ROWS if writer != version for kind in KINDS]
        calls = [("restored", {"path": written[writer][kind][0]}) for writer, kind in wanted]
        return dict(zip(wanted, run(version, calls), strict=True))

    return _side_by_side(read, [version for version in ROWS if version != OLDEST])

"""A full disk and a closed screen end a command with one sentence."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from nemo_modelopt_cli.process import entry

ROOT = Path(__file__).resolve().parents[2]


# --- a full disk ------------------------------------------------------------------------------------------------------


def _torch(path):
    import torch

    torch.save({"weight": torch.ones(1 << 20)}, path)


def _safetensors(path):
    import torch
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(1 << 20)}, path)


def _distributed(path):
    import torch
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        dcp.save({"weight": torch.ones(1 << 20)}, checkpoint_id=f"{path}.folder", no_dist=True)


def _tensorstore(path):
    import numpy as np
    import tensorstore as ts

    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}.zarr"}}
    store = ts.open(spec, create=True, dtype=ts.float32, shape=[1 << 20]).result()
    store.write(np.random.default_rng(0).random(1 << 20, dtype=np.float32)).result()


def _python(path):
    with open(path, "wb") as file:
        file.write(bytes(4 << 20))


WRITERS = [_python, _torch, _safetensors, _distributed, _tensorstore]


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_over_the_limit_is_reported_as_such(write, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(BaseException, match=r"(?s).") as caught:
            write(tmp_path / "file")
        found = entry.storage_problem(caught.value, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found is not None and found.startswith("a file is larger than the file system or the limit (ulimit -f)")


def test_a_full_disk_is_reported_as_such():
    with pytest.raises(OSError, match="No space left on device") as caught:
        _python("/dev/full")
    assert entry.storage_problem(caught.value, "/dev/full").startswith("the disk is full: /dev/full. Free some space")


@pytest.mark.parametrize("write", WRITERS)
def test_a_small_disk_that_fills_up(write, small_disk):
    with pytest.raises(BaseException, match=r"(?s).") as caught:
        write(small_disk / "file")
    assert entry.storage_problem(caught.value, small_disk).startswith(f"the disk is full: {small_disk}")


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "Permission denied"), RuntimeError("file write failed"), ValueError("x")]
)
def test_other_errors_are_no_full_disk(error, tmp_path):
    assert entry.storage_problem(error, tmp_path) is None


def test_the_cause_of_an_error_counts(tmp_path):
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "weights.bin")
        except OSError as cause:
            raise RuntimeError("saving failed") from cause
    except RuntimeError as error:
        assert entry.storage_problem(error, tmp_path).startswith("the disk is full: weights.bin.")


# --- a closed screen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["compress", "distill", "prune", "ptq", "demo"])
def test_a_reader_that_leaves_ends_a_script_quietly(script):
    command = f"{sys.executable} {ROOT / 'scripts' / script}.py --help | true; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert found.stderr == ""
    assert found.stdout.strip() in ("0", str(entry.CLOSED_SCREEN))


def test_a_screen_that_is_closed_while_a_rank_works(tmp_path):
    code = """
        import sys, time
        from pathlib import Path
        from nemo_modelopt_cli.process import entry
        from nemo_modelopt_cli.compress import runner

        def work(out):
            print("noise")
            for _ in range(1000):
                out.write("a line\\n")
                time.sleep(0.01)

        sys.exit(entry.run(lambda: runner.guarded(work, Path(sys.argv[1]), "", output=Path())))
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(code))
    command = f"{sys.executable} {tmp_path}/script.py {tmp_path}/log 2>&1 | head -n 2; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, env=environment)
    assert (found.stdout.splitlines(), found.stderr) == (["a line", "a line", str(entry.CLOSED_SCREEN)], "")
    assert "Traceback" not in (tmp_path / "log").read_text()

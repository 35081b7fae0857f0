"""Command lines and the files that they name, for the tests of the scripts."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

MODULES = {
    **{name: f"nemo_modelopt_cli.{name}" for name in ("ptq", "prune", "distill", "demo")},
    "compress": "nemo_modelopt_cli.compress.command",
}
LLAMA = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 128,
    "gated_linear_unit": True,
    "normalization": "RMSNorm",
}
IMPORTANCE = "--restore_path model --save_path out --text text.jsonl --seq_length 8 --cpu --target_ffn_hidden_size 16"
COMPRESSION = "--teacher model --train-text text.jsonl --heldout-text heldout.jsonl"
COMPRESS = f"{COMPRESSION} --target-num-layers 1 --distill-lr 1e-3"
RUNS = {
    "ptq": "-nc model -calib_ds text.jsonl --tp 2 --cpu --sq_alpha 1e-1 -algo int8 --disable_kv_cache -out here/q",
    "prune": "--restore_path model --save_path here/p --text text.jsonl --seq_length 8 --target_num_layers 2 "
    "--pp 2 --cpu",
    "distill": "--name n --log_dir logs --model_path model --teacher_path teacher --text text.jsonl --seq_length 8 "
    "--max_steps 2 --gbs 4 --mbs 2 --lr 1e-5 --tp 2 --cpu",
}


@contextlib.contextmanager
def listening(pid: int, found: set[str]) -> Iterator[None]:
    """Collect the addresses on which a process and its children listen inside the context."""
    import psutil

    done = threading.Event()
    process = psutil.Process(pid)

    def watch() -> None:
        while not done.wait(0.2):
            with contextlib.suppress(psutil.Error):
                for one in (process, *process.children(recursive=True)):
                    listening = (c for c in one.net_connections("tcp") if c.status == psutil.CONN_LISTEN)
                    found.update(c.laddr.ip for c in listening)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def watched(command: list[str], timeout: float, **options) -> tuple[subprocess.CompletedProcess, set[str]]:
    """Run a command; return what came of it, and the addresses on which it and its children listened."""
    found: set[str] = set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            with listening(process.pid, found):
                out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err), found


def script_of(name: str) -> ModuleType:
    """Return the module of a command."""
    return importlib.import_module(MODULES[name])


def shell(folder: Path) -> Path:
    """Make the files that identify a checkpoint, of an older kind whose shards are not checked; they hold nothing."""
    (folder / "context").mkdir(parents=True)
    (folder / "context" / "io.json").write_text("{}")
    (folder / "weights").mkdir()
    (folder / "weights" / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    return folder


def inputs(folder: Path) -> dict[str, str]:
    """Make what the command lines name: folders that look like checkpoints, and a text."""
    for name in ("model", "teacher"):
        shell(folder / name)
    (folder / "text.jsonl").write_text('{"text": "a"}\n')
    (folder / "heldout.jsonl").write_text('{"text": "b"}\n')
    return {name: str(folder / name) for name in ("model", "teacher", "text.jsonl", "heldout.jsonl")}


def checkpoint(folder: Path, **changed) -> Path:
    """Write the configuration of a tiny Llama, all that sizes are read from."""
    import yaml

    shell(folder)
    content = {"_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel", "config": {**LLAMA, **changed}}
    (folder / "context" / "model.yaml").write_text(yaml.safe_dump(content))
    return folder

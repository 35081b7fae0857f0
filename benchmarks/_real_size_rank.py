"""Run one step of ``benchmarks/real_size.py`` in this process, and measure time and memory of its phases.

    python -m benchmarks._real_size_rank STEP FOLDER RESULT.json

Memory is anonymous memory (``RssAnon``): pages of mapped files can be dropped at any time. It is sampled, because the
kernel's own peak includes mapped files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_INTERVAL = 0.02
# Rows of text that calibrate or measure importance, eight in a micro-batch; fewer take less time and the same memory.
ROWS, LENGTH = int(os.environ.get("REAL_SIZE_ROWS", "32")), 256


def _memory(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(name + ":"))


class Meter:
    """Measure the phases of a step: seconds on the clock and of the CPU, and the peak of the memory.

    Attributes:
        phases: Figures by the name of the phase. A phase inside another one does not count to the outer one.
    """

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, float]] = {}
        self._stack = ["other"]
        self._started = time.perf_counter(), time.process_time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._book()
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL):
            row = self._row(self._stack[-1])
            row["peak"] = max(row["peak"], _memory("RssAnon"))

    def _row(self, name: str) -> dict[str, float]:
        return self.phases.setdefault(name, {"seconds": 0.0, "cpu": 0.0, "peak": 0.0})

    def _book(self) -> None:
        now = time.perf_counter(), time.process_time()
        row = self._row(self._stack[-1])
        row["seconds"] += now[0] - self._started[0]
        row["cpu"] += now[1] - self._started[1]
        self._started = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the context to a phase."""
        self._book()
        self._stack.append(name)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def wrap(self, owner: Any, function: str, name: str) -> None:
        """Count the calls of a function to a phase."""
        original = getattr(owner, function)

        def timed(*args, **kwargs):
            with self.phase(name):
                return original(*args, **kwargs)

        setattr(owner, function, timed)


# --- steps ------------------------------------------------------------------------------------------------------------


def import_(folder: Path, meter: Meter, target: str = "nemo") -> None:
    """Import the Hugging Face checkpoint by NeMo."""
    from nemo.collections import llm

    model = llm.LlamaModel(llm.Llama32Config1B())
    llm.import_ckpt(model, f"hf://{folder / 'hf'}", output_path=folder / target, overwrite=True)


def _ptq(algorithm: str) -> Callable[[Path, Meter], None]:
    def run(folder: Path, meter: Meter) -> None:
        from nemo.collections import llm
        from nemo.collections.llm.modelopt import model_utils
        from nemo.collections.llm.modelopt.quantization import comparison, layer_errors
        from nemo.collections.llm.modelopt.quantization import quantizer as module
        from nemo.collections.llm.modelopt.quantization.calibration import steps
        from nemo.collections.llm.modelopt.quantization.export import hf_files, hf_shards, hf_verify

        meter.wrap(llm.api, "setup_trainer_and_restore_model_with_modelopt_spec", "load")
        meter.wrap(steps, "calibrate", "calibrate")
        meter.wrap(comparison, "hidden_states", "compare")
        meter.wrap(comparison, "evaluate", "compare")
        meter.wrap(layer_errors, "table", "layer errors")
        meter.wrap(module.Quantizer, "export", "export")
        meter.wrap(hf_shards.Writer, "write", "write weights")
        meter.wrap(hf_files, "verify", "check files")
        meter.wrap(hf_verify, "check_logits", "check logits")
        assert model_utils
        llm.ptq(
            str(folder / "nemo"),
            module.ExportConfig(path=str(folder / algorithm), export_format="hf"),
            devices=1,
            quantization_config=module.QuantizationConfig(
                algorithm=algorithm,
                calibration_dataset=str(folder / "text.jsonl"),
                calibration_dataset_size=ROWS,
                calibration_batch_size=8,
                calibration_seq_len=LENGTH,
            ),
        )

    return run


def _prune(kind: str) -> Callable[[Path, Meter], None]:
    def run(folder: Path, meter: Meter) -> None:
        from nemo.collections import llm
        from nemo.collections.llm.modelopt import PruningConfig
        from nemo.collections.llm.modelopt.prune import pruner
        from test_code.support import tiny

        sizes = json.loads((folder / "sizes.json").read_text())
        layers = sizes["num_hidden_layers"]
        kept = round(0.7 * layers)
        settings: dict[str, Any] = {"drop_layers": list(range(layers - (layers - kept), layers))}
        if kind == "width":
            settings = {"target_ffn_hidden_size": _smaller_ffn(sizes)}
        meter.wrap(llm.api, "setup_trainer_and_restore_model_with_modelopt_spec", "load")
        meter.wrap(pruner, "prune_language_model", "prune")
        meter.wrap(llm.api, "prune_language_model", "prune")
        meter.wrap(llm.api, "save_pruned_model", "save")
        data = tiny.data(global_batch_size=8, micro_batch_size=8, seq_length=LENGTH, samples=ROWS)
        llm.prune(
            nemo_checkpoint=str(folder / "nemo"),
            save_path=str(folder / kind),
            pruning_config=PruningConfig(**settings),
            num_train_samples=ROWS,
            data=data if kind == "width" else None,
        )

    return run


def _smaller_ffn(sizes: dict[str, int]) -> int:
    """Return the size of the MLP with which a model has 70 % of its parameters, rounded to 64."""
    per_unit = 3 * sizes["hidden_size"] * sizes["num_hidden_layers"]
    return round((sizes["intermediate_size"] - 0.3 * sizes["parameters"] / per_unit) / 64) * 64


def distill(folder: Path, meter: Meter) -> None:
    """Distill the pruned checkpoint from the original for two steps."""
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.llm.modelopt import DistillationGPTModel
    from test_code.support import tiny

    meter.wrap(DistillationGPTModel, "training_step", "steps")
    llm.distill(
        student_model_path=str(folder / "drop_layers"),
        teacher_model_path=str(folder / "nemo"),
        data=tiny.data(global_batch_size=2, micro_batch_size=1, seq_length=LENGTH),
        trainer=tiny.trainer(max_steps=2),
        log=nl.NeMoLogger(log_dir=str(folder / "logs"), use_datetime_version=False, ckpt=None),
        optim=tiny.optim(),
    )


def import_stock(folder: Path, meter: Meter) -> None:
    """Import the checkpoint to a folder of its own; see `_as_stock`."""
    import_(folder, meter, "nemo_stock")


def _as_stock() -> None:
    """Leave out the patches that change how NeMo imports, and what this project made faster since."""
    from nemo_modelopt_dropin import cpu_backend

    left_out = {
        "patch_converters", "patch_tokenizer_files", "patch_extended_modules", "patch_gemma_layers", "patch_importers",
        "patch_exporters", "patch_weight_initialization", "patch_checkpoint_results", "patch_checkpoint_reading",
    }  # fmt: skip
    cpu_backend.PATCHES = tuple(patch for patch in cpu_backend.PATCHES if patch.__name__ not in left_out)


STEPS: dict[str, Callable[[Path, Meter], None]] = {
    "import": import_,
    "import_stock": import_stock,
    "fp8": _ptq("fp8"),
    "int4_awq": _ptq("int4_awq"),
    "drop_layers": _prune("drop_layers"),
    "width": _prune("width"),
    "distill": distill,
}


def _single_rank() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", GROUP_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="benchmark",
    )  # fmt: skip


def main() -> int:
    """Run one step and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    args = parser.parse_args()
    _single_rank()
    from nemo_modelopt_dropin import cpu_backend

    if args.step == "import_stock":
        _as_stock()
    cpu_backend.enable()
    before = _memory("RssAnon")
    with Meter() as meter:
        STEPS[args.step](args.folder, meter)
    found = {"phases": meter.phases, "imports": before, "kernel peak": _memory("VmHWM")}
    args.result.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

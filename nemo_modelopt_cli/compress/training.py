"""Trainers, training runs and checkpoints of the compression job, over NeMo's public API."""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from megatron.core import num_microbatches_calculator, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler
from nemo.utils import AppState
from nemo.utils.metaclasses import Singleton
from tqdm import tqdm

from nemo import lightning as nl
from nemo_modelopt_cli import intermediate
from nemo_modelopt_cli.compress.settings import Layout, Training
from nemo_modelopt_cli.process import launch, rendezvous
from nemo_modelopt_dropin import ranks
from nemo_modelopt_dropin.console import screen

# Address of the store of this job's ranks, and how often they met: variables, as NeMo's trainers use variables, too.
_STORE, _MEETINGS = "NEMO_MODELOPT_STORE", "NEMO_MODELOPT_MEETINGS"
_PATIENCE = datetime.timedelta(hours=1)


class StoreRanks:
    """Send rank zero's decisions to every rank.

    This uses a store and not a process group, because steps end with `release`, which destroys all groups. The store is
    torchrun's if torchrun started the ranks, else rank zero's.
    """

    def __init__(self):
        self.rank, self.count = ranks.number(), 0
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        os.environ[_STORE] = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self.store = _store(is_master=self.rank == 0 and not hosted)
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        _meet_elsewhere()

    def broadcast(self, value: Any) -> Any:
        """Return rank zero's value, which JSON must be able to hold, on every rank once all ranks have called this."""
        key = f"decision/{self.count}"
        self.count += 1
        if self.rank == 0:
            # No pickle: anyone who can reach the store's port could run code with one.
            self.store.set(key, json.dumps(value).encode())
        # A step in which only rank zero works may take longer than any patience; a lost store ends this.
        while not self.store.check([key]):
            time.sleep(0.05)
        found = json.loads(self.store.get(key))
        self.store.add(f"{key}/seen", 1)
        while self.store.add(f"{key}/seen", 0) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.01)
        return found

    def leave(self) -> None:
        """Say that this rank no longer needs the store; rank zero, whose process may host it, waits for all ranks."""
        self.store.add("left", 1)
        while self.rank == 0 and self.store.add("left", 0) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.01)


def release() -> None:
    """Remove the state that NeMo leaves in this process, so that the next step may use another layout.

    NeMo builds Megatron's groups only if it initialises ``torch.distributed`` itself, and keeps the layout of a process
    in a singleton; so both are removed. All ranks must call this.
    """
    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    tensor_parallel.get_cuda_rng_tracker().reset()
    Singleton._Singleton__instances.pop(AppState, None)
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    _meet_elsewhere()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _store(is_master: bool = False) -> torch.distributed.Store:
    """Return a connection to the job's store."""
    address, _, port = os.environ[_STORE].rpartition(":")
    store = rendezvous.store(
        address,
        int(port),
        int(os.environ["WORLD_SIZE"]),
        is_master=is_master,
        timeout=_PATIENCE,
        wait_for_workers=False,
    )
    return torch.distributed.PrefixStore("compress", store)


def _meet_elsewhere() -> None:
    """Choose a new port for the next process group, on rank zero, because the last one may leave connections."""
    if not ranks.is_rank():
        os.environ.pop("MASTER_PORT", None)
    elif _STORE not in os.environ:
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    else:
        count = os.environ[_MEETINGS] = str(int(os.environ.get(_MEETINGS, "0")) + 1)
        store = _store()
        if ranks.number() == 0:
            host = "127.0.0.1" if rendezvous.on_one_node(os.environ) else ""
            store.set(f"port/{count}", str(launch.free_port(host)))
        os.environ["MASTER_PORT"] = store.get(f"port/{count}").decode()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hide the other ranks from NeMo, for parts of it that build a one-device trainer themselves."""
    names = [name for name in os.environ if ranks.is_launchers(name)]
    kept = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        release()
        os.environ.update(kept)


def strategy(layout: Layout, **options) -> nl.MegatronStrategy:
    """Return the Megatron strategy of a layout; ``options`` are MegatronStrategy's own."""
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "sequence_parallel": False,
        "pipeline_dtype": torch.float32 if layout.cpu else torch.bfloat16,
        "ckpt_async_save": False,
        "replace_progress_bar": False,
        "ddp": DistributedDataParallelConfig(use_distributed_optimizer=not layout.cpu),
    }
    return nl.MegatronStrategy(**{**settings, **options})


def trainer(layout: Layout, strategy_options: dict[str, Any] | None = None, **options) -> nl.Trainer:
    """Return a trainer that by default shows and writes nothing: fp32 on CPU ranks, bf16 on GPUs."""
    settings: dict[str, Any] = {
        "accelerator": "cpu" if layout.cpu else "gpu",
        "devices": layout.devices,
        "num_nodes": layout.num_nodes,
        "strategy": strategy(layout, **(strategy_options or {})),
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }
    # Needed for fp32, too: a checkpoint sets the type in which it was imported, mostly bf16.
    precision, dtype = ("32", torch.float32) if layout.cpu else ("bf16-mixed", torch.bfloat16)
    settings["plugins"] = nl.MegatronMixedPrecision(precision=precision, params_dtype=dtype)
    return nl.Trainer(**{**settings, **options})


def optimizer(training: Training, layout: Layout) -> nl.MegatronOptimizerModule:
    """Return Adam with linear warm-up and cosine decay."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta2=0.95,
        clip_grad=training.clip_grad,
        use_distributed_optimizer=not layout.cpu,
        bf16=not layout.cpu,
        params_dtype=torch.float32 if layout.cpu else torch.bfloat16,
    )
    schedule = CosineAnnealingScheduler(
        max_steps=training.steps,
        warmup_steps=training.warmup_steps,
        constant_steps=0,
        min_lr=training.min_lr,
    )
    return nl.MegatronOptimizerModule(config, schedule)


# Folder of a training's intermediate checkpoints, below the folder of its step.
STEPS = "steps"


class Keeper(Checkpoint):
    """Save intermediate checkpoints and the final one, and find the one to resume from.

    A subclass of Lightning's ``Checkpoint`` so that NeMo's ``AutoResume`` finds it; NeMo's own ModelCheckpoint marks a
    checkpoint whose saving was killed as unfinished and then raises an error until a person removes it.

    Args:
        folder: folder of the step.
        save_every: steps between intermediate checkpoints; None saves every few minutes, 0 never.
    """

    def __init__(self, folder: Path, save_every: int | None = None):
        self.folder, self.save_every = Path(folder), save_every
        self.steps = intermediate.Steps(self.folder / STEPS)
        self.saver: intermediate.Saver | None = None
        self.last_model_path = ""

    def __getstate__(self):
        """Leave the running schedule out of copies."""
        return {**self.__dict__, "saver": None}

    def latest(self) -> Path | None:
        """Return the newest whole intermediate checkpoint."""
        return self.steps.latest()

    def on_train_start(self, trainer, pl_module):
        """Start the clock."""
        self.saver = intermediate.Saver(self.steps, trainer.global_step, every=self.save_every)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Save if a checkpoint is due, and remove the one before."""
        if self.saver is not None:
            self.saver.between_steps(trainer)

    def on_train_end(self, trainer, pl_module):
        """Save the weights while ``fit`` still runs, so that keys start with ``module.`` as in NeMo's checkpoints."""
        intermediate.save_checkpoint(trainer, self.folder / "checkpoint", weights_only=True)


class Curve(pl.Callback):
    """Show a progress bar on rank zero and append the losses of every step to ``losses.jsonl``."""

    def __init__(self, folder: Path, title: str):
        self.path = Path(folder) / "losses.jsonl"
        self.title = title
        # Not an argument: NeMo copies the arguments of a trainer's callbacks, and a stream cannot be copied.
        self.out: TextIO | None = None
        self.points: list[dict[str, float]] = []
        self.bar: tqdm | None = None

    def __getstate__(self):
        """Leave the stream and the bar out of copies."""
        return {**self.__dict__, "out": None, "bar": None}

    def on_train_start(self, trainer, pl_module):
        """Discard the losses after the checkpoint that is resumed from, and open the bar."""
        self.points = [point for point in read_curve(self.path) if point["step"] <= trainer.global_step]
        if ranks.number() == 0:
            with open(self.path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(point) + "\n" for point in self.points)
            stream = {"file": self.out} if self.out else {}
            self.bar = screen.bar(
                total=trainer.max_steps, initial=trainer.global_step, desc=self.title, unit="step", **stream
            )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Append the training loss of the step."""
        loss = trainer.callback_metrics.get("reduced_train_loss")
        if ranks.number() != 0 or loss is None:
            return
        self._add({"step": trainer.global_step, "loss": round(float(loss), 6)})
        if self.bar is not None:
            self.bar.update(trainer.global_step - self.bar.n)
            self.bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)

    def on_validation_end(self, trainer, pl_module):
        """Append the held-out loss."""
        loss = trainer.callback_metrics.get("val_loss")
        if ranks.number() == 0 and loss is not None and not trainer.sanity_checking:
            self._add({"step": trainer.global_step, "heldout": round(float(loss), 6)})

    def on_train_end(self, trainer, pl_module):
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer, pl_module, exception):
        """Close the bar."""
        self.on_train_end(trainer, pl_module)

    def _add(self, point: dict[str, float]) -> None:
        self.points.append(point)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")


def read_curve(path: Path) -> list[dict[str, float]]:
    """Return the points of a ``losses.jsonl``, without a last line that a kill cut off and without repetitions.

    A training that resumes right before a validation may validate the same step again.
    """
    points: dict[tuple, dict[str, float]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                point = json.loads(line)
            except ValueError:
                continue
            points[(point["step"], *sorted(point))] = point
    return list(points.values())

"""Held-out loss, parameters and sizes of a NeMo checkpoint, measured in the same way for every job step.

Source of the pipeline-parallel forward: ``megatron.core.pipeline_parallel.schedules``, as training uses it.
"""

from __future__ import annotations

import contextlib
import platform
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from nemo.collections.llm.inference.base import _setup_trainer_and_restore_model
from nemo.lightning.ckpt_utils import ckpt_to_context_subdir
from nemo.utils.model_utils import unwrap_model

from nemo import lightning as nl
from nemo.collections.llm.modelopt import _heldout, _parallel
from nemo.collections.llm.modelopt.quantization import comparison, layer_errors
from nemo_modelopt_cli.compress import training
from nemo_modelopt_cli.compress.settings import Layout
from nemo_modelopt_cli.tokens import Windows
from nemo_modelopt_dropin.preflight import model_sizes

# The speed is that of the fastest pass; passes are repeated until they took this long in total, or this often.
_TIMED_S, _TIMED_PASSES = 1.0, 5
_LAYER = re.compile(r"layers\.(\d+)\.(?:.*\.)?(\w+)$")


def load(checkpoint: str | Path, layout: Layout) -> torch.nn.Module:
    """Return the Megatron-Core model of a NeMo checkpoint on this rank, quantizers included, ready for inference."""
    options = {"ddp": "pytorch", "setup_optimizers": False}
    options |= {"ckpt_load_optimizer": False, "ckpt_parallel_save_optim": False}
    run = training.trainer(layout, options | model_sizes.unequal_stages(checkpoint, layout.pp))
    model = nl.io.load_context(ckpt_to_context_subdir(checkpoint), subpath="model")
    if hasattr(model, "optim"):
        del model.optim
    _setup_trainer_and_restore_model(Path(checkpoint), run, model)
    core = unwrap_model(model)
    core.eval()
    return core


def heldout_loss(core: torch.nn.Module, ids: np.ndarray, seq_length: int, batch_size: int) -> dict[str, float]:
    """Return the mean next-token loss over consecutive windows of ``ids``, in nats, the same on every rank.

    Args:
        core: a Megatron-Core GPT (this rank's part of it).
        ids: token ids `[n]`; the rest after the last whole window is left out.
        seq_length: tokens a window.
        batch_size: windows a pass and data-parallel rank.

    Returns:
        ``loss``, ``tokens`` (predicted), ``seconds`` and ``tokens_per_second`` of the forward passes.
    """
    batches = _batches(Windows(ids, seq_length), batch_size)
    # The first pass of a process allocates memory and loads kernels, so it is not timed. Short passes are repeated.
    _sums(core, batches[:1])
    times: list[float] = []
    while not times or (sum(times) < _TIMED_S and len(times) < _TIMED_PASSES):
        started = time.perf_counter()
        loss_sum, tokens = _sums(core, batches)
        times.append(_slowest(time.perf_counter() - started))
    seconds = min(times)
    return {
        "loss": loss_sum / tokens,
        "tokens": int(tokens),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def mean_loss(core: torch.nn.Module, ids: np.ndarray, seq_length: int, batch_size: int) -> float:
    """Return the loss of `heldout_loss` from one pass, without its speed, in whatever mode the model is."""
    modes = [(module, module.training) for module in core.modules()]
    core.eval()
    loss_sum, tokens = _sums(core, _batches(Windows(ids, seq_length), batch_size))
    for module, is_training in modes:
        module.training = is_training
    return loss_sum / tokens


def _sums(core: torch.nn.Module, batches: list) -> tuple[float, float]:
    """Return the sum of the losses and the number of tokens of the batches, over all ranks."""
    outputs = _heldout.run_forward(core, batches, _forward_step, lambda batch: tuple(batch["tokens"].shape))
    total = torch.zeros(2, dtype=torch.float64, device=_parallel.device_of(core))
    if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        total += torch.stack([out["sums"] for out in outputs]).sum(0)
    torch.distributed.all_reduce(total)
    loss_sum, tokens = total.tolist()
    return loss_sum, tokens


def _slowest(seconds: float) -> float:
    """Return the longest time of any rank, so that all ranks make the same decision."""
    found = torch.tensor([seconds], dtype=torch.float64)
    found = found.to("cuda") if torch.cuda.is_available() else found
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return float(found)


def _batches(windows: Windows, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Return this data-parallel rank's batches; all ranks get equally many, filled up with windows of weight zero."""
    index, count = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    each = -(-len(windows) // (batch_size * count)) * batch_size
    rows = []
    for i in range(each):
        number = i * count + index
        row = dict(windows[min(number, len(windows) - 1)])
        if number >= len(windows):
            row["loss_mask"] = torch.zeros_like(row["loss_mask"])
        rows.append(row)
    collate = torch.utils.data.default_collate
    return [collate(rows[i : i + batch_size]) for i in range(0, each, batch_size)]


def _forward_step(batches, core):
    """Run one batch; on the last pipeline stage Megatron then asks for the loss, of which we keep sum and count."""
    device = _parallel.device_of(core)
    batch = {name: value.to(device) for name, value in next(batches).items()}
    output = core(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])

    def reduce(loss):
        mask = batch["loss_mask"].double()
        sums = torch.stack([_heldout.weighted_sum(loss, mask), mask.sum()])
        return sums[0] / mask.sum().clamp(min=1), {"sums": sums}

    return output, reduce


def parameters(core: torch.nn.Module) -> dict[str, int]:
    """Return the number of parameters of the whole model, with and without embedding and output layer."""
    own = [(name, parameter.numel()) for name, parameter in _parallel.own_parameters(core)]
    body = sum(number for name, number in own if "embedding" not in name and "output_layer" not in name)
    total, body = map(int, _parallel.model_parallel_sum([sum(number for _, number in own), body]))
    return {"parameters": total, "body_parameters": body}


def weight_errors(core: torch.nn.Module) -> list[dict[str, Any]]:
    """Return for each layer and quantized matrix the relative change of its weights, ``||Q(w) - w|| / ||w||``.

    Args:
        core: this rank's part of a Megatron-Core GPT; all ranks must call this. Without quantizers the list is empty.
    """
    found = []
    for row in layer_errors.table(core, {}):
        match = _LAYER.search(row["layer"])
        if match and "weight_sqnr_db" in row:
            error = 10 ** (-row["weight_sqnr_db"] / 20)
            found.append({"layer": int(match[1]) + 1, "matrix": match[2], "error": error})
    return sorted(found, key=lambda row: (row["layer"], row["matrix"]))


def shape(core: torch.nn.Module) -> dict[str, Any]:
    """Return the sizes that pruning can change."""
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    return {name: getattr(core.config, name) for name in names}


def device_name() -> str:
    """Return the GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure(checkpoint: str | Path, tokens: Path, layout: Layout, seq_length: int, batch_size: int) -> dict[str, Any]:
    """Load a checkpoint and return its held-out loss, speed, parameters, shape, bytes on disk and weight errors."""
    training.release()
    core = load(checkpoint, layout)
    found: dict[str, Any] = {
        f"heldout_{k}": v for k, v in heldout_loss(core, np.load(tokens), seq_length, batch_size).items()
    }
    found |= parameters(core) | {"weight_errors": weight_errors(core)}
    found |= {"shape": shape(core), "bytes": comparison.bytes_on_disk(Path(checkpoint)), "device": device_name()}
    training.release()
    return found

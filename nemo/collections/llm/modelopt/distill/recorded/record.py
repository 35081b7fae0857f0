"""Run a teacher once over the data of a training and record its top-k logits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from nemo.lightning.ckpt_utils import ckpt_to_context_subdir
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero
from nemo.utils.model_utils import unwrap_model

from nemo import lightning as nl
from nemo.collections import llm
from nemo_modelopt_dropin import files
from nemo_modelopt_dropin.console import progress

from ... import _batches, _parallel
from ..._divergence.recorded_topk import top_entries
from ...errors import ModelOptConfigError
from .._config import read_distillation_config
from .._mtp import skip_block
from ..utils import teacher_provider
from . import store

DEFAULT_TOPK = 100


class _TeacherAlone(llm.GPTModel):
    """The teacher as a distillation would load it, without a student."""

    def io_init(self, **kwargs) -> fdl.Config:
        """Return the configuration that NeMo stores for this model: that of a plain one."""
        return fdl.Config(llm.GPTModel, config=kwargs["config"], tokenizer=kwargs["tokenizer"])

    def __init__(self, config: Any, path: str, tokenizer: Any):
        super().__init__(config, None, tokenizer)
        self._path = path

    def configure_model(self):
        if not hasattr(self, "module"):
            self.module = teacher_provider(self.config, self._path, self.tokenizer, self.trainer)


class _Recorder:
    """Write the top-k outputs of the output layer together with the keys of their samples."""

    def __init__(self, writer: store.Writer | None, topk: int, temperature: float):
        """Store the arguments.

        Args:
            writer: None on ranks that write nothing.
            topk: number of entries to record.
            temperature: temperature of the logits.
        """
        self.writer, self.topk, self.temperature = writer, topk, temperature
        self.keys: Any = None
        self.samples = self.vocab_size = 0

    def see(self, batch) -> None:
        """Remember the samples of the micro-batch."""
        self.keys = store.sample_keys(batch)

    def take(self, module: Any, args: tuple, output: Any) -> None:
        """Record the largest logits [s, b, v] that an output layer returns."""
        logits = output[0] if isinstance(output, tuple) else output
        group = parallel_state.get_tensor_model_parallel_group()
        size = torch.distributed.get_world_size(group)
        s, b, v = logits.shape
        record = top_entries(logits.detach().flatten(0, 1), self.topk, self.temperature, group if size > 1 else None)
        self.samples, self.vocab_size = self.samples + b, v * size
        if self.writer is not None:
            self.writer.add(self.keys, *(x.view(s, b, *x.shape[1:]).transpose(0, 1) for x in record))


def dump_teacher_topk(
    teacher_model_path: str | Path,
    output_path: str | Path,
    data: pl.LightningDataModule,
    trainer: nl.Trainer,
    steps: int,
    distillation_config_path: Any = None,
    tokenizer: Any = None,
    data_description: str = "",
) -> Path:
    """Run a teacher over the training data and write its top-k logits, to distill without the teacher.

    ``llm.distill(teacher_model_path=output_path, ...)`` then loads no teacher. The divergence is that of
    ``logit_kl_topk`` at the temperature of the settings.

    Args:
        teacher_model_path: NeMo checkpoint of the teacher.
        output_path: folder to write, which must not exist. It appears when it is complete.
        data: data module; its training loader is read.
        trainer: trainer with a ``MegatronStrategy`` that fits the teacher.
        steps: number of global batches to record.
        distillation_config_path: settings of the distillation: ``logit_kl_topk`` (100 by default) and
            ``logit_kl_temperature``.
        tokenizer: used instead of the checkpoint's.
        data_description: stored in the manifest and shown in errors.

    Returns:
        The folder.

    Raises:
        ModelOptConfigError: If the output exists, a recorded teacher does not support the settings, or the samples
            have different lengths.
    """
    output = Path(output_path)
    settings = read_distillation_config(distillation_config_path)
    _check(output, settings, steps, trainer)
    found: Any = nl.io.load_context(ckpt_to_context_subdir(teacher_model_path), subpath="model")
    model = _TeacherAlone(found.config, str(teacher_model_path), tokenizer or found.tokenizer)
    writes = is_global_rank_zero()
    with files.written(output, files.RECORDED_TEACHER, writes) as folder:
        recorder = _run(model, data, trainer, steps, settings, folder)
        manifests = _parallel.gather_objects(_part_of_manifest(recorder))
        if writes:
            manifest = _whole_manifest(manifests, settings, model, teacher_model_path, data_description)
            shutil.copytree(ckpt_to_context_subdir(teacher_model_path), folder / "context")
            store.write_manifest(folder, manifest)
    if writes:
        logging.info(f"Distillation: {manifest.samples} samples of the teacher are recorded in {output}.")
    torch.distributed.barrier()
    return output


def _check(output: Path, settings: Any, steps: int, trainer: Any) -> None:
    if output.exists():
        raise ModelOptConfigError(f"{str(output)!r} exists; pass a new folder for the recorded teacher.")
    if type(steps) is not int or steps < 1:
        raise ModelOptConfigError(f"steps={steps!r} must be a whole number of at least 1.")
    if settings.intermediate_layer_pairs:
        raise ModelOptConfigError(
            "intermediate_layer_pairs need the teacher's activations, and a recorded teacher holds only logits; remove "
            "them from the settings, or distill with the teacher."
        )
    if settings.logit_layers[1] != "output_layer":
        raise ModelOptConfigError(
            f"Only the outputs of 'output_layer' can be recorded, not those of {settings.logit_layers[1]!r}."
        )
    for name in ("context_parallel_size", "virtual_pipeline_model_parallel_size"):
        if (getattr(trainer.strategy, name, None) or 1) > 1:
            raise ModelOptConfigError(
                f"{name}={getattr(trainer.strategy, name)} is not supported when a teacher is recorded; remove it."
            )


def _run(model: Any, data: Any, trainer: Any, steps: int, settings: Any, folder: Path) -> _Recorder:
    """Run a validation of the teacher on the training loader and record it."""
    recorder = _Recorder(None, settings.logit_kl_topk or DEFAULT_TOPK, settings.logit_kl_temperature)
    limit, start = trainer.limit_val_batches, _AtStart(partial(_begin, recorder, folder))
    microbatches = data.global_batch_size // (data.micro_batch_size * _data_parallel(trainer))
    trainer.limit_val_batches = steps * max(1, microbatches)  # NeMo counts micro-batches here
    trainer.callbacks.append(start)
    shown = progress.validation_shown(trainer, "record teacher")
    own_data = _batches.own_data(data, val_dataloader=data.train_dataloader, tokenizer=model.tokenizer)
    try:
        with _batches.shown_batches(model.config, recorder.see), own_data, shown:
            # Not ``llm.validate``, which creates a folder of logs.
            trainer.validate(model, data, verbose=False)
    finally:
        trainer.limit_val_batches = limit
        trainer.callbacks.remove(start)
    return recorder


class _AtStart(pl.Callback):
    """Call a function when the model and Megatron's groups exist."""

    def __init__(self, begin: Callable[[Any], None]):
        self._begin = begin

    def on_validation_start(self, trainer, pl_module):
        self._begin(unwrap_model(pl_module.module))


def _begin(recorder: _Recorder, folder: Path, core: Any) -> None:
    """Create the folder, and record the output layer on the last stage; one of the ranks that share a sample writes."""
    if is_global_rank_zero():
        (folder / store.FOLDER).mkdir(parents=True)
    torch.distributed.barrier()
    if not parallel_state.is_pipeline_last_stage():
        return
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        rank = parallel_state.get_data_parallel_rank()
        recorder.writer = store.Writer(folder / store.FOLDER, rank)
    skip_block(core)
    core.output_layer.register_forward_hook(recorder.take)


def _data_parallel(trainer: Any) -> int:
    """Return the number of data-parallel ranks before Megatron's groups exist."""
    strategy = trainer.strategy
    model = strategy.tensor_model_parallel_size * strategy.pipeline_model_parallel_size
    return max(1, trainer.world_size // model)


def _part_of_manifest(recorder: _Recorder) -> dict[str, Any]:
    writer = recorder.writer
    if writer is None:
        return {}
    return {
        "shards": writer.shards,
        "largest_entry": writer.largest_entry,
        "dtype": writer.dtype,
        "seq_length": writer.seq_length,
        "topk": writer.topk,
        "samples": recorder.samples,
        "vocab_size": recorder.vocab_size,
    }


def _whole_manifest(parts: list[dict], settings: Any, model: Any, teacher_path: Any, data: str) -> store.Manifest:
    """Return the manifest of the shards of all ranks.

    Raises:
        ModelOptConfigError: If there was no sample.
    """
    written = [part for part in parts if part.get("samples")]
    if not written:
        raise ModelOptConfigError("The training loader returned no batch, so nothing was recorded.")
    shards: dict[str, int] = {}
    for part in written:
        shards |= part["shards"]
    common = {name: written[0][name] for name in ("dtype", "seq_length", "topk", "vocab_size")}
    return store.Manifest(
        **common,
        temperature=settings.logit_kl_temperature,
        largest_entry=max(part["largest_entry"] for part in written),
        samples=sum(part["samples"] for part in written),
        shards=shards,
        teacher=store.checkpoint_digests(teacher_path),
        tokenizer=store.tokenizer_digest(model.tokenizer),
        data=data,
    )

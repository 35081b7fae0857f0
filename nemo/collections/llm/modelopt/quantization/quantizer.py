"""Post-training quantization: the configuration, the Quantizer, and the functions NeMo imports from here.

The steps are: check the settings, read calibration text, measure the original model, insert and calibrate quantizers,
post-process, measure again, report, export. Each lives in its own module; collaborators that the stock module had as
attributes are attributes here too and are looked up when they are used.
"""

from __future__ import annotations

import copy  # noqa: F401
import os  # noqa: F401
import pprint  # noqa: F401
import shutil  # noqa: F401
import sys
import tempfile  # noqa: F401
from dataclasses import dataclass  # noqa: F401
from pathlib import Path
from types import ModuleType
from typing import Any, Optional, Union  # noqa: F401

import datasets
import lightning.pytorch as pl
import torch
from datasets import load_dataset
from megatron.core.inference.common_inference_params import CommonInferenceParams  # noqa: F401
from nemo.collections.llm.inference import MCoreTokenizerWrappper, generate  # noqa: F401
from nemo.collections.llm.utils import barrier, torch_dtype_from_precision  # noqa: F401
from nemo.lightning import Trainer
from nemo.lightning.ckpt_utils import ckpt_to_context_subdir  # noqa: F401
from nemo.lightning.io.api import load_connector_from_trainer_ckpt  # noqa: F401
from nemo.lightning.io.pl import TrainerContext, ckpt_to_weights_subdir  # noqa: F401
from nemo.lightning.megatron_parallel import MegatronParallel
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero
from nemo.utils.model_utils import unwrap_model
from tqdm import tqdm  # noqa: F401
from transformers import PreTrainedTokenizerBase  # noqa: F401

import modelopt.torch.export as mte
import modelopt.torch.opt as mto  # noqa: F401
import modelopt.torch.quantization as mtq
from nemo.collections import llm
from nemo.collections.llm.modelopt import _functions
from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo.collections.llm.modelopt.quantization import checks, comparison, decoders, stand_ins, transformers_models
from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices
from nemo.collections.llm.modelopt.quantization.calibration import batching, fingerprint, inputs, sources, state, steps
from nemo.collections.llm.modelopt.quantization.config import ExportConfig, QuantizationConfig
from nemo.collections.llm.modelopt.quantization.export import support, writers
from nemo.collections.llm.modelopt.quantization.insert import mixed_precision, quantizers
from nemo.collections.llm.modelopt.quantization.quant_cfg_choices import get_quant_cfg_choices
from nemo.collections.llm.modelopt.quantization.utils import load_quant_cfg
from nemo_modelopt_dropin import files

QUANT_CFG_CHOICES = get_quant_cfg_choices()
SUPPORTED_DTYPE = [16, "16", "bf16"]
SUPPORTED_EXPORT_FMT = ["trtllm", "nemo", "hf"]
KV_QUANT_CFG_CHOICES = {"fp8": "FP8_KV_CFG", "nvfp4": "NVFP4_KV_CFG"}
AnyPath = Union[Path, str]  # noqa: UP007


class Quantizer(steps.CalibrationFlow, inputs.InputChecks, state.StateKeeper):
    """Quantizes a NeMo model after training and exports it.

    Attributes:
        report: What the last `quantize` did (losses before and after, relative output error, quantizers of each kind,
            sizes, calibration data), a plain dictionary; empty before and for stand-ins.
    """

    def __init__(self, quantization_config: QuantizationConfig, export_config: ExportConfig):
        """Check the settings.

        Args:
            quantization_config: How to quantize.
            export_config: Where to export to; None when only `quantize` is used.

        Raises:
            EnvironmentError: Without a GPU, unless the CPU backend is enabled and the algorithm needs no CUDA kernel.
            ModelOptConfigError: For a value or combination that cannot work.
        """
        from nemo_modelopt_dropin import cpu_backend

        has_gpu = torch.cuda.is_available()
        if not has_gpu and not cpu_backend.is_enabled():
            raise OSError(
                "GPU is required for the quantization. On a CPU, call nemo_modelopt_dropin.cpu_backend.enable() first."
            )
        self.quantization_config = quantization_config
        self.export_config = export_config
        self.report: dict[str, Any] = {}
        checks.check_read_by_stock(quantization_config, export_config, KV_QUANT_CFG_CHOICES, SUPPORTED_DTYPE)
        planned = {}
        if checks.is_complete(quantization_config):
            checks.check_quantization(quantization_config, KV_QUANT_CFG_CHOICES)
            planned = self._planned_quant_cfgs()
        if getattr(quantization_config, "algorithm", None) == checks.AUTO:
            mixed_precision.check_supported()
        for name, quant_cfg in planned.items():
            if not has_gpu and choices.needs_cuda(quant_cfg):
                raise OSError(f"GPU is required for the quantization with {name}: CUDA kernels.")
        if checks.is_complete(export_config):
            checks.check_export(export_config, SUPPORTED_EXPORT_FMT)
            # Where NeMo can wrap transformers' models, `quantize` checks: modelopt writes those by other means.
            if not transformers_models.exists():
                writers.check_planned(planned, export_config)
        self.torch_dtype = torch_dtype_from_precision("bf16" if export_config is None else export_config.dtype)
        if inputs.made_by_ptq():
            self._check_inputs()

    @staticmethod
    def _setup(model) -> None:
        """Freeze the model; exporters read the vocabulary without padding from its configuration."""
        if transformers_models.is_wrapped(model):
            return
        model.config.vocab_size = model.tokenizer.vocab_size
        model.freeze()

    def _get_decoder_type(self, model, optional: bool = False) -> str | None:
        """Return modelopt's name of the decoder: as configured, or by the class of the model.

        Args:
            model: The model, wrapped or not.
            optional: Return None where it cannot be told.

        Raises:
            ModelOptConfigError: If it cannot be told and is not optional.
        """
        if self.export_config is not None and self.export_config.decoder_type is not None:
            return self.export_config.decoder_type
        return decoders.infer(model, get_modelopt_decoder_type, optional)

    @staticmethod
    def _generate_sample(model) -> None:
        """Let the quantized model continue two prompts and log what it says."""
        quantizers.generate_sample(_collaborators(), model)

    def _planned_quant_cfgs(self) -> dict[str, dict[str, Any]]:
        return checks.planned_quant_cfgs(self.quantization_config, QUANT_CFG_CHOICES, load_quant_cfg)

    def _get_quant_cfg(self, model) -> dict[str, Any]:
        """Return modelopt's quant_cfg for the configured algorithm and the model, a copy of its own."""
        decoder_type, config = self._get_decoder_type(model, optional=True), self.quantization_config
        quant_cfg, with_kv_cache = checks.quant_cfg_for(
            config, decoder_type, QUANT_CFG_CHOICES, KV_QUANT_CFG_CHOICES, load_quant_cfg, mtq
        )
        if with_kv_cache and config.enable_kv_cache is None:
            logging.warning("Enabled KV cache quantization but enable_kv_cache is None in quantization_config")
        elif with_kv_cache is not None:
            logging.info(f"{'Enabled' if with_kv_cache else 'Disabled'} KV cache quantization")
        return quant_cfg

    def quantize(self, model: MegatronParallel, forward_loop=None):
        """Insert quantizers into the model, calibrate them, and compare the result with the original.

        Precision and method come from the algorithm. Without ``forward_loop`` the configured dataset calibrates: every
        data-parallel rank feeds its share and modelopt combines the statistics. Held-out rows of it are then used to
        compare loss and outputs before and after; see the attribute `report`.

        Args:
            model: The ``llm.GPTModel`` (or Mamba model), restored by a trainer.
            forward_loop: Function of the Megatron-Core model that runs calibration data through it.

        Returns:
            The same model, quantized.

        Raises:
            ModelOptConfigError: If the model is of another kind, the data is unusable or the export cannot work.
        """
        algorithm = self.quantization_config.algorithm
        if algorithm is None:
            logging.info("Quantization algorithm set to None, returning the non-quantized model")
            return model

        logging.info(f"Quantizing model to {algorithm}...")
        if stand_ins.is_stand_in(model):
            return stand_ins.quantize(_collaborators(), self, model, forward_loop)
        self._check_inputs()
        _functions.always_put_back()
        decoder_type = self._get_decoder_type(model, optional=True)
        quant_cfg = self._get_quant_cfg(model)
        quant_cfg.setdefault("algorithm", "max")
        kv_option = self.quantization_config.enable_kv_cache
        writers.check_model(model, self.export_config, quant_cfg, self._planned_quant_cfgs(), kv_option)
        self._setup(model)
        core = unwrap_for_modelopt_operations(model)
        if algorithm == checks.AUTO and forward_loop is not None:
            raise ModelOptConfigError('algorithm="auto" needs calibration data, it cannot run with a forward_loop.')
        if not self._begin(core, self._fingerprint(quant_cfg, forward_loop)):
            self._calibrate(model, core, quant_cfg, decoder_type, forward_loop)
            self._keep()
        if is_global_rank_zero():
            mtq.print_quant_summary(core)
        comparison.log(self.report)
        if self.export_config is not None and self.export_config.generate_sample:
            logging.info("Generating a sample output after model quantization.")
            self._generate_sample(model)
        return model

    def _fingerprint(self, quant_cfg: dict[str, Any], forward_loop) -> dict[str, Any]:
        """Return what the result depends on beside the model, see `fingerprint.settings_of`."""
        config = self.quantization_config
        offered = checks.auto_formats(config, QUANT_CFG_CHOICES) if config.algorithm == checks.AUTO else {}
        return fingerprint.settings_of(config, quant_cfg, offered, forward_loop is not None)

    def create_megatron_forward_loop(
        self, get_dataloader, num_batches, seq_length=None, micro_batch_size=None, decoder_seq_length=None
    ):
        """Return a function of the model that runs all microbatches through Megatron's pipeline schedule.

        Args:
            get_dataloader: Returns an iterator over microbatches `[b, s]`; called each time the loop runs.
            num_batches: Microbatches to run; None runs what the iterator has, in runs of equal shape.
            seq_length: Sequence length of the microbatches (with ``num_batches``).
            micro_batch_size: Sequences in a microbatch (with ``num_batches``).
            decoder_seq_length: Decoder's sequence length, for encoder-decoder models (with ``num_batches``).
        """
        fixed = None
        if num_batches is not None:
            from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

            fixed = {
                "schedule": get_forward_backward_func(),
                "num_microbatches": num_batches,
                "seq_length": seq_length,
                "micro_batch_size": micro_batch_size,
                "decoder_seq_length": decoder_seq_length,
            }
        return lambda model: batching.run_loader(model, get_dataloader, fixed)

    @staticmethod
    def _validate_quantized_checkpoint(checkpoint_dir: Path, tensor_parallelism_size: int) -> bool:
        """Return whether a TensorRT-LLM checkpoint has its configuration and one file for each inference rank."""
        return writers.is_complete_trtllm(_collaborators(), checkpoint_dir, tensor_parallelism_size)

    def _save_tokenizer(self, model, model_dir: str, export_dir: Path, export_fmt: str) -> None:
        """Put the tokenizer beside an exported model: Hugging Face's own files, or NeMo's context."""
        writers.save_tokenizer(_collaborators(), model, model_dir, export_dir, export_fmt)

    def export(self, model, model_dir: str, trainer: Trainer | None = None) -> None:
        """Write the model in the configured format; a failed export leaves nothing behind.

        Args:
            model: What `quantize` returned.
            model_dir: The checkpoint the model came from, for its context and tokenizer.
            trainer: The model's trainer, needed for the NeMo format.

        Raises:
            ModelOptConfigError: If there is no export configuration, or no trainer for the NeMo format.
            ExportError: If the written checkpoint is not what it should be.
        """
        if self.export_config is None:
            raise ModelOptConfigError("Quantizer.export needs an ExportConfig, but export_config is None.")
        fmt = self.export_config.export_format
        if fmt not in SUPPORTED_EXPORT_FMT:
            raise ModelOptConfigError(f"Unsupported export format: {fmt}; allowed: {SUPPORTED_EXPORT_FMT}.")
        if transformers_models.is_wrapped(model):
            transformers_models.check_format(fmt)
        if fmt == "nemo" and trainer is None:
            raise ModelOptConfigError("Trainer required for NeMo export.")
        if stand_ins.is_stand_in(model):
            stand_ins.write(_collaborators(), self, model, model_dir, trainer)
            return
        target = Path(self.export_config.path)
        with support.staged(target, files.checkpoint(fmt)) as folder:
            writers.write(_collaborators(), self, model, model_dir, trainer, folder)
            self._save_tokenizer(model, model_dir, folder, fmt)
        self._forget()
        support.log_success(target)
        if self.quantization_config.algorithm is not None:
            self.report.update(comparison.sizes_on_disk(model_dir, target))
            if self.export_config.report_path is not None:
                self.write_report(self.export_config.report_path)

    def write_report(self, folder: AnyPath) -> None:
        """Write `report` as ``report.json`` and as one self-contained page, ``report.html``, on rank zero."""
        comparison.write(self.report, self.quantization_config, Path(folder))


def export_hf_checkpoint(
    model_dir: AnyPath, export_dir: AnyPath, model: pl.LightningModule | None = None, verify: str = "full", **kwargs
) -> Path | None:
    """Write a model that Model Optimizer converted as a Hugging Face checkpoint, and verify it.

    NeMo's ``export_ckpt`` tries this first and falls back to its own exporter where it returns None.

    Args:
        model_dir: The NeMo checkpoint.
        export_dir: Where to write to.
        model: The model in memory; read from ``model_dir`` by default.
        verify: "full" compares its logits too, "files" names, shapes and scales, "none" nothing.
        **kwargs: Arguments of ``modelopt.torch.export.export_mcore_gpt_to_hf``.

    Returns:
        The folder, or None where the model was not converted.

    Raises:
        ModelOptConfigError: If this quantization or layout cannot be written correctly.
    """
    return writers.write_converted_hf(_collaborators(), model_dir, export_dir, model, verify, **kwargs)


def _collaborators() -> ModuleType:
    """Return this module: those who replace one of its attributes reach the functions that moved elsewhere too."""
    return sys.modules[__name__]


def unwrap_for_modelopt_operations(model):
    """Return the Megatron-Core model inside of NeMo's wrappers, or a Hugging Face model itself."""
    return model.model if transformers_models.is_wrapped(model) else unwrap_model(model)


def get_calib_data_iter(
    data: str = "cnn_dailymail",
    batch_size: int = 64,
    calib_size: int = 512,
    max_sequence_length: int = 512,
    *,
    column: str | None = None,
    seed: int | None = None,
):
    """Yield lists of calibration rows (texts or token ids); the last may be shorter, and rows without are left out.

    Args:
        data: "cnn_dailymail", "wikitext", files, a data set, an iterable or a data module, see `data_sources.rows`.
        batch_size: Rows in a list.
        calib_size: Rows with content to read.
        max_sequence_length: Characters after which a text is cut.
        column: The column of texts or token ids, None for the usual one.
        seed: Shuffles the data, None keeps its order.

    Raises:
        ModelOptConfigError: If the data cannot be read.
    """
    # What replaces the function of `datasets` reads local files too.
    replaced = load_dataset is not datasets.load_dataset
    found = sources.rows(data, column, seed, load_dataset, batch_size, loads_files=replaced)
    yield from sources.batches(found, batch_size, calib_size, max_sequence_length)


def create_data_iterator_getter(
    model,
    dataset,
    seq_len,
    batch_size,
    calibration_size,
    *,
    packed: bool = True,
    shard: bool = False,
    column: str | None = None,
    seed: int | None = None,
):
    """Return a function that gives an iterator over token microbatches `[b, s]` on the model's device.

    The text is read and tokenized once, when the first iterator is made.

    Args:
        model: The ``llm.GPTModel``: its tokenizer and device are used.
        dataset: See `get_calib_data_iter`.
        seq_len: Tokens in a sequence; each row contributes as many at most.
        batch_size: Sequences in a microbatch; what remains makes smaller ones.
        calibration_size: Rows to read.
        packed: Join rows into full sequences; False leaves each row a sequence of its own length.
        shard: Give this data-parallel rank its part only.
        column: See `get_calib_data_iter`.
        seed: See `get_calib_data_iter`.
    """
    options: dict[str, Any] = {name: value for name, value in (("column", column), ("seed", seed)) if value is not None}
    per_token = batching.STOCK_CHARACTERS_PER_TOKEN
    if not stand_ins.is_stand_in(model):
        per_token = batching.CHARACTERS_PER_TOKEN

    def read() -> list:
        batches = get_calib_data_iter(
            data=dataset,
            max_sequence_length=per_token * seq_len,
            batch_size=batch_size,
            calib_size=calibration_size,
            **options,
        )
        return [row for batch in batches for row in batch]

    return batching.iterator_getter(read, model, seq_len, batch_size, packed, shard)


gpt_model_type = decoders.known_models()


def get_modelopt_decoder_type(model: llm.GPTModel) -> str | None:
    """Return modelopt's name of a model's decoder, or None.

    By the first class in ``gpt_model_type`` that fits; modelopt itself names that of a Hugging Face model.
    """
    if transformers_models.is_wrapped(model):
        return mte.model_utils.get_model_type(model.model)
    return decoders.first_fit(model, gpt_model_type)

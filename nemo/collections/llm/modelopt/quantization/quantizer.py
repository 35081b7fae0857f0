"""Post-training quantization: the configuration, the Quantizer, and the functions NeMo imports from here.

The steps of `Quantizer.quantize` are in modules of their own. What stock's module has as attributes is read from this
module whenever it is used, and can be replaced here too.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Union

import lightning.pytorch as pl
import torch
from datasets import load_dataset
from megatron.core.inference.common_inference_params import CommonInferenceParams
from nemo.collections.llm.inference import MCoreTokenizerWrappper, generate
from nemo.collections.llm.utils import barrier, torch_dtype_from_precision
from nemo.lightning import Trainer
from nemo.lightning.ckpt_utils import ckpt_to_context_subdir
from nemo.lightning.io.api import load_connector_from_trainer_ckpt
from nemo.lightning.io.pl import TrainerContext, ckpt_to_weights_subdir
from nemo.lightning.megatron_parallel import MegatronParallel
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero
from nemo.utils.model_utils import unwrap_model
from tqdm import tqdm  # noqa: F401
from transformers import PreTrainedTokenizerBase

import modelopt.torch.export as mte
import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
from nemo.collections import llm
from nemo_modelopt_dropin import cpu_backend, files

from .. import _functions, _staging
from . import _checks, _decoders, _early_checks, _overrides, _stand_ins, _transformers_models, comparison
from . import quant_cfg_choices as choices
from ._collaborators import Collaborators
from ._quant_cfg import planned_quant_cfgs, quant_cfg_for
from .calibration import batching, inputs, sources, state, steps
from .config import ExportConfig, QuantizationConfig
from .export import support, writers
from .insert import quantizers, routed_experts, shared_scales
from .quant_cfg_choices import get_quant_cfg_choices
from .utils import load_quant_cfg

QUANT_CFG_CHOICES = get_quant_cfg_choices()
SUPPORTED_DTYPE = [16, "16", "bf16"]
SUPPORTED_EXPORT_FMT = ["trtllm", "nemo", "hf"]
KV_QUANT_CFG_CHOICES = {"fp8": "FP8_KV_CFG", "nvfp4": "NVFP4_KV_CFG"}
AnyPath = Union[Path, str]  # noqa: UP007
_ASK: Any = object()


class Quantizer:
    """Quantizes a trained NeMo model and exports it.

    Attributes:
        report: What the last `quantize` measured (losses before and after, relative output error, number of quantizers,
            sizes, calibration data) as a plain dictionary; empty before `quantize` and for stand-ins.
    """

    def __init__(self, quantization_config: QuantizationConfig, export_config: ExportConfig):
        """Check the settings.

        Args:
            quantization_config: How to quantize.
            export_config: Where and how to export; None if only `quantize` is used.

        Raises:
            EnvironmentError: Without a GPU, unless the CPU backend is enabled and the algorithm needs no CUDA kernel.
            ModelOptConfigError: For a value or combination that cannot work.
        """
        has_gpu = _early_checks.check_device(torch.cuda.is_available(), cpu_backend.is_enabled())
        self.quantization_config = quantization_config
        self.export_config = export_config
        self.report: dict[str, Any] = {}
        self._state = state.StateKeeper()
        self._inputs_checked = False
        settings, presets = (quantization_config, export_config), (QUANT_CFG_CHOICES, KV_QUANT_CFG_CHOICES)
        _checks.check_read_by_stock(*settings, KV_QUANT_CFG_CHOICES, SUPPORTED_DTYPE)
        _early_checks.check(*settings, has_gpu, *presets, SUPPORTED_EXPORT_FMT, load_quant_cfg)
        self.torch_dtype = torch_dtype_from_precision("bf16" if export_config is None else export_config.dtype)
        if inputs.made_by_ptq():
            self._check_inputs()

    def _check_inputs(self) -> None:
        """Check the calibration data and the output folders, once; see `inputs.check`."""
        if not self._inputs_checked:
            inputs.check(self.quantization_config, self.export_config)
            self._inputs_checked = True

    @staticmethod
    def _setup(model) -> None:
        """Freeze the model; exporters read the vocabulary without padding from its configuration."""
        if not _transformers_models.is_wrapped(model):
            model.config.vocab_size = model.tokenizer.vocab_size
            model.freeze()

    def _get_decoder_type(self, model, optional: bool = False) -> str | None:
        """Return Model Optimizer's name for the decoder: as configured, or by the class of the model.

        Args:
            model: The model, wrapped or not.
            optional: Return None if it is unknown.

        Raises:
            ModelOptConfigError: If it is unknown and not optional.
        """
        if self.export_config is not None and self.export_config.decoder_type is not None:
            return self.export_config.decoder_type
        return _decoders.infer(model, get_modelopt_decoder_type, optional)

    @staticmethod
    def _generate_sample(model) -> None:
        """Log how the quantized model continues two prompts."""
        quantizers.generate_sample(model, generate, MCoreTokenizerWrappper, CommonInferenceParams, logging)

    def _get_quant_cfg(self, model, decoder_type: str | None = _ASK) -> dict[str, Any]:
        """Return a new quant_cfg for the configured algorithm and a decoder, by default the model's."""
        if decoder_type is _ASK:
            decoder_type = self._get_decoder_type(model, optional=True)
        presets = QUANT_CFG_CHOICES, KV_QUANT_CFG_CHOICES
        return quant_cfg_for(self.quantization_config, decoder_type, *presets, load_quant_cfg, mtq, logging)

    def _get_forward_loop(self, model, rows: list | None = None, quant_cfg: dict[str, Any] | None = None):
        """Return the function that runs this rank's share of the rows, by default of the dataset, through the model."""
        if _stand_ins.is_stand_in(model):
            return _stand_ins.forward_loop(self, model, create_data_iterator_getter)
        shard = choices.statistics_merge_over_ranks(quant_cfg or self._get_quant_cfg(model))
        config = self.quantization_config
        get_batches = steps.calibration_batches(config, model, rows, shard, create_data_iterator_getter)
        if _transformers_models.is_wrapped(model):
            return _transformers_models.forward_loop(model, get_batches)
        return self.create_megatron_forward_loop(get_batches, num_batches=None)

    def quantize(self, model: MegatronParallel, forward_loop=None):
        """Insert quantizers into the model, calibrate them, and compare the result with the original.

        The algorithm decides precision and method. Without ``forward_loop`` the configured dataset calibrates: every
        data-parallel rank runs its share and modelopt combines the statistics. Held-out rows are then used to compare
        loss and outputs before and after; see the attribute `report`. A subclass that overrides `_get_forward_loop`
        with stock's parameters calibrates as with a ``forward_loop``.

        Args:
            model: The ``llm.GPTModel`` (or Mamba model), restored by a trainer.
            forward_loop: Function of the Megatron-Core model that runs calibration data through it.

        Returns:
            The same model, quantized.

        Raises:
            ModelOptConfigError: If the model is not supported, the data is unusable or the export cannot work.
        """
        config = self.quantization_config
        if config.algorithm is None:
            logging.info("Quantization algorithm set to None, returning the non-quantized model")
            return model

        logging.info(f"Quantizing model to {config.algorithm}...")
        if _stand_ins.is_stand_in(model):
            return _stand_ins.quantize(_collaborators(), self, model, forward_loop)
        self._check_inputs()
        _functions.always_put_back()
        self.report = {}
        decoder_type = self._get_decoder_type(model, optional=True)
        quant_cfg = _overrides.quant_cfg_of(self._get_quant_cfg, model, decoder_type)
        planned = planned_quant_cfgs(config, QUANT_CFG_CHOICES, load_quant_cfg)
        support.check_model(model, self.export_config, quant_cfg, planned, config.enable_kv_cache)
        core = unwrap_for_modelopt_operations(model)
        moves_scales = shared_scales.decide(core, self.export_config, planned)
        weighs = routed_experts.prepare(core, self.export_config)
        plan = steps.make_plan(config, decoder_type, quant_cfg, QUANT_CFG_CHOICES, moves_scales, weighs)
        steps.check_loop(plan, forward_loop)
        self._setup(model)
        forward_loop = forward_loop or _overrides.own_loop(self, model, plan, mtq)
        report = self._state.reuse(core, plan.fingerprint(forward_loop is not None), config.calibration_state)
        if report is None:
            report = self._calibrate(model, core, plan, forward_loop)
            self._state.keep(config.calibration_state, report)
        self.report = report
        if is_global_rank_zero():
            mtq.print_quant_summary(core)
        comparison.log(report)
        if self.export_config is not None and self.export_config.generate_sample:
            logging.info("Generating a sample output after model quantization.")
            self._generate_sample(model)
        return model

    def _calibrate(self, model, core, plan: steps.Plan, forward_loop) -> dict[str, Any]:
        """Insert and calibrate the quantizers, compare with the original, and return the report; see `quantize`."""
        config, batches = self.quantization_config, None
        rows = steps.read_rows(config, core, forward_loop, get_calib_data_iter)
        compared = steps.comparison_batches(config, model, rows, create_data_iterator_getter)
        if plan.searches:
            batches = steps.calibration_batches(config, model, rows.used, plan.shards, create_data_iterator_getter)
        elif forward_loop is None and mtq.config.need_calibration(plan.quant_cfg):
            forward_loop = _overrides.call(self._get_forward_loop, model, rows=rows.used, quant_cfg=plan.quant_cfg)
        quantizers.drop_quantizers(core, config.algorithm)
        before = comparison.hidden_states(core, compared, "Original model") if compared else []
        chosen = steps.calibrate(mtq, core, plan, forward_loop, batches)
        return {**rows.facts, **chosen, **steps.measure(config, core, compared, before)}

    def save_state(self, path: AnyPath, model=None) -> None:
        """Write the calibrated state of a quantized model into a folder, completely or not at all.

        Args:
            path: The folder, one that all ranks see. Only an older state in it is replaced.
            model: The model that `quantize` returned; by default the last one.

        Raises:
            ModelOptConfigError: If this quantizer has not quantized the model, or the folder holds something else.
            ExportError: On the ranks that succeeded, when another rank failed.
        """
        self._state.save(path, None if model is None else unwrap_for_modelopt_operations(model), self.report)

    def load_state(self, path: AnyPath, model=None):
        """Quantize from a stored state instead of calibrating; return the quantized model.

        The data behind your own forward loop, or in an iterator, is not compared with the data of the stored state.

        Args:
            path: The folder that `save_state` wrote.
            model: The original model, which is quantized at once; without it the next `quantize` uses the state.

        Raises:
            ModelOptConfigError: If there is no state, or it belongs to another model, algorithm, data or layout.
        """
        self._state.request(path)
        return None if model is None else self.quantize(model)

    def create_megatron_forward_loop(
        self, get_dataloader, num_batches, seq_length=None, micro_batch_size=None, decoder_seq_length=None
    ):
        """Return a function of the model that runs all micro-batches through Megatron's pipeline schedule.

        Args:
            get_dataloader: Returns an iterator over micro-batches `[b, s]`; called each time the loop runs.
            num_batches: Micro-batches to run; None runs all of the iterator, each run of equal shape at once. The
                other arguments are used with ``num_batches`` only.
            seq_length: Sequence length of the micro-batches.
            micro_batch_size: Sequences in a micro-batch.
            decoder_seq_length: The decoder's sequence length, for encoder-decoder models.
        """
        sizes = (seq_length, micro_batch_size, decoder_seq_length)
        fixed = None if num_batches is None else batching.fixed_schedule(num_batches, *sizes)
        return lambda model: batching.run_loader(model, get_dataloader, fixed)

    @staticmethod
    def _validate_quantized_checkpoint(checkpoint_dir: Path, tensor_parallelism_size: int) -> bool:
        """Return whether a TensorRT-LLM checkpoint has its configuration and one file for each inference rank."""
        return writers.is_complete_trtllm(_collaborators(), checkpoint_dir, tensor_parallelism_size)

    def _save_tokenizer(self, model, model_dir: str, export_dir: Path, export_fmt: str) -> None:
        """Write the tokenizer into the folder of an exported model: Hugging Face's files, or NeMo's context."""
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
        _early_checks.check_export_call(self.export_config, model, trainer, SUPPORTED_EXPORT_FMT)
        if _stand_ins.is_stand_in(model):
            _stand_ins.write(_collaborators(), self, model, model_dir, trainer)
            return
        target, fmt = Path(self.export_config.path), self.export_config.export_format
        with _staging.staged(target, files.checkpoint(fmt)) as folder:
            writers.write(_collaborators(), self, model, model_dir, trainer, folder)
            self._save_tokenizer(model, model_dir, folder, fmt)
        self._state.forget(self.quantization_config.calibration_state)
        writers.log_success(target)
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

    NeMo's ``export_ckpt`` tries this first, and uses its own exporter if it returns None.

    Args:
        model_dir: The NeMo checkpoint.
        export_dir: The folder to write.
        model: The model in memory; read from ``model_dir`` by default.
        verify: "full" compares the logits too, "files" names, shapes and scales only, "none" nothing.
        **kwargs: ``hf_layout`` and ``max_shard_size`` of `ExportConfig`; arguments of ``mte.export_mcore_gpt_to_hf``.

    Returns:
        The folder, or None if the model was not converted.

    Raises:
        ModelOptConfigError: If this quantization or layout cannot be written correctly.
    """
    return writers.write_converted_hf(_collaborators(), model_dir, export_dir, model, verify, **kwargs)


def _collaborators() -> Collaborators:
    """Return the functions and classes of this module that can be replaced in it, as they are now."""
    return Collaborators(
        mtq, mte, mto, logging, os, shutil, tempfile, barrier, is_global_rank_zero, unwrap_for_modelopt_operations,
        TrainerContext, PreTrainedTokenizerBase, load_connector_from_trainer_ckpt, ckpt_to_context_subdir,
        ckpt_to_weights_subdir, export_hf_checkpoint,
    )  # fmt: skip


def unwrap_for_modelopt_operations(model):
    """Return the Megatron-Core model inside NeMo's wrappers, or the Hugging Face model."""
    return model.model if _transformers_models.is_wrapped(model) else unwrap_model(model)


def get_calib_data_iter(
    data: str = "cnn_dailymail",
    batch_size: int = 64,
    calib_size: int = 512,
    max_sequence_length: int = 512,
    *,
    column: str | None = None,
    seed: int | None = None,
):
    """Yield lists of calibration rows (texts or token ids); rows without content are skipped.

    Args:
        data: "cnn_dailymail", "wikitext", files, a data set, an iterable or a data module, see `sources.rows`.
        batch_size: Rows in a list; the last list may be shorter.
        calib_size: Rows with content to read.
        max_sequence_length: Characters after which a text is cut.
        column: The column of texts or token ids, None for the usual one.
        seed: Shuffles the data, None keeps its order.

    Raises:
        ModelOptConfigError: If the data cannot be read.
    """
    found = sources.rows(data, column, seed, load_dataset, batch_size, loads_files=sources.is_replaced(load_dataset))
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
    """Return a function that returns an iterator over token micro-batches `[b, s]` on the model's device.

    The data is read and tokenized once, when the first iterator is made.

    Args:
        model: The ``llm.GPTModel``: its tokenizer and device are used.
        dataset: See `get_calib_data_iter`; rows that were read already are not read again.
        seq_len: Tokens in a sequence, and the most tokens that are used of a row.
        batch_size: Sequences in a micro-batch; the last ones may have fewer.
        calibration_size: Rows to read.
        packed: Join rows into full sequences; False keeps each row a sequence of its own length.
        shard: Return this data-parallel rank's part only.
        column: See `get_calib_data_iter`.
        seed: See `get_calib_data_iter`.
    """
    characters = batching.characters(seq_len, as_stock=_stand_ins.is_stand_in(model))
    sizes = {"batch_size": batch_size, "calib_size": calibration_size, "max_sequence_length": characters}
    ours: dict[str, Any] = {name: value for name, value in (("column", column), ("seed", seed)) if value is not None}

    def read() -> list:
        if isinstance(dataset, sources.ReadRows):
            return dataset
        return [row for rows in get_calib_data_iter(data=dataset, **sizes, **ours) for row in rows]

    return batching.iterator_getter(read, model, seq_len, batch_size, packed, shard)


gpt_model_type = _decoders.known_models()


def get_modelopt_decoder_type(model: llm.GPTModel) -> str | None:
    """Return Model Optimizer's name for a decoder by the first class in ``gpt_model_type`` that fits, or None."""
    if _transformers_models.is_wrapped(model):
        return mte.model_utils.get_model_type(model.model)
    return _decoders.first_fit(model, gpt_model_type)

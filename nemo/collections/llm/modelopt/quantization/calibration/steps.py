"""The steps from the original model to the calibrated one: read rows, measure, insert and calibrate, measure again."""

from __future__ import annotations

import abc
import pprint
import sys
from types import ModuleType
from typing import Any

import torch
from nemo.utils import logging

from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo.collections.llm.modelopt.quantization import checks, comparison, layer_errors, stand_ins, transformers_models
from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices
from nemo.collections.llm.modelopt.quantization.calibration import batching, unused_experts
from nemo.collections.llm.modelopt.quantization.insert import mixed_precision, quantizers


def tools() -> ModuleType:
    """Return the module `quantizer`, whose attributes are the collaborators."""
    return sys.modules["nemo.collections.llm.modelopt.quantization.quantizer"]


class CalibrationFlow(abc.ABC):
    """How a ``Quantizer`` calibrates."""

    quantization_config: Any
    report: dict[str, Any]

    @abc.abstractmethod
    def _get_quant_cfg(self, model) -> dict[str, Any]:
        """Return the quant_cfg for this model."""

    @abc.abstractmethod
    def create_megatron_forward_loop(self, get_dataloader, num_batches):
        """See ``Quantizer.create_megatron_forward_loop``."""

    def _get_forward_loop(self, model, rows: list | None = None, quant_cfg: dict[str, Any] | None = None):
        """Return the loop that feeds this rank's share of the calibration data.

        Args:
            model: The ``llm.GPTModel``.
            rows: Texts to use in place of the configured dataset.
            quant_cfg: How the model is quantized; as configured by default.
        """
        if stand_ins.is_stand_in(model):
            return stand_ins.forward_loop(tools(), self, model)
        shard = choices.statistics_merge_over_ranks(quant_cfg or self._get_quant_cfg(model))
        get_batches = self._get_microbatches(model, rows, shard)
        if transformers_models.is_wrapped(model):
            return transformers_models.forward_loop(model, get_batches)
        return self.create_megatron_forward_loop(get_batches, num_batches=None)

    def _get_microbatches(self, model, rows: list | None, shard: bool):
        """Return a function that gives an iterator over the calibration microbatches `[b, s]`."""
        config = self.quantization_config
        return tools().create_data_iterator_getter(
            model,
            dataset=config.calibration_dataset if rows is None else rows,
            seq_len=config.calibration_seq_len,
            batch_size=config.calibration_batch_size,
            calibration_size=config.calibration_dataset_size if rows is None else len(rows),
            packed=config.packed,
            shard=shard,
            column=config.calibration_column if rows is None else None,
            seed=config.calibration_shuffle_seed if rows is None else None,
        )

    def _calibrate(self, model, core, quant_cfg: dict[str, Any], decoder_type: str | None, forward_loop) -> None:
        """Insert and calibrate quantizers, and compare with the original; see `quantize`."""
        self.report = {}
        algorithm = self.quantization_config.algorithm
        searches = algorithm == checks.AUTO
        calibrates = not searches and forward_loop is None and tools().mtq.config.need_calibration(quant_cfg)
        rows, evaluation = None, None
        if forward_loop is not None and self.quantization_config.sensitivity_scan:
            raise ModelOptConfigError(
                "sensitivity_scan=True compares on held-out calibration data, of which a forward_loop has none."
            )
        if forward_loop is not None:
            logging.info("A forward_loop was given: without calibration data there is no comparison with the original")
        elif comparison.is_comparable(core):
            rows, evaluation = self._read_rows(model)
        if calibrates:
            forward_loop = self._get_forward_loop(model, rows, quant_cfg)
        quantizers.drop_quantizers(core, algorithm)
        before = comparison.hidden_states(core, evaluation, "Original model") if evaluation else []

        logging.info(f"Using quant_cfg:\n{pprint.pformat(quant_cfg)}")
        if searches:
            quantized = self._search(model, core, quant_cfg, rows)
        else:
            from_file = checks.is_file(algorithm, tools().QUANT_CFG_CHOICES)
            kv_option = self.quantization_config.enable_kv_cache
            quantized = quantizers.insert(tools().mtq, core, quant_cfg, forward_loop, kv_option, from_file)
        unused_experts.complete(core)
        if decoder_type == "gpt":
            quantizers.keep_amax_from_vanishing(tools().mtq, quantized, algorithm, self.report.get("formats"))
        self._measure(core, evaluation, before)

    def _measure(self, core, evaluation: list[torch.Tensor] | None, before: list[torch.Tensor]) -> None:
        """Put into the report what quantization did; see `report.describe` and `layer_errors`."""
        config = self.quantization_config
        after = None
        with layer_errors.recorded(core, config.layer_errors) as activations:
            if evaluation:
                after = comparison.evaluate(core, evaluation, before, "Quantized model")
        self.report.update(comparison.describe(core, after))
        if config.layer_errors:
            self.report["layers"] = layer_errors.table(core, activations)
        if not config.sensitivity_scan:
            return
        if not evaluation:
            logging.warning("sensitivity_scan: there is nothing to compare this model on, it was left out")
            return

        def measure(group: str) -> dict[str, float]:
            found = comparison.evaluate(core, evaluation, before, f"Sensitivity of {group}")
            figures = {"kl_to_original": found.kl, "relative_output_error": found.relative_error}
            return {**figures, "loss_increase": found.loss - found.reference_loss}

        self.report["sensitivity"] = layer_errors.sensitivity(core, measure)

    def _search(self, model, core, quant_cfg: dict[str, Any], rows: list | None):
        """Choose a format for each layer (mixed precision) and calibrate; return the Megatron-Core model."""
        offered = checks.auto_formats(self.quantization_config, tools().QUANT_CFG_CHOICES)
        shard = all(choices.statistics_merge_over_ranks(offer) for offer in offered.values())
        batches = list(self._get_microbatches(model, rows, shard)())
        self.report.update(
            mixed_precision.insert(tools().mtq, core, quant_cfg, offered, batches, self.quantization_config)
        )
        return core

    def _read_rows(self, model) -> tuple[list, list[torch.Tensor]]:
        """Read the rows: those that calibrate, and the comparison's microbatches `[b, s]` of this rank."""
        config = self.quantization_config
        compared_rows = min(config.comparison_size, max(1, config.comparison_tokens // config.calibration_seq_len))
        batches = tools().get_calib_data_iter(
            data=config.calibration_dataset,
            batch_size=config.calibration_batch_size,
            calib_size=config.calibration_dataset_size + compared_rows,
            max_sequence_length=batching.CHARACTERS_PER_TOKEN * config.calibration_seq_len,
            column=config.calibration_column,
            seed=config.calibration_shuffle_seed,
        )
        texts = batching.collect(batches, config.calibration_dataset, config.calibration_dataset_size)
        used, compared, held_out = batching.split_rows(len(texts), config.calibration_dataset_size, compared_rows)
        self.report = {"algorithm": config.algorithm, "calibration_rows": len(texts[used]), "held_out": held_out}
        evaluation = tools().create_data_iterator_getter(
            model,
            dataset=texts[compared],
            seq_len=config.calibration_seq_len,
            batch_size=config.calibration_batch_size,
            calibration_size=len(texts[compared]),
            shard=True,
        )
        # A single token has no next one to predict.
        return texts[used], [batch for batch in evaluation() if batch.shape[1] > 1]

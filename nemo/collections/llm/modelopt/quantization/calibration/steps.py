"""The steps from the original model to the calibrated one, in the order in which ``Quantizer.quantize`` calls them.

Read the rows, build the micro-batches, insert and calibrate the quantizers, measure the result. Functions of
NeMo and Model Optimizer are arguments, because they can be replaced in the module `quantizer`.
"""

from __future__ import annotations

import pprint
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero

from ... import _parallel
from ...errors import ModelOptConfigError
from .. import comparison, layer_errors
from .. import quant_cfg_choices as choices
from .._quant_cfg import AUTO, auto_formats, is_file
from ..insert import kv_cache, mixed_precision, quantizers, shared_scales
from . import batching, fingerprint, sources, unused_experts

# Enough for the standard error of a loss to be a few hundredths.
_COMPARED_TOKENS = 4096

Batches = Callable[[], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class Plan:
    """How one model is quantized, decided before the model is changed.

    Attributes:
        config: The QuantizationConfig.
        decoder_type: Model Optimizer's name for the model's decoder, None if it is unknown.
        quant_cfg: The quant_cfg for this model. KV-cache quantizers that the model cannot have are removed in place.
        formats: Name to quant_cfg of the formats that mixed precision chooses from; empty for other algorithms.
        from_file: Whether the quant_cfg is the user's own.
        moves_scales: Whether input scales are moved into other layers, see `shared_scales`.
        weighs_outputs: Whether experts multiply their outputs by the routing weights, see `routed_experts`.
    """

    config: Any
    decoder_type: str | None
    quant_cfg: dict[str, Any]
    formats: dict[str, dict[str, Any]]
    from_file: bool
    moves_scales: bool = False
    weighs_outputs: bool = False

    @property
    def searches(self) -> bool:
        """Whether mixed precision chooses the format of each layer."""
        return self.config.algorithm == AUTO

    @property
    def shards(self) -> bool:
        """Whether data-parallel ranks may calibrate on different rows."""
        quant_cfgs = self.formats.values() if self.searches else [self.quant_cfg]
        return all(choices.statistics_merge_over_ranks(quant_cfg) for quant_cfg in quant_cfgs)

    def fingerprint(self, own_loop: bool) -> dict[str, Any]:
        """Return the settings that the result depends on, see `fingerprint.settings_of`."""
        found = fingerprint.settings_of(self.config, self.quant_cfg, self.formats, own_loop)
        found |= {"input_scales": "moved"} if self.moves_scales else {}
        return found | ({"routing_weights": "multiply outputs"} if self.weighs_outputs else {})


def make_plan(
    config: Any,
    decoder_type: str | None,
    quant_cfg: dict[str, Any],
    presets: dict[str, Any],
    moves_scales: bool = False,
    weighs_outputs: bool = False,
) -> Plan:
    """Return the plan for a model.

    Args:
        config: The QuantizationConfig.
        decoder_type: Model Optimizer's name for the model's decoder, None if it is unknown.
        quant_cfg: The quant_cfg for this model; without a calibration method it gets "max", in place.
        presets: Short name to quant_cfg.
        moves_scales: See `shared_scales.decide`.
        weighs_outputs: See `routed_experts.prepare`.
    """
    quant_cfg.setdefault("algorithm", "max")
    formats = auto_formats(config, presets) if config.algorithm == AUTO else {}
    from_file = is_file(config.algorithm, presets)
    return Plan(config, decoder_type, quant_cfg, formats, from_file, moves_scales, weighs_outputs)


def check_loop(plan: Plan, forward_loop: Callable | None) -> None:
    """Check that a caller's forward loop fits the settings.

    Raises:
        ModelOptConfigError: If they need calibration data, which a forward loop keeps to itself.
    """
    if forward_loop is None:
        return
    if plan.searches:
        raise ModelOptConfigError('algorithm="auto" needs calibration data, it cannot run with a forward_loop.')
    if plan.config.sensitivity_scan:
        raise ModelOptConfigError(
            "sensitivity_scan=True compares on held-out calibration data, and a forward_loop has none."
        )


@dataclass(frozen=True)
class Rows:
    """The rows of the calibration data, after its only reading.

    Attributes:
        used: The rows that calibrate, None to read the configured dataset when the model is calibrated.
        compared: The rows that compare the quantized model with the original.
        facts: Entries for the report.
    """

    used: sources.ReadRows | None = None
    compared: sources.ReadRows = field(default_factory=sources.ReadRows)
    facts: dict[str, Any] = field(default_factory=dict)


def read_rows(config: Any, core, forward_loop: Callable | None, get_calib_data_iter: Callable) -> Rows:
    """Read the rows that calibrate and the rows that compare; without a comparison, read nothing here.

    Args:
        config: The QuantizationConfig.
        core: The Megatron-Core model, or NeMo 2.5's model from ``transformers``, which is not compared.
        forward_loop: The caller's own loop, or None. Its data cannot be compared on.
        get_calib_data_iter: The function of this name in `quantizer`.

    Raises:
        ModelOptConfigError: If the data cannot be read or has no row with content.
    """
    if forward_loop is not None:
        logging.info("A forward_loop is used: without calibration data there is no comparison with the original")
        return Rows()
    if not comparison.is_comparable(core):
        return Rows()
    compared_rows = _compared_rows(config, core, config.calibration_dataset_size)
    batches = get_calib_data_iter(
        data=config.calibration_dataset,
        batch_size=config.calibration_batch_size,
        calib_size=config.calibration_dataset_size + compared_rows,
        max_sequence_length=batching.characters(config.calibration_seq_len),
        column=config.calibration_column,
        seed=config.calibration_shuffle_seed,
    )
    rows = batching.collect(batches, config.calibration_dataset, config.calibration_dataset_size)
    calibrating = min(len(rows), config.calibration_dataset_size)
    compared_rows = _compared_rows(config, core, calibrating)
    used, compared, held_out = batching.split_rows(len(rows), config.calibration_dataset_size, compared_rows)
    if len(rows[compared]) < config.comparison_size and is_global_rank_zero():
        logging.info(
            f"The quantized model is compared with the original on {len(rows[compared])} rows of text, not on "
            f"comparison_size={config.comparison_size}, so that the comparison takes no longer than the calibration. "
            "To compare on more, set comparison_tokens."
        )
    return Rows(
        used=sources.ReadRows(rows[used]),
        compared=sources.ReadRows(rows[compared]),
        facts={"algorithm": config.algorithm, "calibration_rows": len(rows[used]), "held_out": held_out},
    )


def _compared_rows(config: Any, core, calibrating: int) -> int:
    """Return the most rows on which the models are compared; by default the comparison takes as long as calibration.

    Args:
        config: The QuantizationConfig.
        core: The Megatron-Core model.
        calibrating: The number of rows that calibrate.
    """
    tokens = config.comparison_tokens
    if tokens is None:
        share = comparison.share_of_calibration(core)
        tokens = min(_COMPARED_TOKENS, int(share * calibrating * config.calibration_seq_len))
    return min(config.comparison_size, max(1, tokens // config.calibration_seq_len))


def calibration_batches(config: Any, model, rows: list | None, shard: bool, create_getter: Callable) -> Batches:
    """Return a function that returns an iterator over the calibration micro-batches `[b, s]`.

    Args:
        config: The QuantizationConfig.
        model: The ``llm.GPTModel``.
        rows: The rows that calibrate, None to read the configured dataset.
        shard: Whether data-parallel ranks calibrate on different rows.
        create_getter: The function ``create_data_iterator_getter`` in `quantizer`.
    """
    return create_getter(
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


def comparison_batches(config: Any, model, rows: Rows, create_getter: Callable) -> list[torch.Tensor]:
    """Return this rank's micro-batches `[b, s]` of the rows that compare; see `calibration_batches`."""
    if not rows.compared:
        return []
    batches = create_getter(
        model,
        dataset=rows.compared,
        seq_len=config.calibration_seq_len,
        batch_size=config.calibration_batch_size,
        calibration_size=len(rows.compared),
        shard=True,
    )
    # A single token has no next token to predict.
    return [batch for batch in batches() if batch.shape[1] > 1]


def calibrate(mtq: Any, core, plan: Plan, forward_loop: Callable | None, batches: Batches | None) -> dict[str, Any]:
    """Insert the quantizers and calibrate them.

    Args:
        mtq: ``modelopt.torch.quantization``.
        core: The Megatron-Core model, or NeMo 2.5's model from ``transformers``.
        plan: How it is quantized.
        forward_loop: Runs the calibration data through the model; None if none is needed.
        batches: The micro-batches on which mixed precision chooses the formats; unused by other algorithms.

    Returns:
        Entries for the report: the formats that mixed precision chose.
    """
    logging.info(f"Using quant_cfg:\n{pprint.pformat(plan.quant_cfg)}")
    chosen: dict[str, Any] = {}
    quantized = core
    if plan.searches and batches is not None:
        found = list(batches())
        chosen = mixed_precision.insert(mtq, core, plan.quant_cfg, plan.formats, found, plan.config)
        forward_loop = mixed_precision.kv_cache_loop(found)
    else:
        kv_option = plan.config.enable_kv_cache
        quantized = quantizers.insert(mtq, core, plan.quant_cfg, forward_loop, kv_option, plan.from_file)
    kv_cache.agree(core)
    unused_experts.complete(core)
    if plan.moves_scales:
        _move_scales(mtq, core, plan.quant_cfg, forward_loop)
    if plan.decoder_type == "gpt":
        quantizers.keep_amax_from_vanishing(mtq, quantized, plan.config.algorithm, chosen.get("formats"))
    return chosen


def _move_scales(mtq: Any, core, quant_cfg: dict[str, Any], forward_loop: Callable | None) -> None:
    """Move input scales into other layers, and calibrate a quantized KV cache again if its values changed."""
    changed = _parallel.any_rank([shared_scales.move(core)])[0]
    if changed and choices.has_kv_cache(quant_cfg) and forward_loop is not None:
        mixed_precision.quantize_kv_cache(mtq, core, quant_cfg, forward_loop)
        kv_cache.agree(core)


def measure(config: Any, core, batches: list[torch.Tensor], before: list[torch.Tensor]) -> dict[str, Any]:
    """Return what quantization did to the model; see `comparison.describe` and `layer_errors`.

    Args:
        config: The QuantizationConfig.
        core: The quantized model.
        batches: The micro-batches that compare, empty if nothing is compared.
        before: The hidden states of the original model on them.
    """
    after = None
    with layer_errors.recorded(core, config.layer_errors) as activations:
        if batches:
            after = comparison.evaluate(core, batches, before, "Quantized model")
    report = comparison.describe(core, after)
    if config.layer_errors:
        report["layers"] = layer_errors.table(core, activations)
    if config.sensitivity_scan and batches:
        report["sensitivity"] = _sensitivity(core, batches, before)
    elif config.sensitivity_scan:
        logging.warning("sensitivity_scan: there is nothing to compare this model on, so it is left out")
    return report


def _sensitivity(core, batches: list[torch.Tensor], before: list[torch.Tensor]) -> list[dict[str, Any]]:
    """Return what each group of layers costs when it alone is quantized."""

    def cost(group: str) -> dict[str, float]:
        found = comparison.evaluate(core, batches, before, f"Sensitivity of {group}")
        figures = {"kl_to_original": found.kl, "relative_output_error": found.relative_error}
        return {**figures, "loss_increase": found.loss - found.reference_loss}

    return layer_errors.sensitivity(core, cost)

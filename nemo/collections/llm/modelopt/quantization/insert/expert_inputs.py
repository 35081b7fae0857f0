"""Compute the scales of INT8 experts' inputs for each token, for the layout of compressed-tensors.

vLLM has kernels for experts in INT8 only if the scales of their inputs are computed for each token, not calibrated. The
quantizers in memory compute them too, so that everything that measures the model measures what is stored.
"""

from __future__ import annotations

from typing import Any

from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero

from nemo_modelopt_dropin.console import screen
from nemo_modelopt_dropin.preflight import readers

from .. import quant_cfg_choices as choices
from .. import quant_cfg_entries
from ..export import layout_choice

# Experts as separate modules; shared experts are ordinary layers.
PATTERN = "*.experts.*input_quantizer"
_PER_TOKEN = {"num_bits": 8, "axis": None, "type": "dynamic", "block_sizes": {-1: None}, "enable": True}
_FORMAT = "W8A8_SQ_PER_CHANNEL"


def set_dynamic(core: Any, export_config: Any, quant_cfg: dict[str, Any], planned: dict[str, dict[str, Any]]) -> None:
    """Set the quantizers of experts' inputs in a quant_cfg, in place, if the export needs it.

    Args:
        core: The Megatron-Core model.
        export_config: The ``ExportConfig``, or None.
        quant_cfg: How the model will be quantized.
        planned: Name to quant_cfg of the algorithms.
    """
    if not layout_choice.has_experts(core):
        return
    if layout_choice.later_layout(export_config, planned) != readers.COMPRESSED_TENSORS:
        return
    if layout_choice.format_of(quant_cfg) != _FORMAT or choices.is_smoothquant(quant_cfg):
        return
    quant_cfg_entries.add(quant_cfg, PATTERN, _PER_TOKEN)
    if is_global_rank_zero():
        with screen.results():
            logging.info(
                "The inputs of experts get an INT8 scale for each token, not a calibrated one: vLLM reads only such "
                "experts."
            )

"""Input ranges of experts that received no calibration token."""

from __future__ import annotations

import re

import torch
from nemo.utils import logging

from modelopt.torch.quantization.nn import TensorQuantizer

_EXPERT = re.compile(r"(?P<before>.*\.local_experts\.)\d+(?P<after>\..*input_quantizer)$")
_SHOWN = 4


def complete(core: torch.nn.Module) -> None:
    """Set the amax of unused experts' input quantizers to the largest amax of the layer's other experts.

    The router sends few tokens to some experts, possibly none of the calibration data. Their static input quantizers
    then have no amax: in memory they would adapt to each input, which a file cannot express. The inputs of all experts
    of a layer have the same distribution, so the largest amax of the others is safe. AWQ leaves the inputs of an unused
    expert unscaled, so its range is that of the others' inputs before they are scaled. modelopt from 0.44 sets the
    ranges with AWQ itself, to the same values.

    Args:
        core: The calibrated Megatron-Core model. Experts on other expert-parallel ranks are not considered.
    """
    groups: dict[str, list[tuple[str, TensorQuantizer]]] = {}
    for name, module in core.named_modules():
        match = _EXPERT.match(name)
        if match and isinstance(module, TensorQuantizer):
            groups.setdefault(match["before"] + match["after"], []).append((name, module))
    filled = []
    for group in groups.values():
        calibrated = [module for _, module in group if _is_static(module) and module.amax is not None]
        if not calibrated:
            continue
        for name, module in group:
            if (_is_static(module) and module.amax is None) or _is_left_by_awq(module, calibrated[0]):
                module.reset_amax()
                module.axis = calibrated[0].axis
                module.amax = torch.stack([_range(one, scaled=_is_scaled(module)) for one in calibrated]).max()
                module.enable()
                filled.append(name.removesuffix(".input_quantizer"))
    if filled:
        more = f" and {len(filled) - _SHOWN} more" if len(filled) > _SHOWN else ""
        logging.warning(
            f"No calibration token reached {', '.join(filled[:_SHOWN])}{more}: the input range of the other experts of "
            "the layer is used. Use more calibration data (calibration_dataset_size)."
        )


def _range(quantizer: TensorQuantizer, scaled: bool) -> torch.Tensor:
    """Return the largest input of a calibrated quantizer, a scalar, after or before AWQ scales its channels."""
    before = getattr(quantizer, "_amax_for_smoothing", None)
    return quantizer.amax.max() if scaled or before is None else before.max().to(quantizer.amax)


def _is_scaled(quantizer: TensorQuantizer) -> bool:
    return quantizer.pre_quant_scale is not None and not bool((quantizer.pre_quant_scale == 1).all())


def _is_static(quantizer: TensorQuantizer) -> bool:
    """Return whether a quantizer needs one amax from calibration."""
    return quantizer.is_enabled and not quantizer._dynamic and not quantizer.block_sizes


def _is_left_by_awq(quantizer: TensorQuantizer, calibrated: TensorQuantizer) -> bool:
    """Return whether AWQ left a quantizer disabled, with which it measures channels: it does so for unused experts."""
    return not quantizer.is_enabled and quantizer.axis is not None and calibrated.axis is None

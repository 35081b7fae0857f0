"""By how much two runs of one computation may differ, by what is compared, device and dtype: one table, with reasons.

These are bounds for runs that add in different orders: other layouts, other layer specs, other batch sizes. A test that
compares with a formula in fp64, or whose numbers are equal to the last bit, has a bound of its own next to it.

The bounds of the CPU were measured, and are about three times the largest difference. No GPU was there to measure on:
those of CUDA follow from the number of bits, and from that kernels of another shape may be chosen for each layout.
"""

from __future__ import annotations

from test_code.support import devices

FP32, BF16 = "fp32", "bf16"
LOSS, WEIGHT, AMAX, LOGITS = "loss", "weight", "amax", "logits"

# (what, device, dtype): bound. Relative, except weights (absolute) and logits (as a share of the largest logit).
TOLERANCES: dict[tuple[str, str, str], float] = {
    # The mean over tokens after at most five steps. Adam divides by the size of a gradient, so that the error of a
    # small gradient reaches a weight undiminished; the mean takes most of it away again.
    (LOSS, devices.CPU, FP32): 1e-5,
    # The same with an error of its own for each kernel: ten times as much. TF32, which has 11 bits, is switched off.
    (LOSS, devices.CUDA, FP32): 1e-4,
    # A bf16 number has 8 bits: activations are off by 2^-9 after each layer, about 1 % of a loss after some layers.
    (LOSS, devices.CPU, BF16): 2e-2,
    (LOSS, devices.CUDA, BF16): 2e-2,
    # One step of Adam is as long as its rate, 1e-3, in the direction of a gradient that may be near zero.
    (WEIGHT, devices.CPU, FP32): 1e-4,
    (WEIGHT, devices.CUDA, FP32): 1e-3,
    (WEIGHT, devices.CPU, BF16): 5e-3,
    (WEIGHT, devices.CUDA, BF16): 5e-3,
    # One number of an activation: a sum of some hundred terms of unequal sign.
    (AMAX, devices.CPU, FP32): 1e-5,
    (AMAX, devices.CUDA, FP32): 1e-4,
    (AMAX, devices.CPU, BF16): 2e-2,
    (AMAX, devices.CUDA, BF16): 2e-2,
    # Some layers multiply the error of one by ten or more.
    (LOGITS, devices.CPU, FP32): 1e-4,
    (LOGITS, devices.CUDA, FP32): 1e-3,
    (LOGITS, devices.CPU, BF16): 5e-2,
    (LOGITS, devices.CUDA, BF16): 5e-2,
}


def of(what: str, dtype: str = FP32) -> float:
    """Return the bound of a quantity on the device of the tests."""
    return TOLERANCES[what, devices.machine().device, dtype]


def of_scripts(what: str) -> float:
    """Return the bound for what our scripts compute: in fp32 on the CPU, in bf16 on GPUs."""
    return of(what, BF16 if devices.machine().on_gpus else FP32)

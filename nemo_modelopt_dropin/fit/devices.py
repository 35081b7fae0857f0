"""Bandwidth and arithmetic of devices, for the roofline of `latency`. Standard library only.

The numbers are those of the vendor's data sheets, without sparsity, for tensor cores with FP32 accumulation. Real
kernels reach a part of them; a share of the original's time per token depends on their ratios only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_modelopt_dropin.errors import ModelOptConfigError, did_you_mean

BF16, FP8, INT8, FP4 = "bf16", "fp8", "int8", "fp4"
_OWN = re.compile(r"\s*(bandwidth|bf16|fp8|int8|fp4|overhead)\s*=\s*([0-9.]+(?:e[+-]?\d+)?)\s*")


@dataclass(frozen=True)
class Device:
    """A device.

    Attributes:
        name: Its name.
        bandwidth: Bytes per second of its memory.
        flops: Operations per second by format; a format without hardware runs in bf16.
        overhead: Seconds that a layer takes whatever its size, such as the start of its kernels.
        source: Where the numbers are from.
    """

    name: str
    bandwidth: float
    flops: Mapping[str, float] = field(hash=False, default_factory=dict)
    overhead: float = 0.0
    source: str = ""

    def rate(self, number_format: str) -> float:
        """Return the operations per second in a format."""
        return self.flops.get(number_format, self.flops[BF16])


def _gpu(name: str, tb_per_s: float, bf16: float, fp8: float = 0, int8: float = 0, fp4: float = 0, source: str = ""):
    rates = {BF16: bf16, FP8: fp8, INT8: int8, FP4: fp4}
    return Device(name, tb_per_s * 1e12, {key: value * 1e12 for key, value in rates.items() if value}, 0.0, source)


_TABLE = (
    _gpu("b200", 8.0, 2250, 4500, 4500, 9000, "NVIDIA DGX B200 data sheet (an eighth of the system)"),
    _gpu("h200", 4.8, 989, 1979, 1979, source="NVIDIA H200 data sheet, SXM, half of the numbers with sparsity"),
    _gpu("h100", 3.35, 989, 1979, 1979, source="NVIDIA H100 data sheet, SXM, half of the numbers with sparsity"),
    _gpu("h100-pcie", 2.0, 756, 1513, 1513, source="NVIDIA H100 data sheet, PCIe, half of the numbers with sparsity"),
    _gpu("a100-80gb", 2.039, 312, int8=624, source="NVIDIA A100 data sheet, SXM 80 GB"),
    _gpu("a100-40gb", 1.555, 312, int8=624, source="NVIDIA A100 data sheet, 40 GB"),
    _gpu("l40s", 0.864, 362, 733, 733, source="NVIDIA L40S data sheet"),
    _gpu("l4", 0.3, 121, 242, 242, source="NVIDIA L4 data sheet, half of the numbers with sparsity"),
    _gpu("a10", 0.6, 125, int8=250, source="NVIDIA A10 data sheet"),
    _gpu("t4", 0.32, 65, int8=130, source="NVIDIA T4 data sheet (FP16: it has no BF16)"),
    _gpu("rtx-4090", 1.008, 165.2, 330.3, 660.6, source="NVIDIA Ada GPU architecture whitepaper, appendix A"),
    _gpu("rtx-3090", 0.936, 71, int8=284, source="NVIDIA GA102 GPU architecture whitepaper, appendix A"),
)
DEVICES: dict[str, Device] = {device.name: device for device in _TABLE}
DEFAULT = "h100"


def find(text: str) -> Device:
    """Return a device of the table, or one with the user's own numbers.

    Args:
        text: A name in `DEVICES`, or numbers such as ``"bandwidth=2e11,bf16=3e12"`` in bytes and operations per second;
            ``fp8``, ``int8``, ``fp4`` and ``overhead`` (seconds per layer) are optional.

    Raises:
        ModelOptConfigError: If it is neither; the message lists the devices.
    """
    name = text.strip().lower()
    if name in DEVICES:
        return DEVICES[name]
    parts = [_OWN.fullmatch(part) for part in name.split(",")]
    given = {part[1]: float(part[2]) for part in parts if part}
    if all(parts) and {"bandwidth", BF16} <= given.keys() and all(value > 0 for value in given.values()):
        rates = {key: given[key] for key in (BF16, FP8, INT8, FP4) if key in given}
        return Device(name, given["bandwidth"], rates, given.get("overhead", 0.0), "given on the command line")
    raise ModelOptConfigError(
        f"device {text!r} is not in the table{did_you_mean(name, DEVICES)}; use one of {', '.join(DEVICES)}, or your "
        "own numbers in bytes and operations per second: 'bandwidth=2e11,bf16=3e12'."
    )

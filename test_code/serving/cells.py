"""What is exported for the tests of readers: algorithms, layouts and families of models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_modelopt_dropin.preflight import algorithms

MODELOPT, COMPRESSED = "modelopt", "compressed-tensors"
DENSE = ("llama", "llama-tied", "qwen2-tied", "qwen3-tied")
EXPERTS = ("mixtral",)


@dataclass(frozen=True)
class Cell:
    """One algorithm in one layout.

    Attributes:
        algorithm: Of ``QuantizationConfig``.
        layout: Of ``ExportConfig.hf_layout``.
        families: The families that vLLM serves in this format.
        remark: What `quant` sets, in a few characters.
        quant: Other settings of ``QuantizationConfig``.
    """

    algorithm: str
    layout: str
    families: tuple[str, ...] = DENSE + EXPERTS
    remark: str = ""
    quant: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        """Return the algorithm and what else is set."""
        return f"{self.algorithm} {self.remark}".strip()

    @property
    def name(self) -> str:
        """Return the cell's name in ids of tests."""
        return f"{self.label.replace(' ', '-')}-{self.layout}"


# What vLLM serves. `test_rules.py` compares it with the table of readers.
_SERVED = (
    Cell("fp8", MODELOPT),
    Cell("fp8_pc_pt", MODELOPT, DENSE),
    Cell("block_fp8", MODELOPT, DENSE),
    Cell("nvfp4", MODELOPT),
    Cell("w4a16_nvfp4", MODELOPT),
    # Factors of inputs move into other layers; those of experts cannot, and the folder then says NVFP4_AWQ.
    Cell("nvfp4_awq", MODELOPT, DENSE),
    Cell("mxfp8", MODELOPT),
    Cell("fp8", COMPRESSED),
    Cell("fp8_pc_pt", COMPRESSED),
    Cell("fp8_wo", COMPRESSED, DENSE),
    Cell("block_fp8", COMPRESSED),
    Cell("int8", COMPRESSED),
    Cell("int8_sq", COMPRESSED, DENSE),
    Cell("int8_wo", COMPRESSED),
    Cell("int4", COMPRESSED),
    # The router reads the same norm, which can therefore not hold factors of the experts' inputs.
    Cell("int4_awq", COMPRESSED, DENSE),
    Cell("nvfp4", COMPRESSED),
    Cell("w4a16_nvfp4", COMPRESSED),
    Cell("mxfp8", COMPRESSED),
)


def writable(algorithm: str, layout: str) -> bool:
    """Return whether an algorithm has files in a layout."""
    entry = algorithms.get(algorithm)
    return entry.hf_format is not None and layout in algorithms.HF_FORMATS[entry.hf_format].layouts


VLLM = tuple(cell for cell in _SERVED if writable(cell.algorithm, cell.layout))

# What is served beyond single formats: a quantized KV cache, and mixtures (MIXED_PRECISION of modelopt).
_CACHE = {"enable_kv_cache": True}
_FLOATS = {"auto_quantize_formats": ["nvfp4", "fp8"], "auto_quantize_bits": 7.5}
_INTEGERS = {"auto_quantize_formats": ["int4", "int8_wo"], "auto_quantize_bits": 7.5}
OPTIONS = (
    Cell("fp8", MODELOPT, ("llama", "qwen2-tied"), "+kv", _CACHE),
    Cell("fp8", COMPRESSED, ("llama",), "+kv", _CACHE),
    Cell("auto", MODELOPT, ("llama",), "nvfp4 fp8", _FLOATS),
    Cell("auto", COMPRESSED, ("llama",), "int4 int8_wo", _INTEGERS),
)

"""What is exported for the tests of readers: algorithms, layouts and families of models."""

from __future__ import annotations

from dataclasses import dataclass

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
        rounds_inputs: Whether the inputs of layers are quantized.
        experts: Whether vLLM serves models with experts in this format.
        share: How much of what quantization changes vLLM may differ by, see `client.bound`.
    """

    algorithm: str
    layout: str
    rounds_inputs: bool
    experts: bool = True
    share: float | None = None

    @property
    def name(self) -> str:
        """Return the cell's name in ids of tests and names of folders."""
        return f"{self.algorithm}-{self.layout}"

    @property
    def allowed(self) -> float:
        """Return `share`, or its default."""
        return self.share or (0.75 if self.rounds_inputs else 0.25)

    @property
    def families(self) -> tuple[str, ...]:
        """Return the families that vLLM serves in this format."""
        return DENSE + EXPERTS if self.experts else DENSE


# What vLLM serves. `test_rules.py` compares it with the table of readers.
_SERVED = (
    Cell("fp8", MODELOPT, True),
    Cell("fp8_pc_pt", MODELOPT, True, experts=False),
    Cell("block_fp8", MODELOPT, False, experts=False),
    Cell("nvfp4", MODELOPT, True),
    Cell("w4a16_nvfp4", MODELOPT, False),
    # Factors of inputs move into other layers; those of experts cannot, and the folder then says NVFP4_AWQ.
    Cell("nvfp4_awq", MODELOPT, True, experts=False),
    Cell("mxfp8", MODELOPT, True),
    Cell("fp8", COMPRESSED, True),
    Cell("fp8_pc_pt", COMPRESSED, True),
    Cell("fp8_wo", COMPRESSED, False, experts=False),
    Cell("block_fp8", COMPRESSED, False),
    # Rounding the inputs with one scale is nearly all that quantization changes, and another rounding changes it again.
    Cell("int8", COMPRESSED, True, share=1.5),
    Cell("int8_sq", COMPRESSED, True, experts=False),
    Cell("int8_wo", COMPRESSED, False),
    Cell("int4", COMPRESSED, False),
    # The router reads the same norm, which can therefore not hold factors of the experts' inputs.
    Cell("int4_awq", COMPRESSED, False, experts=False),
    Cell("nvfp4", COMPRESSED, True),
    Cell("w4a16_nvfp4", COMPRESSED, False),
    Cell("mxfp8", COMPRESSED, True),
)


def writable(algorithm: str, layout: str) -> bool:
    """Return whether an algorithm has files in a layout."""
    entry = algorithms.get(algorithm)
    return entry.hf_format is not None and layout in algorithms.HF_FORMATS[entry.hf_format].layouts


VLLM = tuple(cell for cell in _SERVED if writable(cell.algorithm, cell.layout))

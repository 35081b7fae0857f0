"""The table of the programs that read Hugging Face files: which format, in which layout, and how that was checked.

Standard library only. The choice of the layout, warnings, the dry run, the model card and the tables in the
documentation are made from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType

# The layouts of Hugging Face files: names of the tensors, and the form of `quantization_config`.
MODELOPT = "modelopt"
COMPRESSED_TENSORS = "compressed-tensors"
LAYOUTS = (MODELOPT, COMPRESSED_TENSORS)
# How a reader was checked. `RUN`: a test runs it and compares its outputs. `BY_RULES`: its source code takes the
# folder, but it was not run. `WRONG`: it loads the folder without an error, and its outputs are wrong.
RUN = "run"
BY_RULES = "accepted by its rules"
REFUSED = "not supported"
WRONG = "wrong outputs"

VLLM, SGLANG, TENSORRT_LLM, TRANSFORMERS = "vLLM", "SGLang", "TensorRT-LLM", "transformers"
# Versions of the readers that were checked.
READERS = MappingProxyType(
    {
        VLLM: "0.32",
        SGLANG: "0.5.23",
        TENSORRT_LLM: "of July 2026 (PyTorch backend)",
        TRANSFORMERS: "4.57 with compressed-tensors",
    }
)
# The layout that most of these read is the default one.
SERVERS = (VLLM, SGLANG, TENSORRT_LLM)


@dataclass(frozen=True)
class Cell:
    """What one reader does with one format in one layout.

    Attributes:
        how: `RUN`, `BY_RULES`, `REFUSED` or `WRONG`.
        reason: Why it does not read the folder, or how its computation differs from the quantized model.
        experts: Whether it also reads quantized experts.
    """

    how: str
    reason: str = ""
    experts: bool = True

    @property
    def reads(self) -> bool:
        """Whether the reader loads the folder and computes with it correctly."""
        return self.how in (RUN, BY_RULES)

    @property
    def text(self) -> str:
        """What the reader does, in words."""
        return f"{self.how}, without experts" if self.reads and not self.experts else self.how


_RUN, _RULES = Cell(RUN), Cell(BY_RULES)
_RUN_DENSE, _DENSE = Cell(RUN, experts=False), Cell(BY_RULES, experts=False)
_NO_VLLM = Cell(
    REFUSED, "of modelopt it takes FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, NVFP4, W4A16_NVFP4, MXFP8 and mixtures"
)
_NO_SGLANG = Cell(
    REFUSED, "of modelopt it takes FP8, NVFP4, NVFP4_AWQ, W4A16_NVFP4, MXFP8 and mixtures that contain NVFP4"
)
_NO_SGLANG_CT = Cell(REFUSED, "it has no scheme for these scales of compressed-tensors")
_NO_TENSORRT = Cell(REFUSED, "it has no such format")
_NO_TENSORRT_CT = Cell(REFUSED, "of compressed-tensors it takes FP8 with dynamic input scales, by channel or by block")
_NO_TENSORRT_NVFP4_CT = Cell(REFUSED, "it does not load the tensor names of NVFP4 in compressed-tensors")
_WRONG_TRANSFORMERS = Cell(WRONG, "it skips the scales of modelopt and takes codes for weights")
_DYNAMIC = Cell(BY_RULES, "it computes the scale of each token and ignores the calibrated one", experts=False)
_DYNAMIC_FP8 = Cell(BY_RULES, "it also quantizes the inputs, in FP8 with a scale for each 128 of a token")
_DYNAMIC_EXPERTS = Cell(BY_RULES, "it reads experts with input scales for each token only, and they are written so")
_NO_SGLANG_INT8 = Cell(REFUSED, "its kernels for INT8 experts run on NPUs only")
_MOVED = Cell(
    BY_RULES, "if the factors of all inputs could move into other layers; the folder then says NVFP4", experts=False
)
_DYNAMIC_FP8_DENSE = Cell(BY_RULES, _DYNAMIC_FP8.reason, experts=False)


def _row(vllm: Cell, sglang: Cell, tensorrt: Cell, transformers: Cell) -> MappingProxyType[str, Cell]:
    return MappingProxyType({VLLM: vllm, SGLANG: sglang, TENSORRT_LLM: tensorrt, TRANSFORMERS: transformers})


def _modelopt(vllm: Cell, sglang: Cell, tensorrt: Cell) -> MappingProxyType[str, Cell]:
    return _row(vllm, sglang, tensorrt, _WRONG_TRANSFORMERS)


def _ran(cell: Cell) -> Cell:
    return dataclasses.replace(cell, how=RUN)


# Name of the format in `algorithms.HF_FORMATS` and layout -> what each reader does. `make test-serving` runs vLLM, and
# `make test` runs transformers. The other cells were read from the source code of these versions. TensorRT-LLM:
# tensorrt_llm/_torch/model_config.py (commit 008e0af), modules/linear.py (commit 00bbf71, pull requests 14962, 15415
# and 16511) and modules/fused_moe. Its pull requests 16447 and 17726, for NVFP4 in compressed-tensors, were open.
TABLE: dict[tuple[str, str], MappingProxyType[str, Cell]] = {
    ("FP8", MODELOPT): _modelopt(_RUN, _RULES, _RULES),
    ("FP8", COMPRESSED_TENSORS): _row(_RUN, _RULES, _NO_TENSORRT_CT, _RUN),
    ("FP8_PER_CHANNEL_PER_TOKEN", MODELOPT): _modelopt(_RUN_DENSE, _NO_SGLANG, _DENSE),
    ("FP8_PER_CHANNEL_PER_TOKEN", COMPRESSED_TENSORS): _row(_RUN, _RULES, _DENSE, _RUN),
    ("FP8_WO", COMPRESSED_TENSORS): _row(_RUN_DENSE, _DENSE, _NO_TENSORRT_CT, _RUN),
    ("FP8_PB_WO", MODELOPT): _modelopt(_ran(_DYNAMIC_FP8_DENSE), _NO_SGLANG, _DYNAMIC_FP8_DENSE),
    ("FP8_PB_WO", COMPRESSED_TENSORS): _row(_ran(_DYNAMIC_FP8), _DYNAMIC_FP8, _DYNAMIC_FP8_DENSE, _ran(_DYNAMIC_FP8)),
    ("W8A8_SQ_PER_CHANNEL", MODELOPT): _modelopt(_NO_VLLM, _NO_SGLANG, _NO_TENSORRT),
    ("W8A8_SQ_PER_CHANNEL", COMPRESSED_TENSORS): _row(_ran(_DYNAMIC_EXPERTS), _DYNAMIC, _NO_TENSORRT_CT, _RUN),
    ("W8A8_PER_CHANNEL_PER_TOKEN", COMPRESSED_TENSORS): _row(_RUN, _NO_SGLANG_INT8, _NO_TENSORRT_CT, _RUN),
    ("W8A16", MODELOPT): _modelopt(_NO_VLLM, _NO_SGLANG, _RULES),
    ("W8A16", COMPRESSED_TENSORS): _row(_RUN, _RULES, _NO_TENSORRT_CT, _RUN),
    ("W4A16_AWQ", MODELOPT): _modelopt(_NO_VLLM, _NO_SGLANG, _DENSE),
    ("W4A16_AWQ", COMPRESSED_TENSORS): _row(_RUN, _RULES, _NO_TENSORRT_CT, _RUN),
    ("W4A8_AWQ", MODELOPT): _modelopt(_NO_VLLM, _NO_SGLANG, _DENSE),
    ("NVFP4", MODELOPT): _modelopt(_RUN, _RULES, _RULES),
    ("NVFP4", COMPRESSED_TENSORS): _row(_RUN, _RULES, _NO_TENSORRT_NVFP4_CT, _RUN),
    ("NVFP4_AWQ", MODELOPT): _modelopt(_ran(_MOVED), _DENSE, _DENSE),
    ("W4A16_NVFP4", MODELOPT): _modelopt(_RUN, _RULES, _RULES),
    ("W4A16_NVFP4", COMPRESSED_TENSORS): _row(_RUN, _RULES, _NO_TENSORRT_NVFP4_CT, _RUN),
    ("MXFP8", MODELOPT): _modelopt(_RUN, _RULES, _RULES),
    ("MXFP8", COMPRESSED_TENSORS): _row(_RUN, _NO_SGLANG_CT, _NO_TENSORRT_CT, _RUN),
}
# Why a layout cannot hold a format.
OBSTACLES: dict[tuple[str, str], str] = {
    ("FP8_WO", MODELOPT): "modelopt has no name for FP8 weights with inputs in 16 bits",
    ("W8A8_PER_CHANNEL_PER_TOKEN", MODELOPT): "modelopt has no name for INT8 with an input scale for each token",
    ("W4A8_AWQ", COMPRESSED_TENSORS): "it has no second step of the weights and no static FP8 scale of the inputs",
    ("NVFP4_AWQ", COMPRESSED_TENSORS): "it has no factors of single inputs",
}


def cells(hf_format: str, layout: str) -> MappingProxyType[str, Cell]:
    """Return what each reader does with a format in a layout; empty if the pair is not in the table."""
    return TABLE.get((hf_format, layout), MappingProxyType({}))


def of(hf_format: str, layout: str, experts: bool = False) -> list[str]:
    """Return the names of the programs that read a format in a layout correctly.

    Args:
        hf_format: The format.
        layout: The layout.
        experts: Whether the model has experts.
    """
    return [name for name, cell in cells(hf_format, layout).items() if cell.reads and (cell.experts or not experts)]


def of_all(hf_formats: Iterable[str], layout: str) -> list[str]:
    """Return the names of the servers that read all of some formats in a layout."""
    found = list(SERVERS)
    for hf_format in hf_formats:
        found = [name for name in found if name in of(hf_format, layout)]
    return found


def text(hf_format: str, layout: str, experts: bool = False) -> str:
    """Return the names of the programs that read a format in a layout correctly, as text; see `of`."""
    return ", ".join(of(hf_format, layout, experts)) or "no known server"


def best(hf_format: str, layouts: tuple[str, ...]) -> str:
    """Return the layout that most servers read; if several are read equally, the first one.

    Args:
        hf_format: The format.
        layouts: The layouts that can hold it, at least one.
    """
    return max(layouts, key=lambda layout: len([name for name in of(hf_format, layout) if name in SERVERS]))

"""Flags that several commands have, each described once."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_modelopt_cli.options import option
from nemo_modelopt_dropin.preflight import algorithms

TOKENIZER = option("tokenizer to use instead of the checkpoint's", path=True)
LEGACY_CKPT = option("load a checkpoint of Transformer Engine before 1.14")
DEVICES = option("ranks on each node (default: torchrun's, or as many as the model needs)")
NUM_NODES = option("nodes (default: torchrun's, or 1)")
TEXT = option("JSON, JSON-lines, Parquet or text file (also .gz, .bz2, .xz, .zst) of texts or conversations", path=True)
SPLIT = option("shares for training, validation and test, for --data_paths (default: 99,1,0)")
INDEX_MAPPING_DIR = option("folder for the index files of --data_paths", path=True)
HF_LAYOUT = option(
    "layout of hf files (default: auto, the one that most servers read)",
    "--hf-layout",
    choices=algorithms.LAYOUT_CHOICES,
)
MAX_SHARD_SIZE = option("largest size of a weight file of hf files", "--max-shard-size", metavar="SIZE")
NO_REPORT = option("do not write a report")


def tensor_parallel(*spellings: str, text: str = "tensor-parallel size"):
    """Return the metadata of the flag for tensor parallelism."""
    return option(text, *spellings)


def pipeline_parallel(*spellings: str):
    """Return the metadata of the flag for pipeline parallelism."""
    return option("pipeline-parallel size", *spellings)


@dataclass(frozen=True)
class UnequalStages:
    """Pipeline stages of different sizes."""

    num_layers_in_first_pipeline_stage: int | None = field(
        default=None, metadata=option("layers in the first pipeline stage, if the stages are unequal")
    )
    num_layers_in_last_pipeline_stage: int | None = field(
        default=None, metadata=option("layers in the last pipeline stage, if the stages are unequal")
    )


@dataclass(frozen=True)
class Device:
    """What the ranks run on."""

    cpu: bool = field(default=False, metadata=option("run on CPU ranks over gloo"))

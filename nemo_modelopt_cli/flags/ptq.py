"""The flags of ``ptq``."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field

from nemo_modelopt_cli.flags import shared
from nemo_modelopt_cli.options import group, option
from nemo_modelopt_dropin.errors import did_you_mean
from nemo_modelopt_dropin.preflight import algorithms

ALGORITHMS = algorithms.of_ptq()
FORMATS = {
    "trtllm": "a TensorRT-LLM checkpoint",
    "nemo": "a NeMo checkpoint that simulates it with wide weights; only hf and trtllm files are small",
    "hf": "Hugging Face files with weights in that format",
}


def algorithm(name: str) -> str:
    """Return a name that may be an algorithm; modelopt's presets are known only after importing it."""
    if name in ALGORITHMS or name.endswith("_CFG") or os.path.isfile(name):
        return name
    raise argparse.ArgumentTypeError(
        f"unknown algorithm {name!r} (one of {', '.join(ALGORITHMS)}, or a file){did_you_mean(name, ALGORITHMS)}"
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """The checkpoint to quantize."""

    nemo_checkpoint: str = field(metadata=option("NeMo 2 checkpoint", "-nc", "--nemo_checkpoint", path=True))
    tokenizer: str | None = field(default=None, metadata=shared.TOKENIZER)
    decoder_type: str | None = field(
        default=None, metadata=option("modelopt's name of the architecture, if it cannot be inferred")
    )
    legacy_ckpt: bool = field(default=False, metadata=shared.LEGACY_CKPT)
    trust_remote_code: bool = field(default=False, metadata=option("run code of Hugging Face models"))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the command runs, and how the model is split."""

    calibration_tp: int = field(
        default=1, metadata=shared.tensor_parallel("-ctp", "--calibration_tp", "--calib_tp", "--tp")
    )
    calibration_pp: int = field(
        default=1, metadata=shared.pipeline_parallel("-cpp", "--calibration_pp", "--calib_pp", "--pp")
    )
    stages: shared.UnequalStages = field(default_factory=shared.UnequalStages)
    devices: int | None = field(default=None, metadata=shared.DEVICES)
    num_nodes: int | None = field(
        default=None,
        metadata=option("nodes (default: torchrun's, else calibration_pp, 1 with --cpu)", "-nodes", "--num_nodes"),
    )
    device: shared.Device = field(default_factory=shared.Device)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """The format of the weights and activations."""

    algorithm: str = field(
        default="fp8",
        metadata=option(
            f"one of {', '.join(ALGORITHMS)}, a preset of modelopt (..._CFG) or a JSON file with a quant_cfg",
            "-algo",
            "--algorithm",
            convert=algorithm,
            metavar="NAME",
            path=True,
        ),
    )
    awq_block_size: int = field(
        default=128, metadata=option("weights that share an INT4 scale", "-awq_bs", "--awq_block_size")
    )
    sq_alpha: float = field(default=0.5, metadata=option("alpha of SmoothQuant"))
    enable_kv_cache: bool | None = field(
        default=None, metadata=option("quantize the KV cache", off="--disable_kv_cache")
    )
    kv_cache_qformat: str = field(
        default="fp8", metadata=option("format of the KV cache (default: fp8)", choices=("fp8", "nvfp4"))
    )
    dtype: str = field(
        default="bf16", metadata=option("type of what stays unquantized", "-dt", "--dtype", choices=("16", "bf16"))
    )


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """The search for a format for each layer."""

    auto_quantize_bits: float | None = field(default=None, metadata=option("average bits per weight"))
    auto_quantize_formats: str = field(default="int4_awq,fp8", metadata=option("algorithms to choose from"))
    auto_quantize_checkpoint: str | None = field(
        default=None, metadata=option("file or folder from which an interrupted search resumes", path=True)
    )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The calibration data."""

    batch_size: int = field(default=64, metadata=option("rows per forward pass", "-bs", "--batch_size"))
    seq_len: int = field(default=128, metadata=option("tokens per row", "-sl", "--seq_len"))
    calibration_dataset_size: int = field(
        default=512, metadata=option("rows to calibrate on", "-calib_size", "--calibration_dataset_size")
    )
    calibration_dataset: str = field(
        default="cnn_dailymail",
        metadata=option(
            "wikitext, cnn_dailymail, or a JSON, JSON-lines, Parquet or text file, or a folder or pattern of them",
            "-calib_ds",
            "--calibration_dataset",
            path=True,
        ),
    )
    calibration_column: str | None = field(default=None, metadata=option("column of the texts, if it is not text"))
    sensitivity_scan: bool = field(
        default=False, metadata=option("measure the loss that quantizing each group of layers alone causes")
    )
    calibration_shuffle_seed: int | None = field(default=None, metadata=option("shuffle the data with this seed"))


@dataclass(frozen=True, kw_only=True)
class Export:
    """The files that are written."""

    export_path: str | None = field(
        default=None,
        metadata=option(
            "folder to write (default: named after the algorithm)", "-out", "--export_path", "--output_path", path=True
        ),
    )
    export_format: str = field(
        default="trtllm",
        metadata=option("; ".join(f"{name}: {what}" for name, what in FORMATS.items()), choices=tuple(FORMATS)),
    )
    inference_tp: int = field(
        default=1,
        metadata=option("tensor-parallel size of trtllm files", "-itp", "--inference_tp", "--tensor_parallelism_size"),
    )
    inference_pp: int = field(
        default=1,
        metadata=option(
            "pipeline-parallel size of trtllm files", "-ipp", "--inference_pp", "--pipeline_parallelism_size"
        ),
    )
    report_path: str | None = field(
        default=None, metadata=option("folder of report.html and .json (default: export_path + .report)", path=True)
    )
    no_report: bool = field(default=False, metadata=shared.NO_REPORT)
    generate_sample: bool = field(default=False, metadata=option("generate a sample with the quantized model"))
    verify: str = field(
        default="full",
        metadata=option(
            "check of hf files before they appear. full: files and logits; files: only the files; none: no check",
            choices=("full", "files", "none"),
        ),
    )
    hf_layout: str = field(default=algorithms.AUTO, metadata=shared.HF_LAYOUT)
    max_shard_size: str = field(default="5GB", metadata=shared.MAX_SHARD_SIZE)


@dataclass(frozen=True, kw_only=True)
class State:
    """The calibrated state that is kept until the export has succeeded."""

    calibration_state: str | None = field(
        default=None,
        metadata=option("folder to keep it in (default: export_path + .calibration-state)", path=True),
    )
    no_calibration_state: bool = field(
        default=False, metadata=option("neither keep nor use a state: calibrate every time")
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    """All flags of the command but those of `Parser.add_run_options`."""

    model: Model = field(metadata=group("model"))
    layout: Layout = field(default_factory=Layout, metadata=group("layout"))
    quantization: Quantization = field(default_factory=Quantization, metadata=group("quantization"))
    mixed: MixedPrecision = field(default_factory=MixedPrecision, metadata=group("mixed precision (--algorithm auto)"))
    calibration: Calibration = field(default_factory=Calibration, metadata=group("calibration"))
    export: Export = field(default_factory=Export, metadata=group("export"))
    state: State = field(default_factory=State, metadata=group("calibrated state"))

"""The configuration dataclasses of post-training quantization; NeMo-Run creates them from the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, Union

# NeMo-Run's command line supports annotations that are types (not strings), Optional and Union (not "X | None").


@dataclass
class QuantizationConfig:
    """Settings of post-training quantization.

    ``algorithm`` is a key of ``QUANT_CFG_CHOICES``, the name of a preset of modelopt ("INT8_WEIGHT_ONLY_CFG"), the path
    of a JSON file with a quant_cfg, "auto" for mixed precision, or None to export the model unchanged. ``sq_alpha`` is
    SmoothQuant's migration strength. With ``enable_kv_cache=None`` the algorithm and the model decide.

    The calibration dataset is "cnn_dailymail", "wikitext", or a JSON, JSON-lines, Parquet or text file, a folder or a
    glob; from Python also a ``datasets.Dataset``, an iterable of texts or lists of token ids, or a Lightning
    data module. ``calibration_column`` names the text column if it is not the usual one,
    ``calibration_shuffle_seed`` shuffles (None keeps the order), ``calibration_dataset_size`` counts rows with content.

    ``packed`` joins rows into full sequences; False keeps each row a sequence of its own and batches rows of equal
    length. Padding never enters the statistics. ``comparison_size`` is the number of held-out rows on which the
    quantized model is compared with the original, 0 for none. ``comparison_tokens`` limits their tokens; None limits
    them to 4096 and such that the comparison takes no longer than the calibration.

    ``algorithm="auto"`` chooses a format for each layer so that the weights take ``auto_quantize_bits`` bits on average
    (layers that are not quantized count 16); ``auto_quantize_checkpoint`` is a file or folder from which an interrupted
    search resumes.

    ``calibration_state`` is a folder that all ranks see. The calibrated state stays there until the export succeeds:
    after a failure the next run with the same settings does not calibrate again. If the folder holds anything else, an
    error is raised before the model is loaded.

    ``layer_errors`` measures the error of each layer's weight and inputs (SQNR) during the comparison.
    ``sensitivity_scan`` quantizes one group of layers at a time and measures its cost, with one pass over the held-out
    rows for each group. Both results are in ``Quantizer.report``.
    """

    algorithm: Optional[str] = "fp8"  # noqa: UP045
    awq_block_size: int = 128
    sq_alpha: float = 0.5
    enable_kv_cache: Optional[bool] = None  # noqa: UP045
    kv_cache_qformat: str = "fp8"

    calibration_dataset: str = "cnn_dailymail"
    calibration_dataset_size: int = 512
    calibration_batch_size: int = 64
    calibration_seq_len: int = 128

    packed: bool = True
    comparison_size: int = 32

    calibration_column: Optional[str] = None  # noqa: UP045
    calibration_shuffle_seed: Optional[int] = None  # noqa: UP045
    auto_quantize_bits: Optional[float] = None  # noqa: UP045
    auto_quantize_formats: list[str] = field(default_factory=lambda: ["int4_awq", "fp8"])
    auto_quantize_checkpoint: Optional[str] = None  # noqa: UP045
    calibration_state: Optional[str] = None  # noqa: UP045
    comparison_tokens: Optional[int] = None  # noqa: UP045
    layer_errors: bool = True
    sensitivity_scan: bool = False


@dataclass
class ExportConfig:
    """Where and how to write the quantized model; ``export_format`` is one of ``SUPPORTED_EXPORT_FMT``.

    ``verify`` selects how a Hugging Face checkpoint is checked before it is moved to ``path``: "full" compares logits
    with the quantized model's (skipped with a warning if `transformers` does not support the class or the host's memory
    is too small), "files" checks names, shapes, dtypes and scales only, "none" checks nothing.

    ``report_path`` is a folder for ``report.json`` and ``report.html``, which are written after the export; None writes
    neither. It is not the checkpoint's folder, which holds only the files of its format.

    ``hf_layout`` is the layout of a Hugging Face checkpoint: "modelopt", "compressed-tensors", or "auto", the one that
    most servers read for the algorithm (modelopt's if both are read equally). With ``export_format="nemo"``,
    "compressed-tensors" moves the input scales of AWQ and SmoothQuant into other layers, so that the checkpoint can be
    exported to that layout later. ``max_shard_size`` limits the size of each weight file ("5GB", "500MB", "4GiB").
    """

    path: str
    export_format: str = "trtllm"
    dtype: Union[str, int] = "bf16"  # noqa: UP007
    decoder_type: Optional[str] = None  # noqa: UP045
    inference_tp: int = 1
    inference_pp: int = 1
    generate_sample: bool = False
    verify: str = "full"
    report_path: Optional[str] = None  # noqa: UP045
    hf_layout: str = "auto"
    max_shard_size: str = "5GB"

    def __post_init__(self):
        self.path = Path(self.path)  # type: ignore[assignment]


# Pickles, NeMo contexts and NeMo-Run's YAML store the module of a class: stock's, so that stock can read them.
for _config in (QuantizationConfig, ExportConfig):
    _config.__module__ = "nemo.collections.llm.modelopt.quantization.quantizer"

"""The configuration dataclasses of post-training quantization; NeMo-Run builds them from the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, Union

# NeMo-Run's command line reads annotations that are types (no strings), Optional and Union (not "X | None").


@dataclass
class QuantizationConfig:
    """Settings of post-training quantization.

    ``algorithm`` is a key of ``QUANT_CFG_CHOICES``, the name of a preset of modelopt ("INT8_WEIGHT_ONLY_CFG"), the path
    of a JSON file with a quant_cfg, "auto" for mixed precision, or None to export the model as it is. ``sq_alpha`` is
    SmoothQuant's migration strength. ``enable_kv_cache=None`` decides by algorithm and model.

    The calibration dataset is "cnn_dailymail", "wikitext", or a JSON, JSON-lines, Parquet or text file, a folder or a
    glob of such; from Python also a ``datasets.Dataset``, an iterable of texts or lists of token ids, or a Lightning
    data module. ``calibration_column`` names the text column where it is not the usual one,
    ``calibration_shuffle_seed`` shuffles (None keeps the order), ``calibration_dataset_size`` counts rows with content.

    ``packed`` joins rows into full sequences; False leaves each row a sequence of its own, and rows of equal length run
    together: neither lets padding enter the statistics. ``comparison_size`` is the number of held-out rows on which the
    quantized model is compared with the original, 0 for none; of long rows fewer, about ``comparison_tokens`` in all.

    ``algorithm="auto"`` chooses a format for each layer so that the weights take ``auto_quantize_bits`` bits on average
    (layers that stay as they are count 16); ``auto_quantize_checkpoint`` is a file or folder from which an interrupted
    search goes on.

    ``calibration_state`` is a folder, one that all ranks see, in which the calibrated state is kept between the
    calibration and the end of a successful export: after a failure the next run with the same settings does not
    calibrate again. A folder that holds anything else raises an error before the model is loaded.

    ``layer_errors`` measures the error of each layer's weight and inputs (SQNR) while the models are compared;
    ``sensitivity_scan`` quantizes one group of layers at a time and measures what it costs, a pass over the held-out
    rows for each. Both are in ``Quantizer.report``.
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
    comparison_tokens: int = 4096
    layer_errors: bool = True
    sensitivity_scan: bool = False


@dataclass
class ExportConfig:
    """Where and how to write the quantized model; ``export_format`` is one of ``SUPPORTED_EXPORT_FMT``.

    ``verify`` says how a Hugging Face checkpoint is checked before it appears: "full" compares its logits with the
    quantized model's (skipped with a warning where `transformers` does not know the class or the host's memory is too
    small), "files" reopens it for names, shapes, dtypes and scales only, "none" trusts it.

    ``report_path`` is a folder that gets ``report.json`` and ``report.html`` after the export, None for neither. It is
    not the checkpoint's: readers of that find what its format says and nothing else.
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

    def __post_init__(self):
        self.path = Path(self.path)  # type: ignore[assignment]


# Pickles, NeMo contexts and NeMo-Run's YAML name a class by its module: the stock one, so that stock reads them too.
for _config in (QuantizationConfig, ExportConfig):
    _config.__module__ = "nemo.collections.llm.modelopt.quantization.quantizer"

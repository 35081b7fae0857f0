"""Post-training quantization (PTQ) of NeMo models and the export of quantized checkpoints."""

from .quantizer import ExportConfig, QuantizationConfig, Quantizer, create_data_iterator_getter, get_calib_data_iter

__all__ = ["ExportConfig", "QuantizationConfig", "Quantizer", "create_data_iterator_getter", "get_calib_data_iter"]

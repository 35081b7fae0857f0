"""Compression of NeMo 2.x models: quantization, pruning, distillation, speculative decoding.

A drop-in replacement of nemo-toolkit's subpackage of this name; ``NEMO_MODELOPT=stock`` brings that one back.

Subpackages: `quantization` (calibrate, quantize, export), `prune`, `distill`, `speculative`, `recipes` (NeMo-Run), and
`model_utils` (restore with modelopt's layer specs, save and restore modelopt's state). What a user can put right is
raised as `ModelOptConfigError`.
"""

from nemo_modelopt_dropin import versions as _versions

_versions.check()

from .distill import DistillationGPTModel, HiddenStateCosineLoss, LogitsKLLoss, MSELoss  # noqa: E402
from .errors import ModelOptConfigError  # noqa: E402
from .model_utils import set_modelopt_spec_if_exists_in_ckpt, setup_trainer_and_restore_model_with_modelopt_spec  # noqa: E402
from .prune import PruningConfig, prune_language_model, save_pruned_model  # noqa: E402
from .quantization import ExportConfig, QuantizationConfig, Quantizer, create_data_iterator_getter, get_calib_data_iter  # noqa: E402
from .speculative import apply_speculative_decoding  # noqa: E402

__all__ = [
    "DistillationGPTModel",
    "ExportConfig",
    "HiddenStateCosineLoss",
    "LogitsKLLoss",
    "MSELoss",
    "ModelOptConfigError",
    "PruningConfig",
    "QuantizationConfig",
    "Quantizer",
    "apply_speculative_decoding",
    "create_data_iterator_getter",
    "get_calib_data_iter",
    "prune_language_model",
    "save_pruned_model",
    "set_modelopt_spec_if_exists_in_ckpt",
    "setup_trainer_and_restore_model_with_modelopt_spec",
]

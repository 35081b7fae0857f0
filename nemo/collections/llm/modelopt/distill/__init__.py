"""Knowledge distillation of Megatron-Core GPT models through ModelOpt."""

from .loss import HiddenStateCosineLoss, LogitsKLLoss, MSELoss
from .model import DistillationGPTModel

__all__ = ["LogitsKLLoss", "MSELoss", "HiddenStateCosineLoss", "DistillationGPTModel"]

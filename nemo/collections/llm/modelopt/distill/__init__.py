"""Knowledge distillation of Megatron-Core GPT models through ModelOpt."""

from .loss import HiddenStateCosineLoss, LogitsKLLoss, MSELoss
from .model import DistillationGPTModel
from .recorded.record import dump_teacher_topk

__all__ = ["LogitsKLLoss", "MSELoss", "HiddenStateCosineLoss", "DistillationGPTModel", "dump_teacher_topk"]

"""Speculative decoding: draft heads that modelopt adds to a GPT model."""

from .model_transform import apply_speculative_decoding

__all__ = ["apply_speculative_decoding"]

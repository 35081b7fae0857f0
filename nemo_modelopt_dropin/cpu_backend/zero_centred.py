"""Provide norms whose stored weight is the factor minus one, as Transformer Engine's zero-centred norms."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class ZeroCentredRMSNorm(nn.RMSNorm):
    """Scale by ``1 + weight`` after dividing by the root mean square; a weight of zero changes nothing."""

    def reset_parameters(self) -> None:
        """Set the weight to zero, which is a factor of one."""
        nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised activations `[..., h]`."""
        return functional.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


class ZeroCentredLayerNorm(nn.LayerNorm):
    """Scale by ``1 + weight`` after dividing by the standard deviation; a weight of zero changes nothing."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero, which is a factor of one."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised activations `[..., h]`."""
        return functional.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)

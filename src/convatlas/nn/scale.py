"""Learned scales of residual branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LayerScale"]


class LayerScale(nn.Module):
    """Multiply each channel by a learned factor that starts small, so that a deep network begins near the identity.

    Touvron et al.: "Going deeper with Image Transformers", ICCV 2021, arXiv 2103.17239, equation 4.

    Args:
        channels: number of channels.
        init: initial value of every factor.
        channel_dim: axis of the channels in the input.
    """

    def __init__(self, channels: int, init: float = 1e-6, *, channel_dim: int = 1) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), float(init)))
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, ...), or channels on ``channel_dim``, to the same shape."""
        after = x.dim() - 1 - self.channel_dim % x.dim()
        return x * self.gamma.reshape(-1, *[1] * after)

    def extra_repr(self) -> str:
        """Show the number of channels."""
        return f"{self.gamma.numel()}"

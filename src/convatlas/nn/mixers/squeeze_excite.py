"""Squeeze and excitation: the channel attention that others are compared with.

Hu, Shen, Sun: "Squeeze-and-Excitation Networks", CVPR 2018, arXiv 1709.01507.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SqueezeExcite"]


class SqueezeExcite(nn.Module):
    """Scale each channel by sigmoid(W2 relu(W1 mean(x))) with a bottleneck of channels / reduction.

    Args:
        channels: channels C of the input.
        reduction: factor between C and the width of the bottleneck.
        device, dtype: of the parameters.

    Raises:
        ValueError: reduction is smaller than 1, or the bottleneck would have no channel.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reduction < 1 or channels // reduction < 1:
            raise ValueError(f"channels // reduction must be at least 1, got {channels} // {reduction}")
        self.fc1 = nn.Linear(channels, channels // reduction, device=device, dtype=dtype)
        self.fc2 = nn.Linear(channels // reduction, channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, ...) to the same shape."""
        if x.dim() < 3 or x.shape[1] != self.fc1.in_features:
            raise ValueError(f"x must be (B, {self.fc1.in_features}, ...), got {tuple(x.shape)}")
        gate = self.fc2(self.fc1(x.mean(tuple(range(2, x.dim())))).relu()).sigmoid()
        return x * gate.reshape(*gate.shape, *[1] * (x.dim() - 2))

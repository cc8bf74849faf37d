"""Normalisation that torch lacks or lays out otherwise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ChannelLayerNorm", "Float32LayerNorm", "GlobalResponseNorm", "ScalarLayerNorm"]


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalisation over the channels of a channels-first map, at each position on its own.

    The parameters are those of `torch.nn.LayerNorm` over one axis: weight (C) and bias (C).

    Args:
        channels: number of channels.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, ...) to the same shape."""
        moved = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return moved.movedim(-1, 1)


class Float32LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last axis that computes half precision in float32 and gives back the input's dtype.

    Under autocast, too, the output has the dtype of the input, as in the code of CLIP and CvT.

    Args:
        channels: size of the last axis.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., C) to the same shape."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = F.layer_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps)
        return wide.to(x.dtype)


class GlobalResponseNorm(nn.Module):
    """Scale each channel by how strong it is over the positions, compared with the mean channel; channels are last.

    Woo et al.: "ConvNeXt V2", CVPR 2023, arXiv 2301.00808, section 3: with G the L2 norm of a channel over all
    positions and N = G / (mean of G over the channels + eps), y = (gamma N + 1) x + beta. It begins as the identity.

    Args:
        channels: size of the last axis.
        eps: added to the mean.
        bias: whether there is a beta.
    """

    def __init__(self, channels: int, eps: float = 1e-6, *, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        # Four axes, as published: parameters of one axis are left out of weight decay, these are not.
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        strength = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        relative = strength / (strength.mean(-1, keepdim=True) + self.eps)
        y = x * (self.gamma * relative + 1)
        return y if self.beta is None else y + self.beta


class ScalarLayerNorm(nn.Module):
    """Layer normalisation over the channels of a channels-first map, with one scale and one shift for all channels.

    y = scale / std * (x - mean + shift) at each position, with the biased standard deviation and nothing added to it,
    as in the code of S4 (Gu, Goel, Re, ICLR 2022, arXiv 2111.00396); one channel has no standard deviation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, ...) to the same shape; half precision is computed in float32."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        std, mean = torch.std_mean(wide, dim=1, correction=0, keepdim=True)
        return (self.scale / std * (wide - mean + self.shift)).to(x.dtype)

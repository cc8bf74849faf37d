"""Normalisation that torch lacks or lays out otherwise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ChannelLayerNorm", "Float32LayerNorm"]


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

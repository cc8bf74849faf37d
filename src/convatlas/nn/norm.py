"""Normalisation that torch lacks or lays out otherwise."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.ops.precision import without_autocast

__all__ = [
    "ChannelLayerNorm",
    "CumulativeLayerNorm",
    "CumulativeMoments",
    "Float32LayerNorm",
    "GlobalResponseNorm",
    "ScalarLayerNorm",
]


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


class CumulativeMoments(NamedTuple):
    """What `CumulativeLayerNorm` remembers of the frames so far.

    Attributes:
        count: values so far, a scalar float64.
        total: their sum (B,), float64.
        squares: the sum of their squares (B,), float64.
    """

    count: Tensor
    total: Tensor
    squares: Tensor


class CumulativeLayerNorm(nn.Module):
    """Layer normalisation over all channels and all frames up to the present one: causal, for signals (B, C, K).

    y_k = (x_k - mean_k) / sqrt(var_k + eps) * weight + bias, with mean and biased variance of x_0 ... x_k (Luo,
    Mesgarani: "Conv-TasNet", arXiv 1809.07454, equation 14). Sums run in float64, so that hours do not lose digits.

    Args:
        channels: number of channels C.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def initial_state(self, batch: int = 1) -> CumulativeMoments:
        """No frames."""
        nothing = torch.zeros(batch, dtype=torch.float64, device=self.weight.device)
        return CumulativeMoments(nothing.new_zeros(()), nothing, nothing)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, K) to the same shape; half precision is computed in float32."""
        y, _ = self._normalise(x, None, 1)
        return y

    def step(self, x: Tensor, state: CumulativeMoments) -> tuple[Tensor, CumulativeMoments]:
        """Normalise the next frames, with the channels last: (B, K, C) to the same shape, and what to go on with."""
        return self._normalise(x, state, 2)

    def _normalise(
        self, x: Tensor, state: CumulativeMoments | None, channel_axis: int
    ) -> tuple[Tensor, CumulativeMoments]:
        channels, frames = x.shape[channel_axis], x.shape[3 - channel_axis]
        dtype = torch.promote_types(x.dtype, torch.float32)
        shape = (-1, 1) if channel_axis == 1 else (-1,)
        with without_autocast(x):
            wide = x.to(dtype)
            # Each frame about its own mean: squares of the values themselves would cancel where the mean is large.
            frame_mean = wide.mean(channel_axis, keepdim=True)
            spread = (wide - frame_mean).square().sum(channel_axis).double()
            frame_total = frame_mean.squeeze(channel_axis).double()
            count = channels * torch.arange(1, frames + 1, dtype=torch.float64, device=x.device)
            total = (channels * frame_total).cumsum(1)
            squares = (spread + channels * frame_total.square()).cumsum(1)
            if state is not None:
                count, total = state.count + count, state.total[:, None] + total
                squares = state.squares[:, None] + squares
            mean = total / count
            scale = (squares / count - mean.square()).clamp(min=0).add(self.eps).rsqrt()
            mean, scale = mean.to(dtype).unsqueeze(channel_axis), scale.to(dtype).unsqueeze(channel_axis)
            y = (wide - mean) * scale * self.weight.to(dtype).view(shape) + self.bias.to(dtype).view(shape)
        last = CumulativeMoments(count[-1], total[:, -1], squares[:, -1])
        return y.to(x.dtype), last

    def extra_repr(self) -> str:
        """Show the size."""
        return f"{len(self.weight)}, eps={self.eps:g}"


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

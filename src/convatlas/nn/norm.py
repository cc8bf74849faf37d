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
        frames: number of frames.
        sums: sums over the frames of their means, and of their mean squares: (2, B), float64.
    """

    frames: int
    sums: Tensor


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

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, K) to the same shape; half precision is computed in float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            wide = x.to(dtype)
            # Each frame about its own mean: squares of the values themselves would cancel where the mean is large.
            mean = wide.mean(1, keepdim=True)
            var = (wide - mean).square().mean(1)
            sums = _frame_sums(mean.squeeze(1), var)
            mean, scale = (part.to(dtype).unsqueeze(1) for part in _mean_and_scale(sums, 0, self.eps))
            weight, bias = self.weight.to(dtype)[:, None], self.bias.to(dtype)[:, None]
            return ((wide - mean) * scale * weight + bias).to(x.dtype)

    def initial_state(self, batch: int = 1) -> CumulativeMoments:
        """What `step` needs before the first frame."""
        return CumulativeMoments(0, torch.zeros(2, batch, dtype=torch.float64, device=self.weight.device))

    def step(self, x: Tensor, state: CumulativeMoments) -> tuple[Tensor, CumulativeMoments]:
        """Normalise the next frames, at least one, with the channels last.

        Args:
            x: (B, K, C).
            state: of the frames before.

        Returns:
            (B, K, C), and what to go on with.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            wide = x.to(dtype)
            var, mean = torch.var_mean(wide, 2, correction=0)
            sums = _frame_sums(mean, var) + state.sums[..., None]
            mean, scale = _mean_and_scale(sums, state.frames, self.eps).to(dtype).unsqueeze(3)
            y = torch.addcmul(self.bias.to(dtype), (wide - mean) * scale, self.weight.to(dtype))
        return y.to(x.dtype), CumulativeMoments(state.frames + x.shape[1], sums[..., -1])

    def extra_repr(self) -> str:
        """Show the size."""
        return f"{len(self.weight)}, eps={self.eps:g}"


def _frame_sums(mean: Tensor, var: Tensor) -> Tensor:
    """Running sums of the frames' means and mean squares, (2, B, K) float64, of their means and variances (B, K)."""
    mean = mean.double()
    return torch.stack([mean, torch.addcmul(var.double(), mean, mean)]).cumsum(2)


def _mean_and_scale(sums: Tensor, before: int, eps: float) -> Tensor:
    """Mean and reciprocal deviation (2, B, K) of all values up to each frame, from running sums."""
    count = torch.arange(before + 1, before + sums.shape[2] + 1, dtype=torch.float64, device=sums.device)
    mean, square = (sums / count).unbind(0)
    return torch.stack([mean, torch.addcmul(square, mean, mean, value=-1).clamp(min=0).add(eps).rsqrt()])


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

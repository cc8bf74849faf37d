"""Efficient channel attention: a short convolution over the channel axis of the pooled map gates the channels.

Wang, Wu, Zhu, Li, Zuo, Hu: "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", CVPR 2020,
arXiv 1910.03151, section 3. Also the gates that the paper compares it with (its table 2).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.backend import Backends
from convatlas.ops.precision import without_autocast

__all__ = ["Padding", "channel_gate", "eca", "eca_kernel_size"]

Padding = Literal["zeros", "circular"]


def _auto(y: Tensor, weight: Tensor, *rest: object) -> str:
    # One sample is too little work to pay for several calls; for more, torch's Conv1d with one channel is slow,
    # most of all its backward pass. On a GPU it may also round to TF32.
    return "conv1d" if y.device.type == "cpu" and y.shape[0] == 1 and weight.shape[0] == 1 else "shifts"


_backends = Backends("eca", auto=_auto)


def eca(x: Tensor, weight: Tensor, padding: Padding = "zeros", *, backend: str = "auto") -> Tensor:
    """Scale each channel by the sigmoid of a convolution of the channel means.

    z_c = sum_j w_j y_{c + j - (k - 1) / 2} with y the mean of x over its positions; the result is x * sigmoid(z). Up to
    the sigmoid, half precision is computed in float32, also under autocast.

    Args:
        x: input (B, C, *positions) with one, two or three position axes, floating point.
        weight: (1, 1, k) shared by all channels, or (C, 1, k) with k weights a channel; k odd.
        padding: what lies beyond the first and last channel: ``zeros`` or, as in cECA, ``circular``.
        backend: ``auto``, ``naive`` (the banded C x C matrix of the paper), ``shifts`` (k shifted multiply-adds) or
            ``conv1d`` (torch's convolution, for shared weights).

    Returns:
        The shape and type of x.

    Raises:
        ValueError: x or weight has a wrong shape or type, k is even, or padding is unknown or wider than the channels.
    """
    _check(x, weight, padding)
    y = _channel_means(x)
    return _scaled(x, _backends.run(backend, y, weight.to(y.dtype), padding))


def channel_gate(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Scale each channel by the sigmoid of a linear map of the channel means, within groups of neighbouring channels.

    The result is x * sigmoid(W y) with y the mean of x over its positions and W block-diagonal: SE-Var2 of the paper
    with one channel a group, SE-Var3 with all channels in one group, SE-GC between; without weight, SE-Var1.

    Args:
        x: input (B, C, *positions) with one, two or three position axes, floating point.
        weight: (C, n), the rows of the blocks; channels are in groups of n neighbours. None for the identity.

    Returns:
        The shape and type of x.

    Raises:
        ValueError: x or weight has a wrong shape or type.
    """
    _check_map(x)
    y = _channel_means(x)
    if weight is None:
        return _scaled(x, y)
    channels = x.shape[1]
    if weight.dim() != 2 or weight.shape[0] != channels or not weight.shape[1] or channels % weight.shape[1]:
        raise ValueError(f"weight must be ({channels}, n) with n a divisor of {channels}, got {tuple(weight.shape)}")
    size = weight.shape[1]
    blocks = weight.to(y.dtype).reshape(-1, size, size)
    with without_autocast(y):
        z = torch.einsum("bgi,goi->bgo", y.reshape(len(y), -1, size), blocks)
    return _scaled(x, z.flatten(1))


def eca_kernel_size(channels: int, gamma: float = 2, beta: float = 1) -> int:
    """Kernel size that grows with the logarithm of the channels C: t or, if that is even, t + 1.

    t is |(log2(C) + beta) / gamma| rounded down (paper, equation 12). The networks that its authors released do not
    follow it; they list a size for each stage.

    Raises:
        ValueError: channels is smaller than 1, or gamma is 0.
    """
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    if gamma == 0:
        raise ValueError("gamma must not be 0")
    size = int(abs((math.log2(channels) + beta) / gamma))
    return size if size % 2 else size + 1


def _check_map(x: Tensor) -> None:
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"x must be (B, C, L), (B, C, H, W) or (B, C, D, H, W), got {x.dim()} dimensions")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")


def _check(x: Tensor, weight: Tensor, padding: Padding) -> None:
    _check_map(x)
    channels = x.shape[1]
    if weight.dim() != 3 or weight.shape[0] not in (1, channels) or weight.shape[1] != 1:
        raise ValueError(f"weight must be (1, 1, k) or ({channels}, 1, k), got {tuple(weight.shape)}")
    size = weight.shape[2]
    if size % 2 == 0:
        raise ValueError(f"ECA kernel size must be odd, got {size}")
    if padding not in ("zeros", "circular"):
        raise ValueError(f"padding must be 'zeros' or 'circular', got {padding!r}")
    if padding == "circular" and size // 2 > channels:
        raise ValueError(f"circular padding of {size // 2} needs at least as many channels, got {channels}")


def _channel_means(x: Tensor) -> Tensor:
    # The mean of a large half-precision map needs more digits than the map has.
    return x.mean(dim=tuple(range(2, x.dim())), dtype=torch.promote_types(x.dtype, torch.float32))


def _scaled(x: Tensor, z: Tensor) -> Tensor:
    return x * torch.sigmoid(z).to(x.dtype).reshape(*z.shape, *[1] * (x.dim() - 2))


def _padded(y: Tensor, half: int, padding: Padding) -> Tensor:
    if padding == "zeros":
        return F.pad(y, (half, half))
    return F.pad(y.unsqueeze(1), (half, half), mode="circular").squeeze(1)


@_backends.register("naive")
def _naive(y: Tensor, weight: Tensor, padding: Padding) -> Tensor:
    channels, size = y.shape[1], weight.shape[2]
    rows = torch.arange(channels, device=y.device)
    matrix = y.new_zeros(channels, channels)
    for tap in range(size):
        columns = rows + tap - size // 2
        inside = (columns >= 0) & (columns < channels) | (padding == "circular")
        band = weight[:, 0, tap].expand(channels)
        matrix = matrix.index_put((rows[inside], columns[inside] % channels), band[inside], accumulate=True)
    with without_autocast(y):
        return y @ matrix.T


@_backends.register("shifts")
def _shifts(y: Tensor, weight: Tensor, padding: Padding) -> Tensor:
    channels, size = y.shape[1], weight.shape[2]
    padded = _padded(y, size // 2, padding)
    z = padded[:, :channels] * weight[:, 0, 0]
    for tap in range(1, size):
        z = torch.addcmul(z, padded[:, tap : tap + channels], weight[:, 0, tap])
    return z


def _conv1d_refuses(y: Tensor, weight: Tensor, *rest: object) -> str | None:
    return None if weight.shape[0] == 1 else "it needs one kernel for all channels"


@_backends.register("conv1d", refuses=_conv1d_refuses)
def _conv1d(y: Tensor, weight: Tensor, padding: Padding) -> Tensor:
    with without_autocast(y):
        return F.conv1d(_padded(y, weight.shape[2] // 2, padding).unsqueeze(1), weight).squeeze(1)

"""Recursive gated convolution and the global-local filter: the token mixers of HorNet.

Rao, Zhao, Tang, Zhou, Lim, Lu: "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions",
NeurIPS 2022, arXiv 2207.14284, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from convatlas.nn.depthwise import DepthwiseConv1d, DepthwiseConv2d, DepthwiseConv3d
from convatlas.nn.norm import ChannelLayerNorm
from convatlas.ops.global_filter import global_filter

__all__ = ["GlobalLocalFilter", "RecursiveGatedConv", "gate_widths"]

_CONVS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_DEPTHWISE: dict[int, Any] = {1: DepthwiseConv1d, 2: DepthwiseConv2d, 3: DepthwiseConv3d}


def gate_widths(channels: int, order: int) -> tuple[int, ...]:
    """Channels of each of the ``order`` gates, from C / 2^(order - 1) to C, doubled from one to the next.

    Raises:
        ValueError: order is smaller than 1, or channels are not divisible by 2^(order - 1).
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    if channels < 1 or channels % 2 ** (order - 1):
        raise ValueError(f"channels must be divisible by 2**(order - 1) = {2 ** (order - 1)}, got {channels}")
    return tuple(channels // 2 ** (order - 1 - index) for index in range(order))


class RecursiveGatedConv(nn.Module):
    """g^n Conv: features are multiplied n times by depthwise-convolved ones, from few channels to many (equation 4).

    p_0 and q = proj_in(x); the filter of all q_k at once, times the scale; p_1 = p_0 * q_0, p_{k+2} = pws_k(p_{k+1}) *
    q_{k+1}; proj_out(p_n). There is no other non-linearity: each output is a polynomial of degree n + 1 of the inputs.

    Args:
        channels: channels C, divisible by 2^(order - 1).
        order: number n of gates.
        scale: factor of the filtered features, which keeps the nested products small in half precision.
        kernel_size: odd side of the depthwise convolution.
        dims: number of position axes.
        make_filter: makes another filter than the depthwise convolution from its channels, such as a
            `GlobalLocalFilter`; it keeps the shape.

    Raises:
        ValueError: order is smaller than 1, channels are not divisible, kernel_size is even, or dims is not 1, 2 or 3.
    """

    def __init__(
        self,
        channels: int,
        *,
        order: int = 5,
        scale: float = 1.0,
        kernel_size: int = 7,
        dims: int = 2,
        make_filter: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        widths = gate_widths(channels, order)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if dims not in _CONVS:
            raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
        conv = _CONVS[dims]
        self.channels, self.order, self.scale, self.dims = channels, order, scale, dims
        self.widths = widths
        self.proj_in = conv(channels, 2 * channels, 1)
        total = sum(widths)
        self.dwconv: nn.Module = (
            make_filter(total) if make_filter else _DEPTHWISE[dims](total, total, kernel_size, padding=kernel_size // 2)
        )
        self.pws = nn.ModuleList(conv(before, after, 1) for before, after in pairwise(widths))
        self.proj_out = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, *positions) to the same shape."""
        if x.dim() != self.dims + 2 or x.shape[1] != self.channels:
            raise ValueError(
                f"x must be (B, {self.channels}, ...) with {self.dims} position axes, got {tuple(x.shape)}"
            )
        p, q = self.proj_in(x).split((self.widths[0], sum(self.widths)), dim=1)
        gates = (self.dwconv(q) * self.scale).split(self.widths, dim=1)
        p = p * gates[0]
        for project, gate in zip(self.pws, gates[1:], strict=True):
            p = project(p) * gate
        return self.proj_out(p)

    def extra_repr(self) -> str:
        """Show order and scale."""
        return f"order={self.order}, scale={self.scale:g}"


class GlobalLocalFilter(nn.Module):
    """Half of the channels by a 3x3 depthwise convolution, half by a global filter, in turn; a norm before and behind.

    Args:
        channels: even number of channels.
        grid: frequencies of the filter, (h, w) with w = W // 2 + 1 for maps of (h, W); for other maps it is resized.

    Raises:
        ValueError: channels is odd, or the grid is not two positive numbers.
    """

    def __init__(self, channels: int, grid: Sequence[int] = (14, 8)) -> None:
        super().__init__()
        if channels < 2 or channels % 2:
            raise ValueError(f"channels must be even, got {channels}")
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"grid must be two positive numbers, got {tuple(grid)}")
        self.channels = channels
        half = channels // 2
        self.pre_norm = ChannelLayerNorm(channels)
        self.dw = DepthwiseConv2d(half, half, 3, padding=1, bias=False)
        self.complex_weight = nn.Parameter(torch.empty(half, *grid, 2))
        nn.init.trunc_normal_(self.complex_weight, std=0.02)
        self.post_norm = ChannelLayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (B, {self.channels}, H, W), got {tuple(x.shape)}")
        local, wide = self.pre_norm(x).chunk(2, dim=1)
        # Channel by channel in turn: the order in which the published weights expect the two halves.
        both = torch.stack([self.dw(local), global_filter(wide, self.complex_weight)], dim=2)
        return self.post_norm(both.flatten(1, 2))

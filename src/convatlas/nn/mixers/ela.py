"""Efficient local attention, and the coordinate attention that it improves on.

Xu, Wan: "ELA: Efficient Local Attention for Deep Convolutional Neural Networks", 2024, arXiv 2403.01123.
Hou, Zhou, Feng: "Coordinate Attention for Efficient Mobile Network Design", CVPR 2021, arXiv 2103.02907.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.ops.ela import axis_means, ela, scale_axes
from convatlas.weights import Layout

__all__ = ["ELA", "CoordinateAttention"]


@dataclass(frozen=True)
class _Preset:
    kernel_size: int
    channels_per_group: int
    num_groups: int


#: The paper's table of variants.
_PRESETS = {"T": _Preset(5, 1, 32), "B": _Preset(7, 1, 16), "S": _Preset(5, 8, 16), "L": _Preset(7, 8, 16)}


class ELA(nn.Module):
    """Efficient local attention: x times sigmoid(GroupNorm(Conv1d(strip mean))) along each axis.

    One convolution and one normalisation serve all axes, as in the paper's listing, so that the result for an exchanged
    height and width is the exchanged result. C / groups * C * k + 2 C parameters. Along an axis of length one a group
    of one channel has no variance: its gate is then the same for every input.

    Args:
        channels: channels C of the input.
        variant: ``"T"``, ``"B"``, ``"S"`` or ``"L"``: kernel size, groups of the convolution and of the normalisation.
        kernel_size: odd size of the convolution, instead of the variant's.
        groups: of the convolution, instead of the variant's.
        num_groups: of the normalisation, instead of the variant's; ``"auto"`` takes the largest divisor of C that is
            not above it, for channels that it does not divide.
        shared: whether one convolution serves all axes; if not, ``dims`` tells how many there are.
        dims: number of position axes, where they have parameters of their own.

    Raises:
        UnknownName: there is no such variant.
        ValueError: kernel_size is even, or channels are not divisible by the groups.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "common": Layout(
            renames=((r"(^|\.)conv\.weight$", r"\1conv.0.weight"), (r"(^|\.)(gn|norm)\.(\w+)$", r"\1norm.0.\3"))
        )
    }

    def __init__(
        self,
        channels: int,
        *,
        variant: Literal["T", "B", "S", "L"] = "B",
        kernel_size: int | None = None,
        groups: int | None = None,
        num_groups: int | Literal["auto"] | None = None,
        shared: bool = True,
        dims: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if variant not in _PRESETS:
            raise unknown("variant of ELA", variant, _PRESETS)
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        if dims not in (1, 2, 3):
            raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
        preset = _PRESETS[variant]
        kernel_size = kernel_size or preset.kernel_size
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if groups is None:
            if channels % preset.channels_per_group:
                raise ValueError(
                    f"ELA-{variant} needs channels divisible by {preset.channels_per_group}, got {channels}"
                )
            groups = channels // preset.channels_per_group
        if groups < 1 or channels % groups:
            raise ValueError(f"groups must divide the {channels} channels, got {groups}")
        if num_groups == "auto":
            normed = next(count for count in range(preset.num_groups, 0, -1) if channels % count == 0)
        else:
            normed = num_groups or preset.num_groups
        if channels % normed:
            raise ValueError(
                f"ELA-{variant} needs channels divisible by {normed}, got {channels}: "
                "give another num_groups, or num_groups='auto'"
            )
        self.channels, self.groups, self.num_groups = channels, groups, normed
        self.shared = shared
        self.axes = 1 if shared else dims
        place = {"device": device, "dtype": dtype}
        padding = kernel_size // 2
        self.conv = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel_size, padding=padding, groups=groups, bias=False, **place)  # type: ignore[arg-type]
            for _ in range(self.axes)
        )
        self.norm = nn.ModuleList(nn.GroupNorm(normed, channels, **place) for _ in range(self.axes))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, L), (B, C, H, W) or (B, C, D, H, W) to the same shape."""
        if x.dim() < 3 or x.shape[1] != self.channels or not (self.shared or x.dim() - 2 == self.axes):
            axes = "" if self.shared else f" with {self.axes} position axes"
            raise ValueError(f"x must be (B, {self.channels}, ...){axes}, got {tuple(x.shape)}")
        weights = [conv.weight for conv in self.conv]
        scales, shifts = [norm.weight for norm in self.norm], [norm.bias for norm in self.norm]
        return ela(x, weights, scales, shifts, self.groups, self.num_groups)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Show the channels and groups."""
        return f"{self.channels}, groups={self.groups}, num_groups={self.num_groups}, shared={self.shared}"


class CoordinateAttention(nn.Module):
    """Coordinate attention: x times gates along each axis from strip means that are mixed in few channels.

    The means over all axes but one are joined along their length, mapped to M channels by a shared 1x1 convolution,
    batch norm and hard swish, split again, and mapped back to gates by a 1x1 convolution for each axis.

    Args:
        channels: channels C of the input.
        reduction: M is the larger of 8 and C / reduction.
        dims: number of position axes.

    Raises:
        ValueError: channels or reduction is smaller than 1.
    """

    def __init__(self, channels: int, *, reduction: int = 32, dims: int = 2) -> None:
        super().__init__()
        if channels < 1 or reduction < 1:
            raise ValueError(f"channels and reduction must be at least 1, got {channels} and {reduction}")
        hidden = max(8, channels // reduction)
        self.channels = channels
        self.dims = dims
        self.conv = nn.Conv1d(channels, hidden, 1)
        self.norm = nn.BatchNorm1d(hidden)
        self.act = nn.Hardswish()
        self.gates = nn.ModuleList(nn.Conv1d(hidden, channels, 1) for _ in range(dims))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, *positions) with ``dims`` position axes to the same shape."""
        if x.dim() != self.dims + 2 or x.shape[1] != self.channels:
            raise ValueError(
                f"x must be (B, {self.channels}, ...) with {self.dims} position axes, got {tuple(x.shape)}"
            )
        y = self.act(self.norm(self.conv(torch.cat(axis_means(x), dim=2))))
        strips = y.split(list(x.shape[2:]), dim=2)
        return scale_axes(x, [gate(strip).sigmoid() for gate, strip in zip(self.gates, strips, strict=True)])

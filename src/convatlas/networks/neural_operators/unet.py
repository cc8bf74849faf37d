"""The modern U-Net of PDEArena, and the operator that it becomes when its kernels follow the grid.

Gupta, Brandstetter: "Towards Multi-spatiotemporal-scale Generalized PDE Modeling", TMLR 2023, arXiv 2209.15616;
conversion and configuration of Berner et al., 2025, arXiv 2506.10973.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.networks.base import FieldNetwork, FieldNetworkConfig
from convatlas.nn.conv.kernel_interpolation import (
    KernelInterpolatedConv2d,
    KernelInterpolatedConvTranspose2d,
    centred,
)
from convatlas.nn.fields import with_coordinates

__all__ = ["VARIANTS", "ModernUNet", "ModernUNetConfig"]


@dataclass(frozen=True, kw_only=True)
class ModernUNetConfig(FieldNetworkConfig):
    """Config of `ModernUNet`.

    Attributes:
        dim: channels of the first level.
        dim_mults: channels of each level over those of the one before.
        depth: residual blocks of a level on the way down; one more on the way up.
        kernel_size: of all convolutions but those that change the resolution, odd.
        embed_position: whether the network is given the coordinates.
        follow_grid: resize the kernels to the grid of the input, so that they span the same length as on
            ``resolution``; without it they span the same number of points.
        interpolation: of the kernels: ``bilinear`` or ``fourier``.

    Raises:
        ValueError: a value is out of range.
        UnknownName: there is no such interpolation.
    """

    dim: int = 19
    dim_mults: tuple[int, ...] = (1, 2, 2, 3)
    depth: int = 2
    kernel_size: int = 9
    embed_position: bool = True
    follow_grid: bool = False
    interpolation: Literal["bilinear", "fourier"] = "bilinear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dims != 2:
            raise ValueError(f"dims must be 2, got {self.dims}")
        if self.dim < 1 or self.depth < 1 or not self.dim_mults or min(self.dim_mults) < 1:
            raise ValueError(
                f"dim, depth and dim_mults must be at least 1, got {self.dim}, {self.depth} and {self.dim_mults}"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        if self.interpolation not in ("bilinear", "fourier"):
            raise unknown("interpolation", str(self.interpolation), ("bilinear", "fourier"))

    def build(self) -> ModernUNet:
        return ModernUNet(self)


class _ResidualBlock(nn.Module):
    """GELU, convolution, GELU, convolution, and a pointwise convolution past them where the channels differ."""

    def __init__(self, config: ModernUNetConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(config, in_channels, out_channels, config.kernel_size)
        self.conv2 = _conv(config, out_channels, out_channels, config.kernel_size)
        self.shortcut = _conv(config, in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, *scale: tuple[float, float]) -> Tensor:
        h = self.conv2(F.gelu(self.conv1(F.gelu(x), *scale)), *scale)
        y: Tensor = h + (x if self.shortcut is None else self.shortcut(x, *scale))
        return y


class _Level(nn.Module):
    """A residual block under the name that it has in the authors' files."""

    def __init__(self, config: ModernUNetConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.res = _ResidualBlock(config, in_channels, out_channels)

    def forward(self, x: Tensor, *scale: tuple[float, float]) -> Tensor:
        y: Tensor = self.res(x, *scale)
        return y


class _Downsample(nn.Module):
    """Every second point, by a convolution."""

    def __init__(self, config: ModernUNetConfig, channels: int) -> None:
        super().__init__()
        self.conv = _conv(config, channels, channels, 3, stride=2)

    def forward(self, x: Tensor, *scale: tuple[float, float]) -> Tensor:
        y: Tensor = self.conv(x, *scale)
        return y


class _Upsample(nn.Module):
    """Twice the points, by a transposed convolution; its border is cut, and the block behind pads it."""

    def __init__(self, config: ModernUNetConfig, channels: int) -> None:
        super().__init__()
        self.conv: nn.Module = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=2)
        if config.follow_grid:
            self.conv = KernelInterpolatedConvTranspose2d.from_conv(self.conv, interpolation=config.interpolation)

    def forward(self, x: Tensor, *scale: tuple[float, float]) -> Tensor:
        y: Tensor = self.conv(x, *scale)
        return y


class _Middle(nn.Module):
    """Two residual blocks on the coarsest level."""

    def __init__(self, config: ModernUNetConfig, channels: int) -> None:
        super().__init__()
        self.res1 = _ResidualBlock(config, channels, channels)
        self.res2 = _ResidualBlock(config, channels, channels)

    def forward(self, x: Tensor, *scale: tuple[float, float]) -> Tensor:
        y: Tensor = self.res2(self.res1(x, *scale), *scale)
        return y


def _conv(config: ModernUNetConfig, in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Module:
    options: dict[str, Any] = {"stride": stride, "padding": size // 2}
    if not config.follow_grid:
        return nn.Conv2d(in_channels, out_channels, size, **options)
    return KernelInterpolatedConv2d(in_channels, out_channels, size, **options, interpolation=config.interpolation)


class ModernUNet(FieldNetwork):
    """Levels of residual blocks on coarser and coarser grids, and back with the fields from the way down.

    Args:
        config: what to build.
    """

    def __init__(self, config: ModernUNetConfig) -> None:
        super().__init__(config)
        channels = config.dim
        inputs = config.in_channels + 2 * config.embed_position
        self.image_proj = _conv(config, inputs, channels, config.kernel_size)
        down: list[nn.Module] = []
        kept = [channels]  # channels of the fields that the way up gets
        for number, factor in enumerate(config.dim_mults):
            for index in range(config.depth):
                wider = channels if index else channels * factor
                down.append(_Level(config, channels, wider))
                channels = wider
                kept.append(channels)
            if number < len(config.dim_mults) - 1:
                down.append(_Downsample(config, channels))
                kept.append(channels)
        self.down = nn.ModuleList(down)
        self.middle = _Middle(config, channels)
        up: list[nn.Module] = []
        for number, factor in reversed(list(enumerate(config.dim_mults))):
            for index in range(config.depth + 1):
                narrower = channels // factor if index == config.depth else channels
                up.append(_Level(config, channels + kept.pop(), narrower))
                channels = narrower
            if number > 0:
                up.append(_Upsample(config, channels))
        self.up = nn.ModuleList(up)
        self.final = _conv(config, channels, config.out_channels, config.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """The answer (B, out_channels, H, W) to a field (B, in_channels, H, W)."""
        self._check_input(x)
        least = 2 ** (len(self.config.dim_mults) - 1)
        if min(x.shape[2:]) < least:
            raise ValueError(f"x must be at least {least} x {least} points, got {tuple(x.shape)}")
        # Plain convolutions are told nothing, so that others can take their places.
        scale: tuple[tuple[float, float], ...] = ()
        if self.config.follow_grid:
            height, width = (n / base for n, base in zip(x.shape[2:], self.config.grid, strict=True))
            scale = ((height, width),)
        x = self.image_proj(with_coordinates(x) if self.config.embed_position else x, *scale)
        kept = [x]
        for part in self.down:
            x = part(x, *scale)
            kept.append(x)
        x = self.middle(x, *scale)
        for part in self.up:
            if isinstance(part, _Level):
                skip = kept.pop()
                x = torch.cat([skip, centred(x, skip.shape[2:])], 1)
            x = part(x, *scale)
        y: Tensor = self.final(F.gelu(x), *scale)
        return y


VARIANTS: dict[str, ModernUNetConfig] = {
    "modern_unet": ModernUNetConfig(dim=16, dim_mults=(1, 2, 2), kernel_size=3),
    "modern_unet_interpolated": ModernUNetConfig(dim=16, dim_mults=(1, 2, 2), kernel_size=3, follow_grid=True),
    "modern_unet_navier_stokes": ModernUNetConfig(resolution=128),
    "modern_unet_interpolated_navier_stokes": ModernUNetConfig(resolution=128, follow_grid=True),
}

"""NAFNet: a U-Net for restoration without activation functions, plain or with a density in its kernels.

Chen, Chu, Zhang, Sun: "Simple Baselines for Image Restoration", ECCV 2022, arXiv 2204.04676. With a density it is a
network of Cammarasana, Patane: "Optimal Weighted Convolution for Classification and Denosing", 2025, arXiv 2505.24558.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.networks.base import Denoiser, DenoiserConfig
from convatlas.nn.conv.weighted_conv import BEST_DENSITIES, WeightedConv2d
from convatlas.nn.norm import ChannelLayerNorm
from convatlas.weights import Layout

__all__ = ["VARIANTS", "NAFBlock", "NAFNet", "NAFNetConfig", "SimpleGate", "SimplifiedChannelAttention"]

#: Larger than any image: the attention averages over all of it.
_WHOLE_IMAGE = 2**20


@dataclass(frozen=True, kw_only=True)
class NAFNetConfig(DenoiserConfig):
    """Config of `NAFNet`.

    Attributes:
        in_channels: 3 for RGB.
        width: channels at full resolution; they double with each halving of the resolution.
        encoder_depths: blocks of each resolution on the way down.
        middle_depth: blocks at the lowest resolution.
        decoder_depths: blocks of each resolution on the way up.
        density: values of the 3x3 convolutions, the outermost first; plain convolutions when left out.

    Raises:
        ValueError: a value is out of range.
    """

    in_channels: int = 3
    width: int = 32
    encoder_depths: tuple[int, ...] = (2, 2, 4, 8)
    middle_depth: int = 12
    decoder_depths: tuple[int, ...] = (2, 2, 2, 2)
    density: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.encoder_depths) != len(self.decoder_depths):
            raise ValueError(
                f"encoder_depths and decoder_depths must be of the same length, got {self.encoder_depths} and "
                f"{self.decoder_depths}"
            )
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width must be even, got {self.width}")

    def build(self) -> NAFNet:
        return NAFNet(self)


class SimpleGate(nn.Module):
    """The product of the two halves of the channels (paper, equation 4)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 2 C, H, W) to (B, C, H, W)."""
        first, second = x.chunk(2, dim=1)
        return first * second


class SimplifiedChannelAttention(nn.Module):
    """Channels scaled by a linear map of their means (paper, equation 6).

    Args:
        channels: of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape of x (B, C, H, W)."""
        return x * self.conv(x.mean((2, 3), keepdim=True))


class NAFBlock(nn.Module):
    """A gated depthwise convolution with attention, then a gated pointwise one; each a residual (paper, figure 3).

    Args:
        channels: of the map.
        density: of the depthwise convolution.
    """

    def __init__(self, channels: int, density: Sequence[float] | None = None) -> None:
        super().__init__()
        self.norm1 = ChannelLayerNorm(channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv2 = _conv3x3(2 * channels, 2 * channels, density, groups=2 * channels)
        self.gate = SimpleGate()
        self.sca = SimplifiedChannelAttention(channels)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.norm2 = ChannelLayerNorm(channels, eps=1e-6)
        self.conv4 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape of x (B, C, H, W)."""
        x = x + self.beta * self.conv3(self.sca(self.gate(self.conv2(self.conv1(self.norm1(x))))))
        return x + self.gamma * self.conv5(self.gate(self.conv4(self.norm2(x))))


class NAFNet(Denoiser):
    """A U-Net of `NAFBlock` that adds what it computes to the image; images are filled up with zeros to whole blocks.

    Args:
        config: what to build.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": Layout(renames=((r"(^|\.)sca\.1\.", r"\1sca.conv."),))}

    def __init__(self, config: NAFNetConfig) -> None:
        super().__init__(config)
        width, density = config.width, config.density
        self.intro = _conv3x3(config.in_channels, width, density)
        self.ending = _conv3x3(width, config.in_channels, density)
        self.encoders, self.downs = nn.ModuleList(), nn.ModuleList()
        self.decoders, self.ups = nn.ModuleList(), nn.ModuleList()
        for depth in config.encoder_depths:
            self.encoders.append(nn.Sequential(*(NAFBlock(width, density) for _ in range(depth))))
            self.downs.append(nn.Conv2d(width, 2 * width, 2, 2))
            width *= 2
        self.middle_blks = nn.Sequential(*(NAFBlock(width, density) for _ in range(config.middle_depth)))
        for depth in config.decoder_depths:
            self.ups.append(nn.Sequential(nn.Conv2d(width, 2 * width, 1, bias=False), nn.PixelShuffle(2)))
            width //= 2
            self.decoders.append(nn.Sequential(*(NAFBlock(width, density) for _ in range(depth))))

    @property
    def reach(self) -> int:
        return _WHOLE_IMAGE

    def forward(self, x: Tensor) -> Tensor:
        """The clean image (B, in_channels, H, W)."""
        self._check_input(x)
        height, width = x.shape[2:]
        step = 2 ** len(self.encoders)
        x = F.pad(x, (0, -width % step, 0, -height % step))
        y, kept = self.intro(x), []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            y = encoder(y)
            kept.append(y)
            y = down(y)
        y = self.middle_blks(y)
        for decoder, up, skip in zip(self.decoders, self.ups, reversed(kept), strict=True):
            y = decoder(up(y) + skip)
        return (self.ending(y) + x)[:, :, :height, :width]


def _conv3x3(in_channels: int, out_channels: int, density: Sequence[float] | None, groups: int = 1) -> nn.Module:
    if density is None:
        return nn.Conv2d(in_channels, out_channels, 3, padding=1, groups=groups)
    return WeightedConv2d(in_channels, out_channels, 3, padding=1, groups=groups, density=density)


_DEBLURRING = {"encoder_depths": (1, 1, 1, 28), "middle_depth": 1, "decoder_depths": (1, 1, 1, 1)}

VARIANTS: dict[str, NAFNetConfig] = {
    "nafnet_width32": NAFNetConfig(),
    "nafnet_width64": NAFNetConfig(width=64),
    "nafnet_gopro_width32": NAFNetConfig(**_DEBLURRING),  # type: ignore[arg-type]
    "nafnet_gopro_width64": NAFNetConfig(width=64, **_DEBLURRING),  # type: ignore[arg-type]
    "nafnet_weighted_width32": NAFNetConfig(density=BEST_DENSITIES[3]),
}

"""WaveMix blocks: tokens mixed by a wavelet transform, which needs no attention and loses nothing.

Jeevan, Viswanathan, Anandu, Sethi: "WaveMix: A Resource-efficient Neural Network for Image Analysis", 2022,
arXiv 2205.14375.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.ops.wavelet_filters import Wavelet, find_wavelet
from convatlas.ops.wavelets import Mode, dwt
from convatlas.weights import Layout

__all__ = ["WaveMixBlock", "WaveMixBlockV1", "WaveMixBlockV3"]


class _Block(nn.Module):
    """The first half of every version: a 1x1 convolution to C / 4 channels, and its wavelet transform."""

    def __init__(self, channels: int, levels: int, wavelet: str | Wavelet, mode: Mode | None) -> None:
        super().__init__()
        if channels < 4 or channels % 4:
            raise ValueError(f"channels must be divisible by 4, got {channels}")
        if mode is not None and mode not in get_args(Mode):
            raise unknown("mode", mode, get_args(Mode))
        self.wavelet = find_wavelet(wavelet) if isinstance(wavelet, str) else wavelet
        if self.wavelet.length > 2 and mode != "periodization":
            raise ValueError(f"{self.wavelet.name} halves a map only with mode 'periodization', got {mode!r}")
        self.channels = channels
        self.levels = levels
        self.mode = mode
        self.reduction = nn.Conv2d(channels, channels // 4, 1)

    def _tokens(self, x: Tensor) -> list[Tensor]:
        """For each level, finest first, the bands as C channels: the low one, then LH, HL and HH of each channel."""
        self._check(x)
        z, tokens = self.reduction(x), []
        for _ in range(self.levels):
            low, horizontal, vertical, diagonal = dwt(z, self.wavelet, self.mode or "zero").unbind(2)
            # LH is the band that is smooth along the width.
            high = torch.stack([vertical, horizontal, diagonal], dim=2).flatten(1, 2)
            tokens.append(torch.cat([low, high], dim=1))
            z = low
        return tokens

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (B, {self.channels}, H, W), got {tuple(x.shape)}")
        step = 2**self.levels
        if self.mode is None and (x.shape[2] % step or x.shape[3] % step):
            raise ValueError(
                f"spatial size must be divisible by {step}, got {x.shape[2]} x {x.shape[3]}; "
                "mode='reflect' takes any size"
            )

    def extra_repr(self) -> str:
        """Show channels, levels, wavelet and mode."""
        return f"{self.channels}, level={self.levels}, wavelet={self.wavelet.name!r}, mode={self.mode!r}"


class WaveMixBlock(_Block):
    """The block of the released networks (paper, figure 1): wavelet bands of each level, mixed and enlarged again.

    Of x, reduced to C / 4 channels, w_j are the C sub-bands of level j. From the coarsest level upwards,
    u_j = F_j([w_j, u_(j+1)]), where F is 1x1 convolution, GELU, dropout, 1x1 convolution, transposed convolution that
    doubles the size, batch norm. The result is u_1; a network adds its input to it. With one level: WaveMix-Lite.

    Args:
        channels: channels C of input and output, divisible by 4.
        ff_channels: channels between the 1x1 and the transposed convolution; C when left out.
        mult: hidden width over C.
        level: number of levels, 1 to 4.
        dropout: rate behind GELU.
        wavelet: name of a wavelet, or one of your own; the paper's is Haar. A longer one needs mode ``periodization``.
        mode: what lies beyond the border where sizes are odd, see `convatlas.ops.wavelets.Mode`; sizes that 2^level
            does not divide are refused when left out.

    Raises:
        ValueError: channels, level or wavelet is none of these.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(
            renames=(
                (r"(^|\.)feedforward(\d)\.", r"\1feedforward.\2."),
                (r"(^|\.)feedforward\.(\d\.\w+)$", r"\1feedforward.1.\2"),
            )
        )
    }

    def __init__(
        self,
        channels: int,
        *,
        ff_channels: int | None = None,
        mult: int = 2,
        level: int = 1,
        dropout: float = 0.5,
        wavelet: str | Wavelet = "haar",
        mode: Mode | None = None,
    ) -> None:
        if level not in (1, 2, 3, 4):
            raise ValueError(f"level must be from 1 to 4, got {level}")
        super().__init__(channels, level, wavelet, mode)
        width = ff_channels or channels

        def mixer(j: int) -> nn.Sequential:
            in_channels = channels if j == level else channels + channels // 2
            out_channels = channels if j == 1 else channels // 2
            return nn.Sequential(
                *_feedforward(in_channels, mult * channels, width, dropout),
                nn.ConvTranspose2d(width, out_channels, 4, stride=2, padding=1),
                nn.BatchNorm2d(out_channels),
            )

        self.feedforward = nn.ModuleDict({str(j): mixer(j) for j in range(1, level + 1)})

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        tokens = self._tokens(x)
        u = tokens[-1]
        for j in range(self.levels, 0, -1):
            if j < self.levels:
                u = torch.cat([tokens[j - 1], u], dim=1)
            u = _cropped(self.feedforward[str(j)](u), x if j == 1 else tokens[j - 2])
        return u


class WaveMixBlockV1(_Block):
    """Version 1: one feed-forward part for all four levels, each enlarged to the full size at once.

    The levels' results, C / 4 channels each, go through a 5x5 depthwise convolution, GELU and batch norm. No weights
    were released.

    Args:
        channels, ff_channels, mult, dropout, wavelet, mode: as for `WaveMixBlock`; sizes are divisible by 16.
    """

    def __init__(
        self,
        channels: int,
        *,
        ff_channels: int | None = None,
        mult: int = 2,
        dropout: float = 0.5,
        wavelet: str | Wavelet = "haar",
        mode: Mode | None = None,
    ) -> None:
        super().__init__(channels, 4, wavelet, mode)
        width = ff_channels or channels
        self.feedforward = nn.Sequential(*_feedforward(channels, mult * channels, width, dropout))
        self.upsample = nn.ModuleList(
            nn.ConvTranspose2d(width, channels // 4, stride + 2, stride=stride, padding=1) for stride in (2, 4, 8, 16)
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(channels, channels, 5, padding="same", groups=channels), nn.GELU(), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        pairs = zip(self.upsample, self._tokens(x), strict=True)
        maps = [_cropped(upsample(self.feedforward(tokens)), x) for upsample, tokens in pairs]
        return self.depthwise(torch.cat(maps, dim=1))


class WaveMixBlockV3(_Block):
    """Version 3: one level, enlarged by a pixel shuffle and a 3x3 convolution. No weights were released.

    Args:
        channels, dropout, wavelet, mode: as for `WaveMixBlock`.
        mult: hidden width over C, divisible by 4 after multiplication; with 4 the shuffled map has C channels.

    Raises:
        ValueError: the hidden width is not divisible by 4.
    """

    def __init__(
        self,
        channels: int,
        *,
        mult: int = 4,
        dropout: float = 0.5,
        wavelet: str | Wavelet = "haar",
        mode: Mode | None = None,
    ) -> None:
        super().__init__(channels, 1, wavelet, mode)
        hidden = mult * channels
        self.feedforward = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.PixelShuffle(2),
            nn.Conv2d(hidden // 4, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        (tokens,) = self._tokens(x)
        return _cropped(self.feedforward(tokens), x)


def _feedforward(in_channels: int, hidden: int, out_channels: int, dropout: float) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(in_channels, hidden, 1),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Conv2d(hidden, out_channels, 1),
    )


def _cropped(x: Tensor, like: Tensor) -> Tensor:
    return x[..., : like.shape[2], : like.shape[3]]

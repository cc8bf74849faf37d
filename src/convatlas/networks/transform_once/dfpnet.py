"""DFPNet: the U-Net that predicts flows around airfoils, for images or for a square of modes.

Thuerey, Weissenow, Prantl, Hu: "Deep Learning Methods for Reynolds-Averaged Navier-Stokes Simulations of Airfoil
Flows", AIAA Journal 2020, arXiv 1810.08217; in other sizes in Poli et al.: "Transform Once", NeurIPS 2022, arXiv
2211.14453.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from convatlas.networks.base import FieldNetwork, FieldNetworkConfig

__all__ = ["DFPNet", "DFPNetConfig"]


class _Level(NamedTuple):
    """One level below the first: a strided convolution down, an upsampling and a convolution back.

    Attributes:
        kernel, padding: of the convolution down, whose stride is 2.
        up: factor of the upsampling.
        up_kernel, up_padding: of the convolution after it.
    """

    kernel: int
    padding: int
    up: int
    up_kernel: int
    up_padding: int


_HALVED = _Level(4, 1, 2, 3, 1)

#: The levels 2, 2b, 3, 4, 5 and 6 by side of the square. That of 24 is Transform Once's and that of 128 the original
#: one; what the paper does for 36, 64 and 224 is not published in a form that could be checked, and these are ours.
_LEVELS: Mapping[int, tuple[_Level, ...]] = {
    24: (
        *(_HALVED, _HALVED),  # 12 -> 6 -> 3
        *(_Level(2, 2, 1, 3, 1), _Level(2, 2, 1, 3, 1)),  # -> 3 -> 3
        *(_Level(2, 3, 1, 2, 0), _Level(3, 0, 2, 1, 1)),  # -> 4 -> 1
    ),
    36: (
        *(_HALVED, _Level(4, 1, 2, 2, 1)),  # 18 -> 9 -> 4
        *(_HALVED, _Level(2, 1, 1, 3, 1)),  # -> 2 -> 2
        *(_Level(2, 1, 1, 1, 0), _Level(2, 0, 2, 1, 0)),  # -> 2 -> 1
    ),
    64: (
        *(_HALVED, _HALVED, _HALVED, _HALVED),  # 32 -> 16 -> 8 -> 4 -> 2
        *(_Level(2, 1, 1, 1, 0), _Level(2, 0, 2, 1, 0)),  # -> 2 -> 1
    ),
    128: (
        *(_HALVED, _HALVED, _HALVED),  # 64 -> 32 -> 16 -> 8
        *(_Level(2, 0, 2, 3, 1), _Level(2, 0, 2, 1, 0), _Level(2, 0, 2, 1, 0)),  # -> 4 -> 2 -> 1
    ),
    224: (
        *(_HALVED, _HALVED, _HALVED, _HALVED),  # 112 -> 56 -> 28 -> 14 -> 7
        *(_Level(4, 1, 2, 2, 1), _Level(3, 0, 3, 1, 0)),  # -> 3 -> 1
    ),
}
_NAMES = ("2", "2b", "3", "4", "5", "6")
#: Channels after each level down and before it on the way back, in multiples of the first level's.
_WIDTHS = (1, 2, 2, 4, 8, 8, 8)


@dataclass(frozen=True, kw_only=True)
class DFPNetConfig(FieldNetworkConfig):
    """Config of `DFPNet`.

    Attributes:
        resolution: side of the square: 24, 36, 64, 128 or 224.
        channel_exponent: the first level has 2 ** channel_exponent channels.

    Raises:
        ValueError: a value is out of range.
    """

    resolution: int | tuple[int, ...] = 128
    channel_exponent: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dims != 2 or self.grid[0] != self.grid[1] or self.grid[0] not in _LEVELS:
            sides = ", ".join(map(str, _LEVELS))
            raise ValueError(f"resolution must be one of {sides} on both of two axes, got {self.resolution}")
        if self.channel_exponent < 0:
            raise ValueError(f"channel_exponent must not be negative, got {self.channel_exponent}")

    def build(self) -> DFPNet:
        return DFPNet(self)


class DFPNet(FieldNetwork):
    """Seven strided convolutions down to one point and as many steps back, each beside the map of its level.

    Args:
        config: what to build.
    """

    config: DFPNetConfig

    def __init__(self, config: DFPNetConfig) -> None:
        super().__init__(config)
        first = 2**config.channel_exponent
        widths = [first * width for width in _WIDTHS]
        self.layer1 = nn.Sequential(OrderedDict(layer1_conv=nn.Conv2d(config.in_channels, first, 4, 2, 1)))
        levels = _LEVELS[config.grid[0]]
        for place, (name, level) in enumerate(zip(_NAMES, levels, strict=True), 1):
            lowest = place == len(levels)
            down = nn.Conv2d(widths[place - 1], widths[place], level.kernel, 2, level.padding)
            parts: dict[str, nn.Module] = {"act": nn.LeakyReLU(0.2), f"layer{name}_conv": down}
            if not lowest:
                parts[f"layer{name}_bn"] = nn.BatchNorm2d(widths[place])
            self.add_module(f"layer{name}", nn.Sequential(OrderedDict(parts)))
            wide = widths[place] * (1 if lowest else 2)
            up: dict[str, nn.Module] = {
                "act": nn.ReLU(),
                "upsample": nn.Upsample(scale_factor=level.up, mode="bilinear"),
                f"dlayer{name}_tconv": nn.Conv2d(wide, widths[place - 1], level.up_kernel, 1, level.up_padding),
                f"dlayer{name}_bn": nn.BatchNorm2d(widths[place - 1]),
            }
            self.add_module(f"dlayer{name}", nn.Sequential(OrderedDict(up)))
        last = nn.ConvTranspose2d(2 * first, config.out_channels, 4, 2, 1)
        self.dlayer1 = nn.Sequential(OrderedDict(act=nn.ReLU(), dlayer1_tconv=last))

    def forward(self, x: Tensor) -> Tensor:
        """A field (B, out_channels, n, n) of a field (B, in_channels, n, n), n the resolution.

        Raises:
            ValueError: x has a wrong shape or is not real.
        """
        self._check_input(x)
        if not self.takes(x.shape[2:]):
            wanted = " x ".join(map(str, self.config.grid))
            raise ValueError(f"x must have {wanted} points, got {' x '.join(map(str, x.shape[2:]))}")
        return self.net(x)

    def takes(self, grid: Sequence[int]) -> bool:
        return tuple(grid) == self.config.grid

    def net(self, x: Tensor) -> Tensor:
        """`forward` without its checks."""
        maps = [self.layer1(x)]
        for name in _NAMES:
            maps.append(self.get_submodule(f"layer{name}")(maps[-1]))
        y = self.get_submodule("dlayer6")(maps.pop())
        for name in reversed(_NAMES[:-1]):
            y = self.get_submodule(f"dlayer{name}")(torch.cat([y, maps.pop()], 1))
        return self.dlayer1(torch.cat([y, maps.pop()], 1))

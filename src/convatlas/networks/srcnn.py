"""SRCNN: super-resolution by three convolutions on the image that bicubic interpolation has enlarged.

Dong, Loy, He, Tang: "Image Super-Resolution Using Deep Convolutional Networks", TPAMI 2016, arXiv 1501.00092. The
network that ESPCN is compared with: all layers work at high resolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.networks.base import Upscaler, UpscalerConfig
from convatlas.ops.resize import resize

__all__ = ["SRCNN", "VARIANTS", "SRCNNConfig"]

_CONVENTIONS = ("matlab", "pillow")
_BICUBIC_REACH = 3  # pixels before the interpolation


@dataclass(frozen=True, kw_only=True)
class SRCNNConfig(UpscalerConfig):
    """Config of `SRCNN`.

    Attributes:
        dims: n1 and n2 of the paper, the channels of the two hidden layers.
        kernel_sizes: f1, f2 and f3 of the paper, odd.
        convention: whose bicubic interpolation enlarges the image.

    Raises:
        ValueError: a value is out of range.
    """

    dims: tuple[int, int] = (64, 32)
    kernel_sizes: tuple[int, int, int] = (9, 1, 5)
    convention: Literal["matlab", "pillow"] = "matlab"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.dims) != 2 or min(self.dims) < 1:
            raise ValueError(f"dims must be two numbers of at least 1, got {self.dims}")
        if len(self.kernel_sizes) != 3 or any(size < 1 or size % 2 == 0 for size in self.kernel_sizes):
            raise ValueError(f"kernel_sizes must be three odd numbers, got {self.kernel_sizes}")
        if self.convention not in _CONVENTIONS:
            raise unknown("convention", self.convention, _CONVENTIONS)

    def build(self) -> SRCNN:
        return SRCNN(self)


class SRCNN(Upscaler):
    """Bicubic enlargement; then patch extraction, non-linear mapping and reconstruction (paper, equations 1 to 3).

    Padded with zeros, so that the result keeps the size of the enlarged image.

    Args:
        config: what to build.
    """

    def __init__(self, config: SRCNNConfig) -> None:
        super().__init__(config)
        first, second, third = config.kernel_sizes
        wide, narrow = config.dims
        self.layers = nn.Sequential(
            nn.Conv2d(config.in_channels, wide, first, padding=first // 2),
            nn.ReLU(),
            nn.Conv2d(wide, narrow, second, padding=second // 2),
            nn.ReLU(),
            nn.Conv2d(narrow, config.in_channels, third, padding=third // 2),
        )

    @property
    def reach(self) -> int:
        return _BICUBIC_REACH + math.ceil(sum(size // 2 for size in self.config.kernel_sizes) / self.scale)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        return self.layers(resize(x, scale=self.scale, convention=self.config.convention))


VARIANTS: dict[str, SRCNNConfig] = {
    "srcnn_915_x2": SRCNNConfig(scale=2),
    "srcnn_915_x3": SRCNNConfig(scale=3),
    "srcnn_915_x4": SRCNNConfig(scale=4),
    "srcnn_915_x8": SRCNNConfig(scale=8),
    "srcnn_955_x2": SRCNNConfig(scale=2, kernel_sizes=(9, 5, 5)),
    "srcnn_955_x3": SRCNNConfig(scale=3, kernel_sizes=(9, 5, 5)),
    "srcnn_955_x4": SRCNNConfig(scale=4, kernel_sizes=(9, 5, 5)),
    "srcnn_955_x8": SRCNNConfig(scale=8, kernel_sizes=(9, 5, 5)),
}

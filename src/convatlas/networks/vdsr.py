"""VDSR: a deep chain of convolutions that adds what bicubic interpolation has left out.

Kim, Lee, Lee: "Accurate Image Super-Resolution Using Very Deep Convolutional Networks", CVPR 2016, arXiv 1511.04587.
One network serves all scales: it works on the enlarged image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.networks.base import Upscaler, UpscalerConfig
from convatlas.ops.resize import resize

__all__ = ["VARIANTS", "VDSR", "VDSRConfig"]

_CONVENTIONS = ("matlab", "pillow")
_BICUBIC_REACH = 3  # pixels before the interpolation


@dataclass(frozen=True, kw_only=True)
class VDSRConfig(UpscalerConfig):
    """Config of `VDSR`.

    Attributes:
        depth: convolutions, at least 2.
        dim: channels between them.
        convention: whose bicubic interpolation enlarges the image.

    Raises:
        ValueError: a value is out of range.
    """

    depth: int = 20
    dim: int = 64
    convention: Literal["matlab", "pillow"] = "matlab"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 2 or self.dim < 1:
            raise ValueError(f"depth must be at least 2 and dim at least 1, got {self.depth} and {self.dim}")
        if self.convention not in _CONVENTIONS:
            raise unknown("convention", self.convention, _CONVENTIONS)

    def build(self) -> VDSR:
        return VDSR(self)


class VDSR(Upscaler):
    """Bicubic enlargement plus a residual by convolutions without biases (paper, figure 1).

    Args:
        config: what to build.
    """

    def __init__(self, config: VDSRConfig) -> None:
        super().__init__(config)
        dims = [config.in_channels, *[config.dim] * (config.depth - 1), config.in_channels]
        layers: list[nn.Module] = []
        for given, made in pairwise(dims):
            conv = nn.Conv2d(given, made, 3, padding=1, bias=False)
            nn.init.normal_(conv.weight, std=math.sqrt(2 / (9 * made)))  # He et al., by the channels that come out
            layers += [conv, nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    @property
    def reach(self) -> int:
        return _BICUBIC_REACH + math.ceil(self.config.depth / self.scale)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        enlarged = resize(x, scale=self.scale, convention=self.config.convention)
        return enlarged + self.layers(enlarged)


VARIANTS: dict[str, VDSRConfig] = {
    "vdsr_x2": VDSRConfig(scale=2),
    "vdsr_x3": VDSRConfig(scale=3),
    "vdsr_x4": VDSRConfig(scale=4),
}

"""EDSR: residual blocks without normalisation at low resolution, then a sub-pixel enlargement.

Lim, Son, Kim, Nah, Lee: "Enhanced Deep Residual Networks for Single Image Super-Resolution", CVPR 2017 workshops, arXiv
1707.02921. Images are in [0, 1] and not centred: the authors' checkpoints are for images from 0 to 255.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from convatlas.networks.base import Upscaler, UpscalerConfig
from convatlas.nn.sub_pixel import SubPixelConv2d

__all__ = ["EDSR", "VARIANTS", "EDSRBlock", "EDSRConfig"]

#: Factors of the enlargements one after the other.
_STEPS = {1: (), 2: (2,), 3: (3,), 4: (2, 2), 8: (2, 2, 2)}


@dataclass(frozen=True, kw_only=True)
class EDSRConfig(UpscalerConfig):
    """Config of `EDSR`.

    Attributes:
        scale: 1, 2, 3, 4 or 8; 4 and 8 enlarge 2 times several times.
        in_channels: 3 for RGB.
        dim: channels between the layers.
        depth: number of blocks.
        residual_scale: what a block's result is multiplied by before the block's input is added.

    Raises:
        ValueError: a value is out of range.
    """

    scale: int = 2
    in_channels: int = 3
    dim: int = 64
    depth: int = 16
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in _STEPS:
            raise ValueError(f"scale must be one of {', '.join(map(str, _STEPS))}, got {self.scale}")
        for name in ("dim", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.residual_scale <= 1:
            raise ValueError(f"residual_scale must be in (0, 1], got {self.residual_scale}")

    def build(self) -> EDSR:
        return EDSR(self)


class EDSRBlock(nn.Module):
    """x + residual_scale conv(ReLU(conv(x))) (paper, figure 2c).

    Args:
        dim: channels of the map.
        residual_scale: factor of the residual.
    """

    def __init__(self, dim: int, residual_scale: float = 1.0) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.body = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape of x (B, dim, H, W)."""
        return x + self.residual_scale * self.body(x)


class EDSR(Upscaler):
    """A convolution, blocks with a skip around all of them, sub-pixel convolutions and a last one (paper, figure 3).

    Args:
        config: what to build.
    """

    def __init__(self, config: EDSRConfig) -> None:
        super().__init__(config)
        dim = config.dim
        self.head = nn.Conv2d(config.in_channels, dim, 3, padding=1)
        self.body = nn.Sequential(
            *(EDSRBlock(dim, config.residual_scale) for _ in range(config.depth)), nn.Conv2d(dim, dim, 3, padding=1)
        )
        enlargements = [SubPixelConv2d(dim, dim, 3, scale=step) for step in _STEPS[config.scale]]
        self.tail = nn.Sequential(*enlargements, nn.Conv2d(dim, config.in_channels, 3, padding=1))

    @property
    def reach(self) -> int:
        # One pixel each of the head, of the convolutions at low resolution, and of the tail at whatever resolution.
        return 2 + 2 * int(self.config.depth) + len(self.tail)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        x = self.head(x)
        y: Tensor = self.tail(x + self.body(x))
        return y


_LARGE = {"dim": 256, "depth": 32, "residual_scale": 0.1}

VARIANTS: dict[str, EDSRConfig] = {
    "edsr_baseline_x2": EDSRConfig(scale=2),
    "edsr_baseline_x3": EDSRConfig(scale=3),
    "edsr_baseline_x4": EDSRConfig(scale=4),
    "edsr_x2": EDSRConfig(scale=2, **_LARGE),  # type: ignore[arg-type]
    "edsr_x3": EDSRConfig(scale=3, **_LARGE),  # type: ignore[arg-type]
    "edsr_x4": EDSRConfig(scale=4, **_LARGE),  # type: ignore[arg-type]
}

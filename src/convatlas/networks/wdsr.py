"""WDSR: wide activation within residual blocks at low resolution, with weight normalisation.

Yu, Fan, Yang, Xu, Wang, Wang, Huang: "Wide Activation for Efficient and Accurate Image Super-Resolution", 2018, arXiv
1808.08718 (its WDSR-A). In the form in which Li, Ji, Qin et al. fit it to videos: "Towards High-Quality and Efficient
Video Super-Resolution via Spatial-Temporal Data Overfitting", CVPR 2023, arXiv 2303.08331; the code is
coulsonlee/STDO-CVPR2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from convatlas.errors import CheckpointError
from convatlas.networks.base import PublishedFile, Upscaler, UpscalerConfig
from convatlas.ops.shuffle import pixel_shuffle
from convatlas.weights import Layout

__all__ = ["PUBLISHED", "VARIANTS", "WDSR", "WDSRConfig", "WideBlock"]

_MEAN = 0.5  # what images are centred by
_SKIP_KERNEL = 5
_WIDENING_GAIN = 2.0  # length of the first weights of a block


@dataclass(frozen=True, kw_only=True)
class WDSRConfig(UpscalerConfig):
    """Config of `WDSR`.

    Attributes:
        scale: s of the paper; 1 keeps the size.
        in_channels: 3 for RGB.
        frames: consecutive frames whose channels are joined as the input, an odd number; the output is the middle one.
        dim: F, channels between the blocks.
        depth: n, number of blocks.
        expansion: w, how many times as many channels there are within a block.

    Raises:
        ValueError: a value is out of range.
    """

    scale: int = 2
    in_channels: int = 3
    frames: int = 1
    dim: int = 32
    depth: int = 16
    expansion: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dim", "depth", "expansion"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.frames < 1 or self.frames % 2 == 0:
            raise ValueError(f"frames must be odd, got {self.frames}")

    def build(self) -> WDSR:
        return WDSR(self)


def _conv(in_channels: int, out_channels: int, kernel_size: int, gain: float) -> nn.Module:
    """A convolution whose weight of each output channel is g v / |v|; g begins with the gain, the bias with zero."""
    conv = weight_norm(nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2))
    nn.init.constant_(conv.get_parameter("parametrizations.weight.original0"), gain)
    nn.init.zeros_(conv.get_parameter("bias"))
    return conv


class WideBlock(nn.Module):
    """x + conv(ReLU(conv(x))) with more channels between the convolutions than at the ends (WDSR, figure 2).

    Args:
        dim: channels of the map.
        expansion: how many times as many channels lie between the convolutions.
        residual_gain: length of the weights of the second convolution at the beginning.
    """

    def __init__(self, dim: int, *, expansion: int, residual_gain: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(dim, expansion * dim, 3, _WIDENING_GAIN), nn.ReLU(), _conv(expansion * dim, dim, 3, residual_gain)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape of x (B, dim, H, W)."""
        return x + self.body(x)


def _of_same_scale(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Refuse a checkpoint of another scale by name; the shapes alone tell it less plainly."""
    if isinstance(model, WDSR):
        last = state[f"body.{model.config.depth + 1}.bias"]
        theirs, ours = math.sqrt(len(last) / model.in_channels), model.scale
        if theirs != ours and theirs.is_integer():
            raise CheckpointError(f"the checkpoint enlarges {theirs:g} times, the model {ours} times")
    return state


class WDSR(Upscaler):
    """Wide residual blocks at low resolution, beside one convolution of the image; pixel shuffle of their sum.

    Args:
        config: what to build.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {
        "authors": Layout(
            renames=(
                (r"(^|\.)weight_g$", r"\1parametrizations.weight.original0"),
                (r"(^|\.)weight_v$", r"\1parametrizations.weight.original1"),
            ),
            function=_of_same_scale,
        )
    }

    def __init__(self, config: WDSRConfig) -> None:
        super().__init__(config)
        given, made = config.frames * config.in_channels, config.scale**2 * config.in_channels
        gain = 1 / math.sqrt(config.depth)
        self.body = nn.Sequential(
            _conv(given, config.dim, 3, 1.0),
            *(WideBlock(config.dim, expansion=config.expansion, residual_gain=gain) for _ in range(config.depth)),
            _conv(config.dim, made, 3, 1.0),
        )
        # Where the image keeps its size it is added as it is.
        self.skip = nn.Sequential(*([] if given == made else [_conv(given, made, _SKIP_KERNEL, 1.0)]))

    @property
    def frames(self) -> int:
        return int(self.config.frames)

    @property
    def reach(self) -> int:
        return 2 * int(self.config.depth) + 2

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        x = x - _MEAN
        return pixel_shuffle(self.body(x) + self.skip(x), self.scale) + _MEAN


VARIANTS: dict[str, WDSRConfig] = {
    "wdsr_x2": WDSRConfig(scale=2),
    "wdsr_x3": WDSRConfig(scale=3),
    "wdsr_x4": WDSRConfig(scale=4),
}

_AUTHORS = "https://github.com/coulsonlee/STDO-CVPR2023"

#: The general network that the authors begin with, checkpoint_pretrained/epoch_30_X2.pth; those for scales of 3 and 4,
#: for which no figure is known, lie beside it. Its figure is the mean of the labels that they published.
PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "wdsr_x2": (
        PublishedFile(_AUTHORS, "see the page", {"vlog_15, mean PSNR of 90,000 patches [dB]": 51.91}, by_hand=True),
    ),
}
